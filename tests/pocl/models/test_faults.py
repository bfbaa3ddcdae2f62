"""Folders that hold no model, half a model or another kind of one: each is told apart, in words, with what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocl.models import load_causal_lm, load_tokenizer


def configured(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def without(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if name not in key}, file, {"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (lambda f: cut(f, 5000), r"model\.safetensors is damaged or cut off \(5,000 bytes\); get it again"),
    "no byte": (lambda f: cut(f, 0), r"damaged or cut off \(0 bytes\)"),
    "a pointer": (pointer, "Git LFS pointer in place of the weights; get them with `git lfs pull`"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no weights \(it has config\.json, .*\)"),
    "pickled": (pickled, r"pickled weights only \(pytorch_model\.bin\), which could run code"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"no config\.json \(it has .*save_pretrained wrote"),
    "damaged configuration": (lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged: it is no JSON"),
    "a type of the future": (lambda f: configured(f, model_type="next"), r"transformers \(.*model_type next; upgrade"),
    "no type": (lambda f: configured(f, model_type=..., architectures=...), "names no model_type"),
    "an encoder-decoder": (lambda f: configured(f, model_type="t5"), r"no causal language model \(model_type t5\)"),
    "a seeing model": (lambda f: configured(f, model_type="vit"), "only decoders with a head"),
    "other shapes": (lambda f: configured(f, hidden_size=64), "other shapes than its config.json says"),
    "a layer too few": (lambda f: configured(f, num_hidden_layers=3), r"lacks 9 weights .*random ones would be"),
    "half a layer": (lambda f: without(f, "layers.1.mlp"), r"lacks 3 weights .*model\.layers\.1\.mlp\.down_proj"),
    "an unknown word": (lambda f: configured(f, hidden_act="foo"), "cannot be loaded, KeyError: 'foo'"),
    "own code": (
        lambda f: configured(f, model_type="x", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}),
        "set trust_remote_code to true if you do",
    ),
    "nothing": (lambda f: [path.unlink() for path in f.iterdir()], r"no config\.json \(it is empty\)"),
}
TOKENIZERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("token*")],
        r"has no tokenizer \(it has .*save_pretrai",
    ),
    "damaged tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        r"tokenizer\.json is damaged: it is no JSON",
    ),
}


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A model and its tokenizer, for the test to spoil."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "student"))


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_without_a_whole_model_is_told_in_words(name: str, folder: Path) -> None:
    spoil, message = MODELS[name]
    spoil(folder)
    with pytest.raises(ValueError, match=message) as raised:
        load_causal_lm(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_folder_without_a_tokenizer_is_told_in_words(name: str, folder: Path) -> None:
    spoil, message = TOKENIZERS[name]
    spoil(folder)
    with pytest.raises(ValueError, match=message) as raised:
        load_tokenizer(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT 0.21 asks by the old name
def test_an_adapter_whose_base_is_damaged_names_the_base(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load_causal_lm(folder), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(folder)}))
    cut(folder, 3000)
    with pytest.raises(ValueError, match=r"student/model\.safetensors is damaged or cut off"):
        load_causal_lm(tmp_path / "adapter")


def test_a_whole_folder_loads(folder: Path) -> None:
    assert load_causal_lm(folder).config.num_hidden_layers == 2
    assert load_tokenizer(folder).eos_token == "<eos>"
