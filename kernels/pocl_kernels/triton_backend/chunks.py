"""Which rows count, and the memory for a chunk of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pocl_kernels.plan import counting_rows
from pocl_kernels.triton_backend.layout import MIB, Layout, fast_layout
from pocl_kernels.triton_backend.projection import Projection, Rows

LEAST_WORKSPACE = 16 * MIB  # below, memory is too short for anything


class Chunks:
    """The rows that count, compacted, a chunk at a time.

    Waits once for the device if there are labels: how many rows count shapes the chunks. Without labels all count, and
    the kernels leave out those without weight.
    """

    def __init__(self, labels: Tensor | None, row_scale: Tensor, ignore_index: int) -> None:
        rows = self._rows = row_scale.shape[0]
        self._index: Tensor | None = None  # None: all rows
        if labels is not None:
            index = counting_rows(labels, ignore_index, row_scale)
            self._index = index if len(index) < rows else None
        self.labels = None if labels is None else self.gather(labels).contiguous()
        self.count = rows if self._index is None else len(self._index)

    def of(self, size: int, among: slice | None = None) -> Iterator[tuple[Rows, slice]]:
        """Chunks of at most ``size`` rows: where they lie among all rows, and where among the compacted ones."""
        among = slice(0, self.count) if among is None else among
        for first in range(among.start, among.stop, size):
            part = slice(first, min(first + size, among.stop))
            yield (part if self._index is None else self._index[part]), part

    @property
    def index(self) -> Rows:
        """Where the rows that count lie among all."""
        return slice(None) if self._index is None else self._index

    def gather(self, full: Tensor, dim: int = 0) -> Tensor:
        """The rows that count of a tensor that has all."""
        return full if self._index is None else full.index_select(dim, self._index)

    def scatter(self, compact: Tensor, dim: int = 0) -> Tensor:
        """A tensor of the compacted rows among all rows, 0 elsewhere."""
        if self._index is None:
            return compact
        shape = list(compact.shape)
        shape[dim] = self._rows
        return compact.new_zeros(shape).index_copy_(dim, self._index, compact)


def scaled_weights(student: Projection, row_scale: Tensor, coefficient: Any) -> Tensor:
    """``row_scale`` as the kernels take it: times the power of two that suits a float16 gradient tile.

    ``coefficient`` is about the largest entry of a gradient for a weight of 1. Waits for the device if the tile is
    float16.
    """
    if student.gradient_dtype == torch.float16 and any(student.wanted) and row_scale.numel():
        student.scale_tile(float((coefficient * row_scale.abs()).max()))
    return (row_scale * student.tile_scale).to(student.dtype).contiguous()


def allocated(projections: Sequence[Projection], rows: int, workspace_mb: float, *, later: bool) -> Layout:
    """The memory of ``memory="fast"``, made; with a warning less of it, if so much is not free."""
    workspace = int(workspace_mb * MIB)
    while True:
        layout = fast_layout(rows, [p.demand for p in projections], workspace, later=later)
        try:
            for projection in projections:
                projection.allocate(layout, rows, later=later)
        except torch.OutOfMemoryError:
            if workspace <= LEAST_WORKSPACE:
                raise
            for projection in projections:
                projection.release()
            workspace //= 2
            continue
        if workspace < int(workspace_mb * MIB):
            warnings.warn(
                f"a workspace of {workspace_mb:,.0f} MiB is more than is free on {projections[0].hidden.device}: "
                f"{workspace / MIB:,.0f} MiB serve, in chunks of {layout.chunk} rows. Pass a smaller workspace_mb",
                RuntimeWarning,
                stacklevel=2,
            )
        return layout


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return nullcontext() if tensor.device.type == "cpu" else torch.cuda.device(tensor.device)
