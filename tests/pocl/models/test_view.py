"""The view of a model is made once, sees through wrappers, and says what the model can do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.causal_lms import quietly, tiny_causal_lm
from pocl import heads
from pocl.models import view_of

transformers = pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what torch.compile imports says so of itself
def test_a_model_has_one_view_inside_all_its_wrappers(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model()
    assert view_of(model) is view_of(model) is view_of(nn.DataParallel(model)) is view_of(torch.compile(model))
    assert view_of(view_of(model)) is view_of(model)


def test_a_copy_has_a_view_of_its_own(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model()
    view = view_of(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_output_embeddings().weight.zero_()
    assert view_of(other).model is other
    assert not view_of(other).head().weight.any()
    assert view.model is model
    assert view.head().weight.any()


def test_a_saved_model_knows_nothing_of_its_view(make_tiny_model: Callable[..., Any], tmp_path: Any) -> None:
    model = make_tiny_model()
    heads.hidden_states(model, torch.tensor([[3, 4]]))
    assert not any("view" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert "view" not in (tmp_path / "config.json").read_text()


def test_the_view_follows_a_model_that_grows(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model()
    assert view_of(model).vocabulary == 1000
    model.resize_token_embeddings(1010)
    assert (view_of(model).vocabulary, view_of(model).head().vocab_size) == (1010, 1010)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "roberta", "xlm-roberta-xl", "bert"])
def test_the_context_is_what_can_be_read(model_type: str) -> None:
    with quietly():
        view = view_of(tiny_causal_lm(model_type))
    assert view.context is not None
    ids = torch.full((1, view.context), 5)
    assert view.hidden_states(ids, torch.ones_like(ids)).shape[1] == view.context
    if view.config.model_type in ("gpt2", "opt", "roberta", "xlm-roberta-xl", "bert"):  # learned positions end
        longer = torch.full((1, view.context + 1), 5)
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            view.hidden_states(longer, torch.ones_like(longer))


def test_a_model_that_sees_what_it_is_to_predict_is_refused() -> None:
    with quietly():
        config = tiny_causal_lm("bert").config
        config.is_decoder = False
        both_ways = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in both_ways.parameters():
                parameter.mul_(5)
        with pytest.raises(ValueError, match="sees the tokens that it is to predict"):
            heads.verify_head(both_ways)


def test_an_encoder_decoder_is_refused_before_it_is_run() -> None:
    config = transformers.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="only decoders can be distilled"):
        heads.verify_head(transformers.T5ForConditionalGeneration(config))


def test_left_padding_needs_a_model_that_takes_a_mask(make_tiny_model: Callable[..., Any]) -> None:
    class WithoutMask(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
            return (input_ids.unsqueeze(-1).float(),)

    from pocl.models.hidden import backbone_states

    ids = torch.tensor([[3, 4, 5]])
    right, left = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 1]])
    assert backbone_states(WithoutMask(), {"input_ids": ids, "attention_mask": right}).shape == (1, 3, 1)
    with pytest.raises(ValueError, match="padded on the right"):
        backbone_states(WithoutMask(), {"input_ids": ids, "attention_mask": left})


def test_a_cache_is_handed_over_by_the_name_that_the_forward_has_for_it() -> None:
    from pocl.models.hidden import _taken_by

    def before(input_ids: Any, past_key_values: Any = None, **further: Any) -> None: ...
    def since(input_ids: Any, cache: Any = None) -> None: ...

    assert _taken_by(before, {"past_key_values": 1}) == {"past_key_values": 1}
    assert _taken_by(since, {"past_key_values": 1}) == {"cache": 1}
