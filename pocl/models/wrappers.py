"""What wraps a model, and what lies inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """The Hugging Face causal language model inside PEFT, DDP and compile wrappers."""
    while True:
        if hasattr(model, "get_base_model"):  # PEFT; `peft_config` alone also sits on the model inside
            model = model.base_model.model
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def peft_wrapper(model: Any) -> Any:
    """The PEFT model around the language model, None without one."""
    while not hasattr(model, "get_base_model"):
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return None
    return model


def text_config(model: Any) -> Any:
    """The config of the language model inside `model`; of a model that also sees or hears, that of its text part."""
    config = unwrapped(model).config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def context_of(config: Any) -> int | None:
    """Tokens that a language model of this config can see at once, None if it sets no limit."""
    value = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(value) if value and value > 0 else None


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and the like off; what was before is restored, module by module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
