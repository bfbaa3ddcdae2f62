"""Whole columns of a `Dataset` as Arrow arrays, without a Python object for every value."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pocl.data.mapped import MappedPages

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_SLICE = 8192  # rows that are looked at together, at most
_SLICE_BYTES = 32 << 20
_SLICES_KEPT = 2  # whose pages are given back together
_SPREAD = 8  # places between the first and the last of some rows, for each of them; beyond, they are no neighbours


def arrow_table(dataset: Dataset, columns: list[str] | None = None) -> pa.Table:
    """The rows of a data set, or some of their columns, in its order, as an Arrow table; copied only where selected."""
    table: Any = dataset.data.table
    if columns is not None:
        table = table.select(columns)
    indices = dataset._indices
    return table if indices is None else table.take(indices.column(0))


def values_of(dataset: Dataset, name: str) -> Iterator[Any]:
    """The values of a column as Python objects, a slice's at a time."""
    for table in slices(dataset, columns=[name]):
        yield from table.column(0).to_pylist()


def slices(dataset: Dataset, size: int | None = None, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a data set, or some of their columns, as tables of `size` neighbouring rows, in order.

    Of a data set that is mapped from a file, no more than a few slices are in memory at a time. Without a `size` they
    have some thousand rows, or fewer where rows are large.
    """
    pages = MappedPages(dataset.data.table)
    if size is None:
        size = max(1, min(_SLICE, _SLICE_BYTES * dataset.data.num_rows // max(1, dataset.data.nbytes)))
    for number, first in enumerate(range(0, len(dataset), size)):
        yield slice_of(dataset, first, size, columns)
        if number % _SLICES_KEPT == 0:
            pages.give_back()
    pages.give_back()


def slice_of(dataset: Dataset, first: int, count: int, columns: list[str] | None = None) -> pa.Table:
    """Some neighbouring rows of a data set; of one that was selected from another, no more than they is copied."""
    import pyarrow as pa

    table: Any = dataset.data if columns is None else dataset.data.select(columns)
    if dataset._indices is None:
        return table.table.slice(first, count)
    chosen = dataset._indices.column(0).slice(first, count).to_numpy().astype("int64")
    low, high = int(chosen.min()), int(chosen.max())
    if high - low > _SPREAD * len(chosen):  # shuffled
        return table.fast_gather(chosen)
    return table.table.slice(low, high - low + 1).combine_chunks().take(pa.array(chosen - low))


def write_parquet_table(dataset: Dataset, path: str | os.PathLike[str]) -> None:
    """Writes the rows of a data set as one Parquet file, a slice at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, dataset.features.arrow_schema) as writer:
        for table in slices(dataset):
            writer.write_table(table)


def arrow_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """One column of a data set, in its order."""
    return arrow_table(dataset, [name]).column(0)
