"""Matrix products in float32 of 16-bit or float32 factors, into buffers that exist already.

16-bit factors go to the vendor's library with a float32 result (``out_dtype``): products of 16-bit numbers are exact in
float32 and never rounded to 16 bits in between. Where the library cannot (CPU tensors, some ROCm builds), factors are
upcast; the caller keeps them small.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, out: Tensor, *, alpha: float = 1.0, add: bool = False) -> None:
    """``out = alpha a @ b``, or ``out += alpha a @ b``. Without ``add``, what ``out`` held, NaN or not, is lost."""
    beta = 1.0 if add else 0.0
    if a.dtype != out.dtype and takes_16_bit(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)


@functools.cache
def takes_16_bit(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this 16-bit dtype can be added to a float32 buffer here; tried once a device and dtype."""
    if device.type == "cpu":
        return False
    a = torch.ones(16, 16, device=device, dtype=dtype)
    out = torch.ones(16, 16, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return bool((out == 17.0).all())
