"""What stands for the content of a model or a tokenizer: hashes that other weights, settings or tokens change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any

import torch

# Endings of configuration keys that say where a model came from, or how it is used.
_NO_ARITHMETIC = (
    "_token_id",
    "name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "use_cache",
    "auto_map",
    "id2label",
    "label2id",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
)


def arithmetic_settings(model: Any) -> dict[str, Any]:
    """The settings of a model's configuration that may change what its weights compute, such as `rope_theta`."""
    config = model.config.to_dict() if hasattr(getattr(model, "config", None), "to_dict") else {}
    return {key: value for key, value in config.items() if not key.endswith(_NO_ARITHMETIC)}


def model_fingerprint(model: Any) -> str:
    """A hash of the weights and of `arithmetic_settings`."""
    content = weights_fingerprint(model) + json.dumps(arithmetic_settings(model), sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def weights_fingerprint(model: Any, skip: Collection[str] = ()) -> str:
    """A hash of names, shapes, types and up to 16,384 evenly spaced entries of every parameter, and of the class.

    Args:
        model: any module.
        skip: names of entries to leave out.
    """
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if name in skip:
            continue
        flat = tensor.detach().reshape(-1)
        chosen = flat[:: max(1, flat.numel() // 16384)][:16384].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(chosen.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary and of the special tokens."""
    content = repr((sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))))
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
