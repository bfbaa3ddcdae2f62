"""How every kernel here is launched: 256 threads a row, whatever a GPU calls a warp."""

from __future__ import annotations

import functools

import torch
import triton

THREADS = 256
"""With blocks of 2048 entries 8 a thread: 128 bits of a 16-bit row, twice that of a float32 one."""

MAX_REGISTERS = 128
"""Two programs fit a multiprocessor. Without the bound NVIDIA's assembler spills a little to fit three."""


def block(least: int, itemsize: int) -> int:
    """Entries of a kernel's block that give every thread 128 bits of a row."""
    return max(least, THREADS * 16 // itemsize)


def options(backend: str, warp_size: int) -> dict[str, int | bool]:
    """Launch options for a target, "cuda" or "hip". A fused multiply and add rounds once, not twice."""
    result: dict[str, int | bool] = {"num_warps": THREADS // warp_size, "enable_fp_fusion": True}
    return result | ({"maxnreg": MAX_REGISTERS} if backend == "cuda" else {})


@functools.cache
def on(device: torch.device) -> dict[str, int | bool]:
    """Launch options on ``device``, which is the current one."""
    if device.type != "cuda":  # the interpreter
        return options("cuda", 32)
    target = triton.runtime.driver.active.get_current_target()
    return options(target.backend, target.warp_size)
