"""Importing transformers in half of the time, for a process that plans a run and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def import_leanly() -> None:
    """Let transformers be imported without torch.distributed and torch's compiler, which take it three seconds.

    It then is what it is with a build of torch without them, and what reads configurations and tokenizers needs none.
    Nothing can be trained in such a process. Where transformers is imported already, nothing is done.
    """
    if "transformers" in sys.modules:
        return
    import torch.compiler
    import torch.distributed

    torch.distributed.is_available = lambda: False
    torch.compiler.disable = _unchanged  # type: ignore[assignment]


def _unchanged(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """In place of a decorator that imports the compiler to keep a function from it."""
    return function if function is not None else lambda decorated: decorated
