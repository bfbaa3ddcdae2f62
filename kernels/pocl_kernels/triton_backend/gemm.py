"""Matrix products in float32 of 16-bit or float32 factors, into buffers that exist already.

16-bit factors go to the vendor's library with a float32 result (``out_dtype``): products of 16-bit numbers are exact in
float32 and never rounded to 16 bits in between. On a CPU, where the interpreter runs, factors are upcast.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

_TAKES_16_BIT: dict[tuple[torch.device, torch.dtype], bool] = {}


def multiply(a: Tensor, b: Tensor, out: Tensor, *, alpha: float = 1.0, add: bool = False) -> None:
    """``out = alpha a @ b``, or ``out += alpha a @ b``. Without ``add``, what ``out`` held, NaN or not, is lost."""
    beta = 1.0 if add else 0.0
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif a.device.type == "cpu":
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)


def takes_16_bit(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this 16-bit dtype can be added to a float32 buffer here; tried once a device and dtype.

    Warns if not: then 16-bit models are multiplied in float32, which is right and many times slower.
    """
    if device.type == "cpu":
        return True
    key = (device, dtype)
    if key not in _TAKES_16_BIT:
        # Out of memory is no answer: it is raised, and the question is asked again at the next call.
        a, out = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
        try:
            torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
            _TAKES_16_BIT[key] = bool((out == 17.0).all())
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, TypeError):
            _TAKES_16_BIT[key] = False
        if not _TAKES_16_BIT[key]:
            warnings.warn(
                f"torch {torch.__version__} cannot add products of {dtype} factors to a float32 buffer on {device}: "
                "the losses multiply in float32, many times slower. Install torch 2.10 or newer",
                RuntimeWarning,
                stacklevel=2,
            )
    return _TAKES_16_BIT[key]
