"""Which memory mode "auto" stands for, how large the workspace is, and which backend can serve.

Traced by torch.compile: shapes and numbers.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pocl_kernels.head import Head
from pocl_kernels.plan import Gradients, compute_dtype
from pocl_kernels.triton_backend.layout import MIB, demand, factor_dtypes, fast_layout

BACKENDS = ("auto", "triton", "cpu")
DEFAULT_WORKSPACE_MB = {"fast": 256.0, "low": 96.0}
MAX_WORKSPACE_MB = 8192.0  # of the default on a GPU
MIN_GPU_ROWS = 1024


def memory_mode(reduction: str, memory: str, *, short_chunks: Callable[[], bool]) -> str:
    """The mode that "auto" stands for.

    "low" for gradients of single tokens, which must wait for the upstream gradient. "low" too on a GPU where few rows
    have room: "fast" adds every group's share to the weight's gradient, and at an H100's ratio of arithmetic to memory
    bandwidth that traffic should outweigh low's second forward pass below about 1,000 rows (docs/gpu.md). Else "fast".
    """
    if memory != "auto":
        return memory
    if reduction == "none" and torch.is_grad_enabled():
        return "low"
    return "low" if short_chunks() else "fast"


def mode_and_workspace(
    reduction: str,
    memory: str,
    workspace_mb: float | None,
    hidden: Tensor,
    head: Head,
    teacher: tuple[Tensor, Head] | None,
) -> tuple[str, float]:
    """The mode, and the workspace in MiB."""
    gpu = hidden.device.type == "cuda"
    if workspace_mb is None:
        workspace_mb = default_workspace_mb(memory, hidden.device)

    def short_chunks() -> bool:
        if not gpu or not head.weight.requires_grad or not torch.is_grad_enabled():
            return False
        models = [(hidden, head, Gradients(hidden.requires_grad, True, False))]
        if teacher is not None:
            models.append((*teacher, Gradients(False, False, False)))
        return held_rows(models, workspace_mb) < min(math.prod(hidden.shape[:-1]), MIN_GPU_ROWS)

    return memory_mode(reduction, memory, short_chunks=short_chunks), workspace_mb


def default_workspace_mb(memory: str, device: torch.device) -> float:
    """On a GPU a tenth of its memory, at most 8 GiB, a sixteenth of that for "low"; 256 and 96 MiB elsewhere."""
    if device.type != "cuda":
        return DEFAULT_WORKSPACE_MB["low" if memory == "low" else "fast"]
    fast = min(max(_total_memory(device.index) / 10 / MIB, DEFAULT_WORKSPACE_MB["fast"]), MAX_WORKSPACE_MB)
    return fast / 16 if memory == "low" else fast


@functools.cache
def _total_memory(index: int | None) -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index).total_memory


def held_rows(models: Sequence[tuple[Tensor, Head, Gradients]], workspace_mb: float) -> int:
    """Rows whose gradients ``memory="fast"`` makes at a time on a GPU, by the layout that the backend itself makes."""
    products = autocast_products(models[0][0].device)
    dtype = compute_dtype(*(hidden for hidden, _, _ in models))
    V = min(head.vocab_size for _, head, _ in models)
    demands = []
    for hidden, head, wanted in models:
        factors = factor_dtypes(hidden.dtype, head.weight.dtype, dtype, getattr(torch, products or "none", None), True)
        bias = head.bias is not None
        demands.append(demand(head.hidden_size, V, head.weight.dtype, dtype, factors, wanted, bias))
    rows = math.prod(models[0][0].shape[:-1])
    later = not torch.compiler.is_compiling()
    return fast_layout(rows, demands, int(workspace_mb * MIB), later=later).held


def autocast_products(device: torch.device) -> str:
    """Autocast's dtype on a GPU, where 16-bit products are many times faster; on a CPU they are slower: none."""
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return ""
    return str(torch.get_autocast_dtype("cuda")).removeprefix("torch.")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off, where it is on: the context costs more than to ask."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def check_backend(backend: str, device: torch.device) -> None:
    """Refuse a backend that is none, or that cannot read tensors on the device, in words."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    if device.type == "mps":
        raise ValueError("MPS has no float64, in which losses are summed: move the tensors to the CPU")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f'backend="cpu" cannot read tensors on {device}: pass backend="auto"')
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'backend="triton" needs tensors on a CUDA or ROCm device, got {device}; on a CPU it runs in the '
            "interpreter, with TRITON_INTERPRET=1 set before the process starts"
        )
