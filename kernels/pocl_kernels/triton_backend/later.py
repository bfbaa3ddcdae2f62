"""The gradient of a head's weight, made when the upstream gradient is known.

With the gradient tiles of all tokens kept, it is one product ``tiles.T @ hidden`` over all of them. It is made a slice
of the vocabulary at a time, each in float32, multiplied by the upstream gradient and rounded to the weight's dtype
while it lies in the GPU's cache: no float32 gradient of the weight exists, and nothing is rounded twice.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pocl_kernels.triton_backend import gemm
from pocl_kernels.triton_backend.layout import slice_rows


@dataclasses.dataclass(frozen=True, eq=False)
class WeightGradient:
    """``alpha upstream tiles.T @ hidden`` in the weight's dtype, to be called with the upstream gradient (None: 1)."""

    tiles: Tensor  # [n, V] float16
    hidden: Tensor  # [n, H] float16
    alpha: float
    shape: torch.Size
    dtype: torch.dtype

    def __call__(self, upstream: Tensor | None) -> Tensor:
        (rows, H), V = self.shape, self.tiles.shape[1]
        result = torch.empty(rows, H, dtype=self.dtype, device=self.tiles.device)
        size = slice_rows(V, H, torch.float32.itemsize)
        buffer = torch.empty(size, H, dtype=torch.float32, device=self.tiles.device)
        for first in range(0, V, size):
            part = slice(first, min(first + size, V))
            product = buffer[: part.stop - first]
            gemm.multiply(self.tiles[:, part].T, self.hidden, out=product, alpha=self.alpha)
            if upstream is None:
                result[part] = product
            else:
                torch.mul(product, upstream, out=result[part])  # one kernel: rounds as it writes
        result[V:].zero_()  # rows beyond the shared vocabulary
        return result
