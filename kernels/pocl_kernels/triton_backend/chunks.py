"""Which rows count, and how many rows and columns the workspace holds at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pocl_kernels.plan import counting_rows
from pocl_kernels.triton_backend.projection import Projection, Rows, padded

MAX_CHUNK_ROWS = 8192
WHOLE_TILES = 128  # rows or columns of a GEMM's tile: what is larger is cut to a multiple


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

    def of(self, size: int) -> Iterator[tuple[Rows, slice]]:
        """Chunks of at most ``size`` rows: where they lie among all rows, and where among the compacted ones."""
        for first in range(0, self.count, size):
            part = slice(first, min(first + size, self.count))
            yield (part if self._index is None else self._index[part]), part

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


def scaled_weights(student: Projection, row_scale: Tensor, coefficient: float) -> Tensor:
    """``row_scale`` as the kernels take it: times the power of two that suits a float16 gradient tile.

    ``coefficient`` is about the largest entry of a gradient for a weight of 1. Waits for the device if the tile is
    float16.
    """
    if student.gradient_dtype == torch.float16 and any(student.wanted) and row_scale.numel():
        student.scale_tile(coefficient * float(row_scale.abs().max()))
    return (row_scale * student.tile_scale).to(student.dtype).contiguous()


def chunk_rows(rows: int, projections: Sequence[Projection], workspace_mb: float) -> int:
    """Rows of a chunk with the whole vocabulary: as many as the workspace holds, evened out, in whole GEMM tiles."""
    free = int(workspace_mb * 2**20) - sum(p.bytes_fixed for p in projections)
    per_row = sum(padded(p.V) * p.bytes_per_entry + p.bytes_per_row for p in projections)
    most = max(1, min(free // per_row, MAX_CHUNK_ROWS))
    if most >= rows:
        return max(1, rows)
    size = -(-rows // -(-rows // most))
    return min(-(-size // WHOLE_TILES) * WHOLE_TILES, most) if most >= WHOLE_TILES else size


def tile_shape(rows: int, projections: Sequence[Projection], workspace_mb: float) -> tuple[int, int]:
    """Rows and columns of one tile: as square as the workspace allows.

    Every tile adds to the hidden states' gradient once for its columns and to the weight's once for its rows, so that
    the traffic beside the GEMMs is in proportion to 1 / rows + 1 / columns.
    """
    V, rows = min(p.V for p in projections), max(1, rows)
    free = int(workspace_mb * 2**20) - sum(p.bytes_fixed for p in projections)
    per_row, per_entry = sum(p.bytes_per_row for p in projections), sum(p.bytes_per_entry for p in projections)
    best, traffic = (min(rows, WHOLE_TILES), min(V, WHOLE_TILES)), float("inf")
    for height in (min(rows, MAX_CHUNK_ROWS), *range(WHOLE_TILES, min(rows, MAX_CHUNK_ROWS), WHOLE_TILES)):
        width = (free - height * per_row) // (height * per_entry) // WHOLE_TILES * WHOLE_TILES
        width = V if width >= V else width
        if width > 0 and 1 / height + 1 / width < traffic:
            best, traffic = (height, width), 1 / height + 1 / width
    return best


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return nullcontext() if tensor.device.type == "cpu" else torch.cuda.device(tensor.device)
