"""Rows of a source with all their columns, kept as Parquet for those who read what the ranking says of them.

A column keeps its type where Arrow gives back every value of it as it was. One that mixes numbers with text becomes
text. One whose values Arrow would change, such as turns of which only some have tool calls, becomes JSON text, which
`load_examples` reads as the values themselves.
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
from pocl.data.turns import text_of

_TEXT = "text"
_JSON = "json"


def write_whole_rows(rows: Rows, ids: Sequence[int], path: str | os.PathLike[str]) -> list[str]:
    """Writes the rows `ids` (positions in the source) as one Parquet file.

    Returns:
        The columns that Parquet has no form for, which are left out.
    """
    if isinstance(rows, TableRows) and hasattr(rows.table, "select"):
        chosen = rows.table.select(ids)
        kept = storable(chosen)
        kept.to_parquet(path)
        return [name for name in chosen.column_names if name not in kept.column_names]
    forms: dict[str, Any] = {}
    for batch in _chosen(rows, ids):
        for name in dict.fromkeys(name for row in batch for name in row):
            forms[name] = _joined(forms.get(name, pa.null()), _form([row.get(name) for row in batch]))
    schema = pa.schema([(name, pa.string() if form in (_TEXT, _JSON) else form) for name, form in forms.items()])
    with pq.ParquetWriter(Path(path), schema) as writer:
        for batch in _chosen(rows, ids):
            arrays = [_array([row.get(name) for row in batch], form) for name, form in forms.items()]
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


def _form(values: list[Any]) -> Any:
    """The Arrow type that holds these values as they are, `_TEXT` or `_JSON`."""
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return pa.null()
    if kinds <= {str, bool, int, float}:
        if len(kinds) > 1 and kinds != {int, float}:
            return _TEXT
        kinds -= {int} if len(kinds) > 1 else set()
        if kinds == {int} and not all(value is None or -(2**63) <= value < 2**63 for value in values):
            return _TEXT
        return {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}[kinds.pop()]
    try:
        made = pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return _JSON
    return made.type if _has_form(made.type) and _same(made.to_pylist(), values) else _JSON


def _same(first: Any, second: Any) -> bool:
    """Equal in value and in type (to Python, 1, 1.0 and True are equal)."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return type(first) is type(second) and bool(first == second)


def _joined(first: Any, second: Any) -> Any:
    """The type for both, as long as no value is changed by it."""
    if first == second or (not isinstance(second, str) and pa.types.is_null(second)):
        return first
    if not isinstance(first, str) and pa.types.is_null(first):
        return second
    scalar = [form == _TEXT or (form != _JSON and not pa.types.is_nested(form)) for form in (first, second)]
    if all(scalar):
        numbers = {pa.int64(), pa.float64()}
        return pa.float64() if {first, second} == numbers else _TEXT
    if _JSON in (first, second):
        return _JSON
    return _nested(first, second) or _JSON


def _nested(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """One type for both where one knows what the other has seen null or nothing of; None where they differ in more."""
    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    if pa.types.is_list(first) and pa.types.is_list(second):
        inner = _nested(first.value_type, second.value_type)
        return None if inner is None else pa.list_(inner)
    if not (pa.types.is_struct(first) and pa.types.is_struct(second)):
        return None
    names = [field.name for field in first]
    if set(names) != {field.name for field in second}:
        return None
    inners = {name: _nested(first.field(name).type, second.field(name).type) for name in names}
    return None if None in inners.values() else pa.struct(list(inners.items()))


def _array(values: list[Any], form: Any) -> pa.Array:
    if form == _TEXT:
        return pa.array([None if value is None else text_of(value, "a value") for value in values], pa.string())
    if form == _JSON:
        texts = [None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in values]
        return pa.array(texts, pa.string())
    return pa.array(values, form)
