"""Whole columns of a `Dataset` as Arrow arrays, without a Python object for every value."""

from __future__ import annotations

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


def arrow_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """One column of a data set, in its order."""
    return arrow_table(dataset, [name]).column(0)
