"""One head applied to tiles of rows and vocabulary, and the gradients that flow back: the vendor's GEMMs, reused
buffers.

Precision. Logits are float32 whatever the models are. With 16-bit models the gradient's tile is float16 too, so that
its products run at the 16-bit rate: not bf16, whose 8 digits would cost 1.6e-3 of relative error, as much as rounding
the result once more. float16 has 11 digits (2e-4), and its narrow range does no harm because the tile is multiplied by
a power of two that brings the heaviest row's largest possible entry to about 2^6: entries down to 2^-30 of it keep a
value. Weights and hidden states in bf16 are converted slice by slice; their 8 digits fit. Weights must stay below
65504 in size, hidden states below a million: beyond, the gradient is infinite, never silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pocl_kernels.plan import Gradients
from pocl_kernels.triton_backend import gemm

SLICE_BYTES = 32 * 2**20  # of a head that is converted at a time, where it must be
ROW_ALIGNMENT = 16  # entries: every row of a buffer starts 128-bit aligned, whatever the vocabulary and the dtype
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
TILE_EXPONENT = 6  # of the largest entry to expect in a float16 gradient tile; float16 ends at 2^16
HIDDEN_EXPONENT = -4  # of the factor on bf16 hidden states in float16

Rows = Tensor | slice  # indices of some rows, or a range of them


def padded(V: int) -> int:
    """Entries from one row of a buffer to the next."""
    return -(-V // ROW_ALIGNMENT) * ROW_ALIGNMENT


class Projection:
    """``hidden @ weight[:V].T`` in ``dtype`` (float32 or float64) and the way back, for some rows at a time.

    ``take`` the rows; then for each range of the vocabulary ``project`` and, after a kernel has written the gradient of
    the projection, ``accumulate``; then ``store``. Gradients (those in ``wanted``) have ``dtype``, whatever the inputs
    have. ``products`` is the dtype of the products' factors under autocast; without it 16-bit factors of one dtype stay
    as they are, and all others are taken in ``dtype``.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        V: int,
        dtype: torch.dtype,
        wanted: Gradients,
        products: torch.dtype | None = None,
    ) -> None:
        self.hidden, self.weight, self.V, self.dtype, self.wanted = hidden, weight, V, dtype, wanted
        if products is None and hidden.dtype == weight.dtype:
            products = hidden.dtype
        half = products in SIXTEEN_BIT and dtype == torch.float32
        self.factor_dtype = products if half and products is not None else dtype
        self.gradient_dtype = torch.float16 if half else dtype
        self.tile_scale = 1.0
        self.bias = None
        if bias is not None:
            self.bias = torch.zeros(padded(V), dtype=dtype, device=hidden.device)
            self.bias[:V] = bias[:V]
        self._buffer = self._gradient_buffer = torch.empty(0, device=hidden.device)
        self._rows = self._grad_rows = torch.empty(0, device=hidden.device)
        device = hidden.device
        self.grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=device) if wanted.hidden else None
        # Rows beyond the shared vocabulary get no gradient; the rest is written, not added to, by the first rows.
        self.grad_weight = torch.empty(weight.shape, dtype=dtype, device=device) if wanted.weight else None
        self.grad_bias = torch.zeros(weight.shape[0], dtype=dtype, device=device) if wanted.bias else None
        self._taken = 0

    def scale_tile(self, largest: float) -> None:
        """Choose the power of two for float16 tiles, given about the largest entry that a gradient may have."""
        if any(self.wanted) and self.gradient_dtype != self.dtype and largest > 0 and math.isfinite(largest):
            self.tile_scale = 2.0 ** (TILE_EXPONENT - math.frexp(largest)[1])

    # --- Scratch ------------------------------------------------------------------------------------------------------

    @property
    def bytes_per_entry(self) -> int:
        """Scratch of one entry of a tile: the projection, and its gradient where that lies beside it."""
        beside = any(self.wanted) and self.gradient_dtype != self.dtype
        return self.dtype.itemsize + (self.gradient_dtype.itemsize if beside else 0)

    @property
    def bytes_per_row(self) -> int:
        """Scratch of one row beside the tile: its hidden state, in up to two dtypes, and their gradient."""
        return self.hidden.shape[1] * (2 + 2 * self.dtype.itemsize)

    @property
    def bytes_fixed(self) -> int:
        """Scratch that depends on neither: a slice of the head if it is converted, the bias."""
        converts = self._slice_rows(self.factor_dtype) < self.V
        converts |= any(self.wanted) and self._slice_rows(self.gradient_dtype) < self.V
        return SLICE_BYTES * converts + (0 if self.bias is None else self.bias.nbytes)

    def _slice_rows(self, dtype: torch.dtype) -> int:
        """Rows of the head to take into one product with factors of ``dtype``: all, unless they must be converted."""
        direct = dtype == self.dtype or gemm.takes_16_bit(self.weight.device, dtype)
        if self.weight.dtype == dtype and direct:
            return self.V
        itemsize = dtype.itemsize if direct else dtype.itemsize + self.dtype.itemsize
        if self.factor_dtype not in (dtype, self.weight.dtype):
            itemsize += self.factor_dtype.itemsize
        return min(self.V, max(1, SLICE_BYTES // (self.weight.shape[1] * itemsize)))

    # --- Forth and back -----------------------------------------------------------------------------------------------

    def take(self, rows: Rows) -> None:
        """Make these the present rows."""
        hidden = self.hidden[rows] if isinstance(rows, slice) else self.hidden.index_select(0, rows)
        self._rows = hidden.to(self.factor_dtype)
        if self.grad_hidden is not None:
            in_place = isinstance(rows, slice)
            self._grad_rows = self.grad_hidden[rows] if in_place else torch.empty_like(self._rows, dtype=self.dtype)
        self._taken += 1

    def project(self, columns: slice) -> Tensor:
        """Projections of the present rows to a range of the vocabulary: ``[n, width]`` of a reused buffer, rows
        padded.
        """
        n, width = self._rows.shape[0], columns.stop - columns.start
        if self._buffer.numel() < n * padded(width):  # the first tile is the largest
            self._buffer = torch.empty(n * padded(width), dtype=self.dtype, device=self.hidden.device)
        z = self._buffer[: n * padded(width)].view(n, padded(width))[:, :width]
        for part, weight in self._slices(columns, self.factor_dtype):
            gemm.multiply(self._rows, weight.T, out=_within(z, columns, part))
        return z

    def gradient_tile(self, z: Tensor) -> Tensor | None:
        """Where a kernel writes the gradient of the tile ``z``: over it, or beside it in 16 bits; None: not wanted."""
        if not any(self.wanted):
            return None
        if self.gradient_dtype == self.dtype:
            return z
        n, width = z.shape
        if self._gradient_buffer.numel() < n * padded(width):
            self._gradient_buffer = torch.empty(n * padded(width), dtype=self.gradient_dtype, device=z.device)
        return self._gradient_buffer[: n * padded(width)].view(n, padded(width))[:, :width]

    def accumulate(self, columns: slice, gradient: Tensor) -> None:
        """Add what flows back from one tile; ``gradient`` is ``tile_scale`` times the true one."""
        if self.grad_hidden is not None:
            for part, weight in self._slices(columns, self.gradient_dtype):
                g = _within(gradient, columns, part)
                gemm.multiply(g, weight, out=self._grad_rows, alpha=1.0 / self.tile_scale, add=part.start > 0)
        if self.grad_weight is not None:
            hidden, alpha = self._rows, 1.0 / self.tile_scale
            if hidden.dtype != self.gradient_dtype:
                hidden = (hidden * 2.0**HIDDEN_EXPONENT).to(self.gradient_dtype)
                alpha /= 2.0**HIDDEN_EXPONENT
            # A slice at a time where the product must convert the gradient.
            direct = self.gradient_dtype == self.dtype or gemm.takes_16_bit(gradient.device, self.gradient_dtype)
            for part in _ranges(columns, self.V if direct else self._slice_rows(self.gradient_dtype)):
                g, out = _within(gradient, columns, part), self.grad_weight[part]
                gemm.multiply(g.T, hidden, out=out, alpha=alpha, add=self._taken > 1)
        if self.grad_bias is not None:
            self.grad_bias[columns] += gradient.sum(0, dtype=self.dtype) / self.tile_scale

    def store(self, rows: Rows) -> None:
        """Put the gradient of the present rows where it belongs."""
        if self.grad_hidden is not None and not isinstance(rows, slice):
            self.grad_hidden.index_copy_(0, rows, self._grad_rows)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the hidden states, the weight and the bias, in ``dtype``; None where not wanted."""
        if self.grad_weight is not None:
            self.grad_weight[self.V if self._taken else 0 :].zero_()
        return self.grad_hidden, self.grad_weight, self.grad_bias

    def _slices(self, columns: slice, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for part in _ranges(columns, self._slice_rows(dtype)):
            # Through the dtype of the projection, so that the gradient is that of the logits that were made.
            yield part, self.weight[part].to(self.factor_dtype).to(dtype)


def _ranges(columns: slice, size: int) -> Iterator[slice]:
    for first in range(columns.start, columns.stop, size):
        yield slice(first, min(first + size, columns.stop))


def _within(tile: Tensor, columns: slice, part: slice) -> Tensor:
    """The columns ``part`` of the vocabulary in a tile that holds ``columns``."""
    return tile[:, part.start - columns.start : part.stop - columns.start]
