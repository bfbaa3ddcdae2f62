"""Adapters on the output embedding take part with their effective weight and its gradients, or are refused in words."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pocl import heads
from pocl.models import project, view_of

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    # PEFT 0.21 asks models for a property by the name it had before transformers 5.20
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]

VOCABULARY, HIDDEN = 96, 32
BOTH = ["q_proj", "lm_head"]
ON_THE_HEAD = {
    "lora": peft.LoraConfig(r=2, target_modules=BOTH),
    "lora with bias": peft.LoraConfig(r=2, target_modules=BOTH, lora_bias=True),
    "rslora": peft.LoraConfig(r=2, target_modules=BOTH, use_rslora=True, lora_alpha=7),
    "dora": peft.LoraConfig(r=2, target_modules=BOTH, use_dora=True),
    "ia3": peft.IA3Config(target_modules=BOTH, feedforward_modules=[]),
    "ia3 of its input": peft.IA3Config(target_modules=BOTH, feedforward_modules=["lm_head"]),
    "loha": peft.LoHaConfig(r=2, target_modules=BOTH),
    "lokr": peft.LoKrConfig(r=2, target_modules=BOTH),
    "oft": peft.OFTConfig(oft_block_size=8, r=0, target_modules=BOTH),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=BOTH),
    "vera": peft.VeraConfig(r=2, target_modules=["lm_head"]),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=1, target_modules=BOTH),
    "trainable tokens": peft.TrainableTokensConfig(token_indices=[5, 7], target_modules=["lm_head"]),
    "lora and trainable tokens": peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 7], "lm_head": [5, 8]}
    ),
    "lora and a trained head": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def model(*, tied: bool = False, bias: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    made = transformers.LlamaForCausalLM(config)
    if bias:
        made.lm_head = nn.Linear(HIDDEN, VOCABULARY)
    return made


def adapted(config: Any, **options: Any) -> Any:
    """With every trained number moved: adapters begin where they do nothing."""
    made = peft.get_peft_model(model(**options), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def gradients(trained: nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    trained.zero_grad()
    torch.manual_seed(1)
    (logits * torch.randn(logits.shape)).sum().backward()
    return {n: p.grad.clone() for n, p in trained.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("kind", ON_THE_HEAD)
def test_logits_and_gradients_are_those_of_the_adapted_model(kind: str, bias: bool) -> None:
    trained = adapted(ON_THE_HEAD[kind], bias=bias).train()
    heads.verify_head(trained, trained=True)
    input_ids = torch.randint(3, VOCABULARY, (2, 7))
    own = trained(input_ids=input_ids).logits
    expected = gradients(trained, own)
    view = view_of(trained)
    ours = project(view.head(), view.hidden_states(input_ids))
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    found = gradients(trained, ours)
    assert any("lm_head" in name and gradient.any() for name, gradient in expected.items())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("kind", ["lora", "dora", "lora and trainable tokens", "lora and a trained head"])
def test_a_tied_head_takes_part_as_the_model_has_it(kind: str) -> None:
    trained = adapted(ON_THE_HEAD[kind], tied=True).eval()
    input_ids = torch.randint(3, VOCABULARY, (2, 7))
    ours = project(heads.head_of(trained), heads.hidden_states(trained, input_ids))
    torch.testing.assert_close(ours, trained(input_ids=input_ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "trainable tokens", "lora and a trained head"])
def test_disabled_and_merged_adapters_leave_the_base_or_the_merged_weight(kind: str) -> None:
    trained = adapted(ON_THE_HEAD[kind]).eval()
    input_ids = torch.randint(3, VOCABULARY, (1, 7))
    plain = model().eval()(input_ids=input_ids).logits
    with trained.disable_adapter(), torch.no_grad():
        ours = project(heads.head_of(trained), heads.hidden_states(trained, input_ids))
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    own = trained(input_ids=input_ids).logits
    if "trained head" not in kind:
        trained.merge_adapter()
    ours = project(heads.head_of(trained), heads.hidden_states(trained, input_ids))
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


def test_an_adapter_in_float32_on_a_bfloat16_head_keeps_its_digits() -> None:
    trained = peft.get_peft_model(model().bfloat16(), ON_THE_HEAD["lora"])
    weight = heads.head_of(trained).weight
    with torch.no_grad():
        trained.get_output_embeddings().lora_B["default"].weight.fill_(1e-5)
    moved = heads.head_of(trained).weight - weight
    delta = trained.get_output_embeddings().get_delta_weight("default")
    torch.testing.assert_close(moved, delta, rtol=0.1, atol=1e-8)


REFUSED = {
    "prompt_tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix_tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p_tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "activated LoRA": peft.LoraConfig(
        r=2, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"
    ),
    "dropout of 0.1": peft.LoraConfig(r=2, target_modules=BOTH, lora_dropout=0.1),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_no_hidden_state_and_head_can_stand_for_is_refused(words: str) -> None:
    trained = peft.get_peft_model(model(), REFUSED[words])
    with pytest.raises(ValueError, match=words):
        heads.verify_head(trained, trained=True)


def test_dropout_matters_only_on_the_head_and_only_to_training() -> None:
    heads.verify_head(peft.get_peft_model(model(), REFUSED["dropout of 0.1"]))
    in_the_body = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)
    heads.verify_head(peft.get_peft_model(model(), in_the_body), trained=True)
