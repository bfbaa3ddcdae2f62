"""New adapters of low rank: on which layers, beginning where, and merged into what."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl.models import load_causal_lm, load_tokenizer, project, view_of
from pocl.models.lora import adapted_modules, add_lora, merge_folder, num_lora_parameters

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 12).unsqueeze(0)
TARGETS: tuple[tuple[str, ...], ...] = (
    ("all-linear",),
    ("q_proj", "lm_head"),
    ("all-linear", "lm_head"),
    ("embed_tokens",),
)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, make_tiny_folder: Callable[..., Path]) -> Path:
    return make_tiny_folder(tie_word_embeddings=request.param)


def trained(base: Path, **options: Any) -> Any:
    model = add_lora(load_causal_lm(base), **({"r": 4, "alpha": 8.0} | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_merged_and_unmerged_give_the_same_logits(
    base: Path, targets: tuple[str, ...], dora: bool, tmp_path: Path
) -> None:
    model = trained(base, targets=targets, dora=dora)
    plain, own = load_causal_lm(base)(IDS).logits, model(IDS).logits
    assert (own - plain).abs().max() > 1e-2
    torch.testing.assert_close(project(view_of(model).head(), view_of(model).hidden_states(IDS)), own)
    model.save_pretrained(tmp_path / "adapter")
    load_tokenizer(base).save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(load_causal_lm(tmp_path / "adapter", trained=True)(IDS).logits, own, rtol=0, atol=0)
    merge_folder(tmp_path / "adapter", tmp_path / "merged")
    whole = load_causal_lm(tmp_path / "merged")
    assert not hasattr(whole, "peft_config")
    torch.testing.assert_close(whole(IDS).logits, own, rtol=1e-5, atol=1e-5)


def test_adapters_alone_are_saved_and_name_their_base(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(base.parent)
    model = trained(Path(base.name), targets=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)  # wherever the next command is run
    bytes_of_numbers = 4 * num_lora_parameters(load_causal_lm(base), ["q_proj", "lm_head"], 4)
    assert 0 <= (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size - bytes_of_numbers < 2_000


def test_new_adapters_change_nothing_train_alone_and_are_repeatable(base: Path) -> None:
    before = torch.random.get_rng_state()
    first, second = (add_lora(load_causal_lm(base), r=4, alpha=8.0, seed=3) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(first.eval()(IDS).logits, load_causal_lm(base)(IDS).logits, rtol=0, atol=0)
    ours = {name: p for name, p in first.named_parameters() if p.requires_grad}
    assert ours
    assert all("lora_" in name for name in ours)
    assert sum(p.numel() for p in ours.values()) == num_lora_parameters(load_causal_lm(base), ["all-linear"], 4)
    others = dict(second.named_parameters())
    assert all(torch.equal(p, others[name]) for name, p in ours.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"targets": ["query"]},
            "no layer called 'query'.*it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj",
        ),
        ({"targets": ["q_proj", "self_attn"]}, "no layer called 'self_attn'.*lm_head, embed_tokens"),
        ({"targets": ["lm_head"], "dropout": 0.1}, "dropout = 0.1 with lm_head among lora.targets"),
        ({"targets": ["roj"]}, "no layer called 'roj'"),
    ],
)
def test_layers_that_are_not_there_are_named_with_those_that_are(
    tiny_model_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(load_causal_lm(tiny_model_folder), r=4, alpha=8.0, **options)


def test_all_linear_layers_are_all_but_the_head(tiny_model_folder: Path) -> None:
    names = adapted_modules(load_causal_lm(tiny_model_folder), ["all-linear"])
    assert len(names) == 14
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_a_missing_peft_names_the_command(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"run `pip install 'pocl\[lora\]'`"):
        add_lora(load_causal_lm(tiny_model_folder), r=4, alpha=8.0)


def test_nothing_is_merged_over_a_folder_nor_out_of_a_whole_model(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no adapter"):
        merge_folder(tiny_model_folder, tmp_path / "merged")
    trained(tiny_model_folder).save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        merge_folder(tmp_path / "adapter", tmp_path / "merged")
