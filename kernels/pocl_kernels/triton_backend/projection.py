"""One head applied to tiles of rows and vocabulary, and the gradients that flow back: the vendor's GEMMs, reused
buffers.

Precision. Logits are float32 whatever the models are. With 16-bit models the gradient's tile is float16 too, so that
its products run at the 16-bit rate: not bf16, whose 8 digits would cost 1.6e-3 of relative error, as much as rounding
the result once more. float16 has 11 digits (2e-4), and its narrow range does no harm because the tile is multiplied by
a power of two that brings the heaviest row's largest possible entry to about 2^6: entries down to 2^-30 of it keep a
value, and the kernels cut those above 2^10 times it at float16's end. Weights and hidden states in bf16 are converted;
their 8 digits fit. Weights must stay below 65504 in size, hidden states below a million: beyond, the gradient is
infinite, never silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pocl_kernels.chunks import Rows
from pocl_kernels.plan import Gradients
from pocl_kernels.triton_backend import gemm
from pocl_kernels.triton_backend.later import WeightGradient
from pocl_kernels.triton_backend.layout import Layout, conversions, demand, factor_dtypes, padded, slice_rows

TILE_EXPONENT = 6  # of the largest entry to expect in a float16 gradient tile; float16 ends at 2^16
HIDDEN_EXPONENT = -4  # of the factor on bf16 hidden states in float16

Grads = tuple[Tensor | None, Tensor | Callable[[Tensor | None], Tensor] | None, Tensor | None]


class Projection:
    """``hidden @ weight[:V].T`` in ``dtype`` (float32 or float64) and the way back, for some rows at a time.

    ``take`` the rows; then for each range of the vocabulary ``project`` and, after a kernel has written the gradient of
    the projection, ``accumulate``; then ``store``. Between ``begin`` and ``end`` the gradient tiles of all rows are
    kept, and the weight's gradient is made at the end. Gradients (those in ``wanted``) have ``dtype``, whatever the
    inputs have.
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
        half = products or hidden.dtype
        sixteen_bit = half.itemsize != 2 or all(gemm.takes_16_bit(hidden.device, x) for x in {half, torch.float16})
        factors = factor_dtypes(hidden.dtype, weight.dtype, dtype, products, sixteen_bit)
        self.factor_dtype, self.gradient_dtype = factors
        self.demand = demand(hidden.shape[1], V, weight.dtype, dtype, factors, wanted, bias is not None)
        self.tile_scale = 1.0
        self.bias = None
        if bias is not None:
            self.bias = torch.zeros(padded(V), dtype=dtype, device=hidden.device)
            self.bias[:V] = bias[:V]
        self._buffers: dict[str, Tensor] = {}
        self._whole: dict[torch.dtype, Tensor] = {}
        self._rows = self._kept_hidden = self._grad_rows = hidden[:0]
        self._kept: Tensor | None = None
        self._kept_rows = 0
        self.grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if wanted.hidden else None
        self.grad_weight: Tensor | WeightGradient | None = None
        self.grad_bias = torch.zeros(weight.shape[0], dtype=dtype, device=hidden.device) if wanted.bias else None
        self._later = False
        self._products_of_weight = 0

    def scale_tile(self, largest: float) -> None:
        """Choose the power of two for float16 tiles, given about the largest entry that a gradient may have."""
        if any(self.wanted) and self.gradient_dtype != self.dtype and largest > 0 and math.isfinite(largest):
            self.tile_scale = 2.0 ** (TILE_EXPONENT - math.frexp(largest)[1])

    # --- Scratch ------------------------------------------------------------------------------------------------------

    def allocate(self, layout: Layout, rows: int, *, later: bool) -> None:
        """Make what ``memory="fast"`` needs for chunks and groups of this size, and for nothing else, at once.

        Raises:
            torch.OutOfMemoryError: nothing of it is kept then.
        """
        self.release()
        width = padded(self.V)
        self._buffer("logits", layout.chunk * width, self.dtype)
        if self.demand.kept:
            tiles = self._buffer("gradient", layout.group * width, self.gradient_dtype)
            self._kept = tiles.view(layout.group, width) if self.wanted.weight else None
        # One product over all rows is made when the upstream gradient is known.
        self._later = later and self._kept is not None and layout.group >= rows
        if layout.whole_heads:
            for dtype in conversions(self.weight.dtype, self.factor_dtype, self.gradient_dtype, self.wanted):
                source = self._whole.get(self.factor_dtype, self.weight)
                self._whole[dtype] = torch.empty(self.V, self.weight.shape[1], dtype=dtype, device=self.weight.device)
                self._whole[dtype].copy_(source[: self.V])

    def release(self) -> None:
        """Give back what :meth:`allocate` made."""
        self._buffers, self._whole, self._kept = {}, {}, None

    def _buffer(self, name: str, entries: int, dtype: torch.dtype) -> Tensor:
        """Reused memory: a larger wish makes it anew."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < entries:
            self._buffers[name] = buffer = torch.empty(entries, dtype=dtype, device=self.hidden.device)
        return buffer[:entries]

    # --- Forth and back -----------------------------------------------------------------------------------------------

    def begin(self, rows: Rows) -> None:
        """From now on keep the gradient tiles of these rows, where there is room for them."""
        if self._kept is not None:
            self._kept_hidden, self._kept_rows = self._hidden_for_weight(self._of(rows)), 0

    def take(self, rows: Rows) -> None:
        """Make these the present rows."""
        self._rows = self._of(rows).to(self.factor_dtype)
        if self.grad_hidden is not None:
            in_place = isinstance(rows, slice)
            self._grad_rows = self.grad_hidden[rows] if in_place else torch.empty_like(self._rows, dtype=self.dtype)

    def project(self, columns: slice) -> Tensor:
        """Projections of the present rows to a range of the vocabulary: ``[n, width]`` of a reused buffer, rows
        padded.
        """
        z = self._tile("logits", self._rows.shape[0], columns.stop - columns.start, self.dtype)
        for part, weight in self._slices(columns, self.factor_dtype):
            gemm.multiply(self._rows, weight.T, out=_within(z, columns, part))
        return z

    def gradient_tile(self, z: Tensor) -> Tensor | None:
        """Where a kernel writes the gradient of the tile ``z``: over it, or beside it in 16 bits; None: not wanted."""
        if not any(self.wanted):
            return None
        if self.gradient_dtype == self.dtype:
            return z
        if self._kept is None:
            return self._tile("gradient", z.shape[0], z.shape[1], self.gradient_dtype)
        return self._kept[self._kept_rows : self._kept_rows + z.shape[0], : self.V]

    def accumulate(self, columns: slice, gradient: Tensor) -> None:
        """Add what flows back from one tile; ``gradient`` is ``tile_scale`` times the true one."""
        if self.grad_hidden is not None:
            for part, weight in self._slices(columns, self.gradient_dtype):
                g = _within(gradient, columns, part)
                gemm.multiply(g, weight, out=self._grad_rows, alpha=1.0 / self.tile_scale, add=part.start > 0)
        if self._kept is not None:
            self._kept_rows += gradient.shape[0]
        else:
            hidden = self._hidden_for_weight(self._rows) if self.wanted.weight else self._rows
            self._to_weight(columns, gradient, hidden)

    def store(self, rows: Rows) -> None:
        """Put the gradient of the present rows where it belongs."""
        if self.grad_hidden is not None and not isinstance(rows, slice):
            self.grad_hidden.index_copy_(0, rows, self._grad_rows)
        self._products_of_weight += self._kept is None

    def end(self) -> None:
        """Make the weight's share of the tiles that were kept."""
        if self._kept is not None:
            self._to_weight(slice(0, self.V), self._kept[: self._kept_rows, : self.V], self._kept_hidden)
            self._products_of_weight += 1

    def gradients(self) -> Grads:
        """Of the hidden states, the weight and the bias, in ``dtype``; None where not wanted."""
        if self.wanted.weight and self.grad_weight is None:
            self.grad_weight = self._empty_weight()
        if isinstance(self.grad_weight, Tensor):
            self.grad_weight[self.V if self._products_of_weight else 0 :].zero_()
        return self.grad_hidden, self.grad_weight, self.grad_bias

    def _of(self, rows: Rows) -> Tensor:
        return self.hidden[rows] if isinstance(rows, slice) else self.hidden.index_select(0, rows)

    def _hidden_for_weight(self, hidden: Tensor) -> Tensor:
        """Hidden states as a factor of the weight's gradient: those in bf16 scaled to float16."""
        hidden = hidden.to(self.factor_dtype)
        if hidden.dtype == self.gradient_dtype:
            return hidden
        return (hidden * 2.0**HIDDEN_EXPONENT).to(self.gradient_dtype)

    def _to_weight(self, columns: slice, gradient: Tensor, hidden: Tensor) -> None:
        if self.grad_bias is not None:
            self.grad_bias[columns] += gradient.sum(0, dtype=self.dtype) / self.tile_scale
        if not self.wanted.weight:
            return
        alpha = 1.0 / self.tile_scale
        if self.factor_dtype != self.gradient_dtype:
            alpha /= 2.0**HIDDEN_EXPONENT
        if self._later:
            self.grad_weight = WeightGradient(gradient, hidden, alpha, self.weight.shape, self.weight.dtype)
            return
        if self.grad_weight is None:  # written, not added to, by the first rows
            self.grad_weight = self._empty_weight()
        assert isinstance(self.grad_weight, Tensor)
        gemm.multiply(gradient.T, hidden, out=self.grad_weight[columns], alpha=alpha, add=self._products_of_weight > 0)

    def _empty_weight(self) -> Tensor:
        return torch.empty(self.weight.shape, dtype=self.dtype, device=self.weight.device)

    def _tile(self, name: str, n: int, width: int, dtype: torch.dtype) -> Tensor:
        return self._buffer(name, n * padded(width), dtype).view(n, padded(width))[:, :width]

    def _slices(self, columns: slice, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The head in one dtype: as it is, converted as a whole, or converted slice by slice."""
        head = self.weight if self.weight.dtype == dtype else self._whole.get(dtype)
        if head is not None:
            yield columns, head[columns]
            return
        # Through the dtype of the projection, so that the gradient is that of the logits that were made.
        stages = [x for x in dict.fromkeys((self.factor_dtype, dtype)) if x != self.weight.dtype]
        size = slice_rows(self.V, self.weight.shape[1], sum(x.itemsize for x in stages))
        for first in range(columns.start, columns.stop, size):
            part = slice(first, min(first + size, columns.stop))
            weight = self.weight[part]
            for stage in stages:
                weight = self._buffer(f"slice {stage}", weight.numel(), stage).view_as(weight).copy_(weight)
            yield part, weight


def _within(tile: Tensor, columns: slice, part: slice) -> Tensor:
    """The columns ``part`` of the vocabulary in a tile that holds ``columns``."""
    return tile[:, part.start - columns.start : part.stop - columns.start]
