"""Whole columns of a `Dataset` as Arrow arrays, without a Python object for every value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


def arrow_table(dataset: Dataset, columns: list[str] | None = None) -> pa.Table:
    """The rows of a data set, or some of their columns, in its order, as an Arrow table; copied only where selected."""
    table: Any = dataset.data.table
    if columns is not None:
        table = table.select(columns)
    indices = dataset._indices
    return table if indices is None else table.take(indices.column(0))


def values_of(dataset: Dataset, name: str, size: int = 8192) -> Iterator[Any]:
    """The values of a column as Python objects, no more than `size` of them at a time."""
    for first in range(0, len(dataset), size):
        yield from slice_of(dataset, first, size).column(name).to_pylist()


def slice_of(dataset: Dataset, first: int, count: int) -> pa.Table:
    """Some neighbouring rows of a data set; of one that was selected from another, no more than they is copied."""
    import pyarrow as pa

    table: Any = dataset.data.table
    if dataset._indices is None:
        return table.slice(first, count)
    chosen = dataset._indices.column(0).slice(first, count).to_numpy()
    low, high = int(chosen.min()), int(chosen.max())  # neighbours mostly, so what lies between is small
    return table.slice(low, high - low + 1).combine_chunks().take(pa.array(chosen - low))


def arrow_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """One column of a data set, in its order."""
    return arrow_table(dataset, [name]).column(0)
