"""Which rows count, a chunk of them at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pocl_kernels.plan import counting_rows

Rows = Tensor | slice  # indices of some rows, or a range of them


class Chunks:
    """The rows that count, compacted, a chunk at a time.

    Waits once for the device if there are labels: how many rows count shapes the chunks. Without labels all count, and
    the kernels leave out those without weight; ``by_weight``: they need not.
    """

    def __init__(self, labels: Tensor | None, row_scale: Tensor, ignore_index: int, *, by_weight: bool = False) -> None:
        rows = self._rows = row_scale.shape[0]
        self._weights, self._weighed = row_scale, labels is not None or by_weight
        self._index: Tensor | None = None  # None: all rows
        if self._weighed:
            index = counting_rows(labels, ignore_index, row_scale)
            self._index = index if index.shape[0] < rows else None
        self.labels = None if labels is None else self.gather(labels).contiguous()
        self.count = rows if self._index is None else self._index.shape[0]

    def of(self, size: int, among: slice | None = None) -> Iterator[tuple[Rows, slice]]:
        """Chunks of at most ``size`` rows: where they lie among all rows, and where among the compacted ones."""
        among = slice(0, self.count) if among is None else among
        for first in range(among.start, among.stop, size):
            part = slice(first, min(first + size, among.stop))
            yield (part if self._index is None else self._index[part]), part

    @property
    def all(self) -> bool:
        """Whether every row counts."""
        return self._index is None

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

    def report(self, results: Tensor) -> Tensor:
        """Results ``[RESULTS, n]`` of the compacted rows among all, 0 for those without weight, be theirs infinite."""
        return self.scatter(results, 1) if self._weighed else torch.where(self._weights == 0, 0.0, results)


def within(x: Tensor, part: slice) -> Tensor:
    """Some rows of ``x``; itself, if they are all."""
    return x if part.start == 0 and part.stop == x.shape[0] else x[part]


def taken(x: Tensor, rows: Rows) -> Tensor:
    """Those rows of ``x``: of a range no copy is made."""
    return within(x, rows) if isinstance(rows, slice) else x.index_select(0, rows)
