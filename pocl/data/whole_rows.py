"""Rows of a source with all their columns, kept as Parquet for those who read what the ranking says of them.

A column keeps its type where Arrow gives back every value of it as it was. One that mixes numbers with text becomes
text, as does one whose values Arrow would change, such as turns of which only some have tool calls: its lists and dicts
become JSON text, which `load_examples` reads as the values themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pocl.data.files import BATCH
from pocl.data.sources import Rows, TableRows
from pocl.data.tables import write_parquet_table


def write_whole_rows(rows: Rows, ids: Sequence[int], path: str | os.PathLike[str]) -> list[str]:
    """Writes the rows `ids` (positions in the source) as one Parquet file.

    Returns:
        The columns that Parquet has no form for, which are left out.
    """
    if isinstance(rows, TableRows) and hasattr(rows.table, "select"):
        chosen = rows.table.select(ids)
        kept = storable(chosen)
        write_parquet_table(kept, path)
        return [name for name in chosen.column_names if name not in kept.column_names]
    types: dict[str, pa.DataType | None] = {}
    for batch in _chosen(rows, ids):
        for name in dict.fromkeys(name for row in batch for name in row):
            types[name] = _common(types.get(name, pa.null()), _type_of([row.get(name) for row in batch]))
    schema = pa.schema([(name, pa.string() if kind is None else kind) for name, kind in types.items()])
    with pq.ParquetWriter(Path(path), schema) as writer:
        for batch in _chosen(rows, ids):
            arrays = []
            for name, kind in types.items():
                values = [row.get(name) for row in batch]
                arrays.append(
                    pa.array(values if kind is not None else [_text(v) for v in values], schema.field(name).type)
                )
            writer.write_table(pa.table(arrays, schema=schema))
    return []


def storable(table: Any) -> Any:
    """A `Dataset` without the columns that Parquet has no form for: those that hold an empty dict in every row."""

    schema = table.features.arrow_schema
    return table.remove_columns([field.name for field in schema if not _has_form(field.type)])


def _has_form(kind: pa.DataType) -> bool:
    fields = [kind.field(i).type for i in range(kind.num_fields)]
    return all(map(_has_form, fields)) and not (pa.types.is_struct(kind) and not fields)


def _chosen(rows: Rows, ids: Sequence[int]) -> Iterator[list[Any]]:
    def wanted() -> Iterator[Any]:
        left = iter(ids)
        following, start = next(left, None), 0
        for _, batch in rows.batches():
            while following is not None and following < start + len(batch):
                yield batch[following - start]
                following = next(left, None)
            start += len(batch)
            if following is None:
                return

    found = wanted()
    while batch := list(islice(found, BATCH)):
        yield batch


def _text(value: Any) -> str | None:
    """A value as text that is read as the same value again."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | tuple) else str(value)


def _type_of(values: list[Any]) -> pa.DataType | None:
    """The Arrow type that holds these values as they are; None where there is none, and they must be text."""
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return pa.null()
    if kinds == {int, float}:
        return pa.float64()
    if kinds <= {str, bool, int, float} and len(kinds) > 1:
        return None
    try:
        made = pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return None
    if kinds <= {str, bool, int, float}:
        return made.type
    kept = _has_form(made.type) and not any(map(_holds_null, values)) and _same(made.to_pylist(), values)
    return made.type if kept else None


def _holds_null(value: Any) -> bool:
    """Whether a dict in a value has a null that would be taken for Arrow's filling; a turn without text has none."""
    if isinstance(value, dict):
        return any(v is None and key not in ("content", "value") for key, v in value.items()) or any(
            map(_holds_null, value.values())
        )
    return isinstance(value, list | tuple) and any(map(_holds_null, value))


def _same(first: Any, second: Any) -> bool:
    """Equal in value and in type (to Python, 1, 1.0 and True are equal)."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return type(first) is type(second) and bool(first == second)


def _common(first: pa.DataType | None, second: pa.DataType | None, *, inside: bool = False) -> pa.DataType | None:
    """One type for both where one knows what the other has seen null or nothing of; None where they differ in more."""
    if first is None or second is None:
        return None
    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    if {first, second} == {pa.int64(), pa.float64()} and not inside:  # inside a tool call, 1 must not become 1.0
        return pa.float64()
    if pa.types.is_list(first) and pa.types.is_list(second):
        inner = _common(first.value_type, second.value_type, inside=True)
        return None if inner is None else pa.list_(inner)
    if not (pa.types.is_struct(first) and pa.types.is_struct(second)):
        return None
    names = [field.name for field in first]
    if set(names) != {field.name for field in second}:
        return None
    inners = {name: _common(first.field(name).type, second.field(name).type, inside=True) for name in names}
    return None if None in inners.values() else pa.struct(list(inners.items()))
