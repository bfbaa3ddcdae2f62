"""The head of a model on disk, without the rest of its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocl.models.head import head_of
from pocl.models.hidden import output_embedding_of
from pocl.models.loading import adapter_settings, load_causal_lm
from pocl_kernels import Head

_INDEX = "model.safetensors.index.json"


def stored_head(source: str, *, dtype: str = "auto", revision: str | None = None) -> Head:
    """The projection to the vocabulary of a folder or hub id: see `head_of`.

    The model is made without weights; those of its output embedding are looked up by their names. Where the files have
    other names, the whole model is loaded.

    Args:
        source: of a whole model.
        dtype: float32, bfloat16, float16, or auto for that of the files.
        revision: of a hub id.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if Path(source).is_dir():
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        output = output_embedding_of(model)
        found = _read(Path(source), _names(model, output))
        if found:
            wanted = getattr(torch, dtype) if dtype != "auto" else found["weight"].dtype
            for name, tensor in found.items():
                setattr(output, name, nn.Parameter(tensor.to(wanted), requires_grad=False))
            return head_of(model)
    model = load_causal_lm(source, dtype=getattr(torch, dtype) if dtype != "auto" else "auto", revision=revision)
    head = head_of(model)
    bias = None if head.bias is None else head.bias.detach()
    return Head(head.weight.detach(), bias, scale=head.scale, softcap=head.softcap)


def check_whole_model(source: str) -> None:
    """Raise a ValueError where a folder holds an adapter, of which an engine would run the base."""
    if Path(source).is_dir() and adapter_settings(source) is not None:
        raise ValueError(
            f"{source} holds a PEFT adapter, and an engine takes a whole model; make one with `pocl merge {source} "
            "FOLDER`"
        )


def _names(model: Any, output: nn.Module) -> dict[str, list[str]]:
    """By parameter of the output embedding, the names that it may have in the files: a tied weight has two."""
    tied = [output, model.get_input_embeddings()] if model.config.get_text_config().tie_word_embeddings else [output]
    parameters = [name for name, value in output.named_parameters(recurse=False) if value is not None]
    return {
        name: [f"{place}.{name}" for place, module in model.named_modules() for owner in tied if module is owner]
        for name in parameters
    }


def _read(folder: Path, names: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """Each parameter under the first of its names that is there; nothing where one is missing."""
    from safetensors import safe_open

    index = folder / _INDEX
    files = json.loads(index.read_text("utf-8"))["weight_map"] if index.is_file() else {}
    found: dict[str, torch.Tensor] = {}
    for name, candidates in names.items():
        for candidate in candidates:
            file = folder / files.get(candidate, "model.safetensors")
            if not file.is_file():
                continue
            with safe_open(file, framework="pt") as opened:
                if candidate in opened.keys():  # noqa: SIM118  it is no mapping
                    found[name] = opened.get_tensor(candidate)
                    break
        if name not in found:
            return {}
    return found
