"""From a model and the name of an engine to the engine that runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from pocl.engines.local import BATCH_TOKENS, LocalEngine
from pocl.engines.protocol import Engine
from pocl.engines.vllm import VLLMEngine

ENGINES = ("transformers", "vllm")


def check_engine(engine: str, engine_args: Mapping[str, Any] | None) -> None:
    """Raise a ValueError for a name that is no engine's, and for arguments that nobody would read."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine_args and engine != "vllm":
        raise ValueError(f"engine_args are for engine='vllm', and engine is {engine!r}; leave them out")


@contextmanager
def running(
    model: nn.Module | Engine | str | Path,
    engine: str = "transformers",
    *,
    engine_args: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    batch_tokens: int = BATCH_TOKENS,
    max_model_len: int | None = None,
) -> Iterator[Engine]:
    """The engine of a model; one that is made here is closed in the end.

    Args:
        model: a model of this process, an engine that runs one already, or, for vLLM, its folder or hub id.
        engine: `transformers`, in this process, or `vllm`.
        engine_args: arguments of `vllm.LLM`, such as `tensor_parallel_size`.
        tokenizer: of a model of this process; vLLM wants to see one before it gives hidden states.
        batch_tokens: of one forward pass in this process.
        max_model_len: of vLLM, see `VLLMEngine`.

    Raises:
        ValueError: see `check_engine` and `VLLMEngine`; or the model is none.
    """
    check_engine(engine, engine_args)
    if isinstance(model, Engine):
        yield model
    elif engine == "transformers" and isinstance(model, nn.Module):
        yield LocalEngine(model, batch_tokens=batch_tokens)
    elif engine == "vllm" and isinstance(model, nn.Module):
        options = {"engine_args": engine_args, "max_model_len": max_model_len}
        with VLLMEngine.of_model(model, tokenizer, **options) as made:
            yield made
    elif engine == "vllm" and isinstance(model, str | Path):
        with VLLMEngine(model, engine_args=engine_args, max_model_len=max_model_len) as made:
            yield made
    else:
        folder = ", a folder or a hub id" if engine == "vllm" else ""
        raise ValueError(
            f"teacher must be a model, an OnlineTeacher{folder} or an engine of pocl.engines, got "
            f"{type(model).__name__}"
        )
