"""One head applied to chunks of rows, and the gradients that flow back through it: the vendor's GEMMs, reused buffers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pocl_kernels.plan import Gradients
from pocl_kernels.triton_backend import gemm

SLICE_BYTES = 32 * 2**20  # of a head that is upcast at a time, where it must be
ROW_ALIGNMENT = 16  # entries: every row of a buffer starts 128-bit aligned, whatever the vocabulary and the dtype


def padded(V: int) -> int:
    """Entries from one row of a buffer to the next."""
    return -(-V // ROW_ALIGNMENT) * ROW_ALIGNMENT


class Projection:
    """``hidden @ weight[:V].T`` by chunks of rows, in ``dtype`` (float32 or float64), and the way back.

    Factors of one 16-bit dtype stay in it: their products are exact in float32. The gradient's tile is bf16 for bf16
    factors, whose range it shares, and ``dtype`` for all others: a float16 tile would lose what lies below 6e-8.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, V: int, dtype: torch.dtype, wanted: Gradients
    ) -> None:
        self.hidden, self.weight, self.V, self.dtype, self.wanted = hidden, weight, V, dtype, wanted
        same = hidden.dtype == weight.dtype
        self.factor_dtype = hidden.dtype if same and hidden.dtype in (torch.bfloat16, torch.float16) else dtype
        bf16 = self.factor_dtype == torch.bfloat16 and dtype == torch.float32
        self.gradient_dtype = torch.bfloat16 if bf16 else dtype
        self.bias = None
        if bias is not None:
            self.bias = torch.zeros(padded(V), dtype=dtype, device=hidden.device)
            self.bias[:V] = bias[:V]
        self._buffer: Tensor | None = None
        self._gradient_buffer: Tensor | None = None
        self._rows: Tensor | None = None
        device = hidden.device
        self.grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=device) if wanted.hidden else None
        # Rows beyond the shared vocabulary get no gradient; the rest is written, not added to, by the first chunk.
        self.grad_weight = torch.empty(weight.shape, dtype=dtype, device=device) if wanted.weight else None
        self.grad_bias = torch.zeros(weight.shape[0], dtype=dtype, device=device) if wanted.bias else None
        self._first = True

    @property
    def bytes_per_row(self) -> int:
        """Scratch of one row of a chunk."""
        entry = self.dtype.itemsize
        if any(self.wanted) and self.gradient_dtype != self.dtype:
            entry += self.gradient_dtype.itemsize
        # The chunk's hidden states, in up to two dtypes, and their gradient before it is scattered.
        return padded(self.V) * entry + self.hidden.shape[1] * (2 + 2 * self.dtype.itemsize)

    @property
    def bytes_fixed(self) -> int:
        """Scratch that does not depend on the chunk: a slice of the head if it is upcast, the bias."""
        slices = min(SLICE_BYTES, self.V * self.weight.shape[1] * self.dtype.itemsize) if self._slice_rows else 0
        return slices + (0 if self.bias is None else self.bias.nbytes)

    @property
    def _slice_rows(self) -> int:
        """Rows of the head that are upcast at a time; 0: it is used as it is, in every product."""
        upcast = not any(self.wanted) or self.gradient_dtype == self.factor_dtype
        taken = gemm.takes_16_bit(self.weight.device, self.factor_dtype) if self.factor_dtype != self.dtype else True
        if self.weight.dtype == self.factor_dtype and taken and upcast:
            return 0
        return max(1, SLICE_BYTES // (self.weight.shape[1] * self.dtype.itemsize))

    def _slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        size = self._slice_rows or self.V
        for first in range(0, self.V, size):
            part = slice(first, min(first + size, self.V))
            yield part, self.weight[part].to(dtype)

    def project(self, rows: Tensor | slice) -> Tensor:
        """Projections of the given rows into the reused buffer: ``[n, padded(V)]``, of which V columns are written."""
        hidden = self.hidden[rows] if isinstance(rows, slice) else self.hidden.index_select(0, rows)
        self._rows = hidden.to(self.factor_dtype)
        n = hidden.shape[0]
        if self._buffer is None:  # the first chunk is the largest
            self._buffer = torch.empty(n, padded(self.V), dtype=self.dtype, device=hidden.device)
        z = self._buffer[:n]
        for part, weight in self._slices(self.factor_dtype):
            gemm.multiply(self._rows, weight.T, out=z[:, part])
        return z

    def gradient_tile(self, z: Tensor) -> Tensor | None:
        """Where the row kernel writes the gradient of the chunk ``z``: over it, or beside it in 16 bits."""
        if not any(self.wanted):
            return None
        if self.gradient_dtype == self.dtype:
            return z
        if self._gradient_buffer is None:
            self._gradient_buffer = torch.empty_like(z, dtype=self.gradient_dtype)
        return self._gradient_buffer[: z.shape[0]]

    def accumulate(self, rows: Tensor | slice, gradient: Tensor) -> None:
        """Add one chunk's share to the gradients; ``gradient`` is that of the projection, ``[n, padded(V)]``."""
        assert self._rows is not None
        hidden = self._rows.to(self.gradient_dtype)
        gradient = gradient[:, : self.V]
        if self.grad_hidden is not None:
            direct = isinstance(rows, slice)
            dh = self.grad_hidden[rows] if direct else torch.empty(hidden.shape, dtype=self.dtype, device=hidden.device)
            for part, weight in self._slices(self.gradient_dtype):
                (gemm.multiply if part.start == 0 else gemm.multiply_add)(gradient[:, part], weight, out=dh)
            if not direct:
                self.grad_hidden.index_copy_(0, rows, dh)
        if self.grad_weight is not None:
            target = self.grad_weight[: self.V]
            size = self._slice_rows or self.V
            for part in (slice(first, min(first + size, self.V)) for first in range(0, self.V, size)):
                (gemm.multiply if self._first else gemm.multiply_add)(gradient[:, part].T, hidden, out=target[part])
        if self.grad_bias is not None:
            self.grad_bias[: self.V] += gradient.sum(0, dtype=self.dtype)
        self._first = False

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the hidden states, the weight and the bias, in ``dtype``; None where not wanted."""
        if self.grad_weight is not None:
            self.grad_weight[0 if self._first else self.V :].zero_()
        return self.grad_hidden, self.grad_weight, self.grad_bias
