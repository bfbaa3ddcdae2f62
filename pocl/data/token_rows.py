"""Token rows as a whole: what may be wrong with them, and what stands for their content.

A token row is a mapping with `sample_id`, `input_ids` and `labels`, the latter two of equal length. `labels[i]` is
`input_ids[i]`, or -100 where nothing is to be predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl.data.encoding import IGNORE_INDEX
from pocl.data.tables import slices

_CHUNK = 8192  # rows that are looked at together
_COLUMNS = ("sample_id", "input_ids", "labels")

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Extreme:
    """The largest of something over all rows, and the sample that has it."""

    value: int = -1
    sample_id: int = -1

    def or_larger(self, values: Numbers, sample_ids: Numbers) -> Extreme:
        place = int(values.argmax())
        return self if values[place] <= self.value else Extreme(int(values[place]), int(sample_ids[place]))


@dataclass(frozen=True)
class RowsSummary:
    """What a look at every row of a data set tells."""

    count: int
    longest: Extreme
    """Tokens of the longest row."""
    longest_prompt: Extreme
    """Tokens before the first one that is predicted, in the row that has most of them."""
    largest_id: Extreme
    """Over tokens and labels."""
    num_labels: int
    """Tokens that are predicted; the first of a row never is."""
    order: str
    """A hash of the sample ids in their order."""
    tokens: str
    """A hash of all token ids and the rows' lengths."""
    labels: str
    """A hash of all labels."""


def check_batch(rows: Sequence[Mapping[str, Any]]) -> None:
    """What every collator asks of the rows of a batch, whether it pads or packs.

    Raises:
        ValueError: no rows, a missing column, a row without tokens, labels or a mask of another length, or a mask with
            zeros; names the sample.
    """
    if not rows:
        raise ValueError("rows is empty; a batch needs at least one row")
    for number, row in enumerate(rows):
        tokens = len(row["input_ids"]) if all(column in row for column in _COLUMNS) else 0
        mask = row.get("attention_mask", ())
        if not tokens or len(row["labels"]) != tokens or (len(mask) and (len(mask) != tokens or 0 in mask)):
            _read([row], "batch", number)


def summarize(rows: Any, name: str = "rows") -> RowsSummary:
    """Look at every row once.

    Args:
        rows: a list of token rows, a `datasets.Dataset`, or anything with a length and row numbers.
        name: of the argument, for messages.

    Raises:
        ValueError: not such a thing, no rows, a missing column, a row without tokens or with lengths that differ,
            masked tokens, ids that are no integers or below 0, or labels that were shifted already; names the sample.
    """
    check_map_style(rows, name)
    order, tokens, labels = (hashlib.blake2b(digest_size=8) for _ in range(3))
    longest = longest_prompt = largest = Extreme()
    num_labels = equal = shifted = 0
    for chunk in chunks(rows, name):
        order.update(chunk.sample_ids.astype("<i8").tobytes())
        tokens.update(chunk.lengths.astype("<i8").tobytes())
        tokens.update(chunk.ids.astype("<i4").tobytes())
        labels.update(chunk.labels.astype("<i4").tobytes())
        starts = np.cumsum(chunk.lengths) - chunk.lengths
        longest = longest.or_larger(chunk.lengths, chunk.sample_ids)
        for values in (chunk.ids, chunk.labels):
            largest = largest.or_larger(np.maximum.reduceat(values, starts), chunk.sample_ids)
        predicted = chunk.labels != IGNORE_INDEX
        predicted[starts] = False
        first = np.where(predicted, np.arange(len(predicted)), len(predicted))
        prompts = np.minimum.reduceat(first, starts) - starts
        longest_prompt = longest_prompt.or_larger(np.where(prompts >= chunk.lengths, 0, prompts), chunk.sample_ids)
        num_labels += int(predicted.sum())
        equal += int((predicted & (chunk.labels == chunk.ids)).sum())
        shifted += int((predicted[:-1] & (chunk.labels[:-1] == chunk.ids[1:])).sum())
    # random rows repeat a token now and then; only rows that are shifted throughout match their successors so often
    if equal < 0.5 * num_labels < 0.8 * num_labels < shifted:
        raise ValueError(
            f"{name}: the labels are those of the next token, shifted already; give labels[i] = input_ids[i], or -100, "
            "and they are shifted here"
        )
    digests = [digest.hexdigest() for digest in (order, tokens, labels)]
    return RowsSummary(len(rows), longest, longest_prompt, largest, num_labels, *digests)


def check_map_style(rows: Any, name: str) -> None:
    """Refuse what has no row numbers.

    Raises:
        ValueError: a stream, several splits, no rows, or something else.
    """
    kind = type(rows).__name__
    if isinstance(rows, Mapping):
        raise ValueError(f"{name} is a {kind} of {', '.join(map(str, rows))}; pass one of them, {name}[...]")
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")) or isinstance(rows, str):
        raise ValueError(
            f"{name} must be a list of token rows or a data set with row numbers, as pocl.data.tokenize makes, got a "
            f"{kind}; stages choose rows by number, so gather a stream first: list({name}), or Dataset.from_generator"
        )
    if len(rows) == 0:
        raise ValueError(f"{name} has no rows")


@dataclass(frozen=True)
class Chunk:
    """Some rows behind one another."""

    sample_ids: Numbers
    lengths: Numbers
    ids: Numbers
    labels: Numbers


def is_table(rows: Any) -> bool:
    """Whether rows are a `datasets.Dataset` whose values are those of its Arrow table."""
    form = getattr(rows, "format", None)
    return hasattr(rows, "with_format") and isinstance(form, Mapping) and form.get("type") != "custom"


def chunks(rows: Any, name: str) -> Iterator[Chunk]:
    """The rows, some thousand at a time; see `summarize` for the arguments and errors."""
    if is_table(rows):
        _check_columns(rows.column_names, name)
        columns = [c for c in (*_COLUMNS, "attention_mask") if c in rows.column_names]
        start = 0
        for table in slices(rows, _CHUNK, columns):
            yield _from_arrow(table, name) or _read(table.to_pylist(), name, start)
            start += len(table)
        return
    for start in range(0, len(rows), _CHUNK):
        yield _read([rows[i] for i in range(start, min(start + _CHUNK, len(rows)))], name, start)


def row_lengths(rows: Any) -> Numbers:
    """Tokens of each row."""
    if not is_table(rows):
        return np.array([len(rows[i]["input_ids"]) for i in range(len(rows))], dtype=np.int64)
    import pyarrow.compute as pc

    tables = slices(rows, columns=["input_ids"])
    return np.concatenate([pc.list_value_length(table.column(0)).to_numpy() for table in tables]).astype(np.int64)


def _from_arrow(table: Any, name: str) -> Chunk | None:
    """The rows of a table without a Python object each, or None if something about them is unusual."""
    import pyarrow as pa
    import pyarrow.compute as pc

    flat: dict[str, Numbers] = {}
    lengths: dict[str, Numbers] = {}
    for column in table.column_names:
        array = table.column(column).combine_chunks()
        if column != "sample_id":
            if array.null_count or not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
                return None
            lengths[column] = np.asarray(pc.list_value_length(array), dtype=np.int64)
            array = array.flatten()
        if array.null_count or not pa.types.is_integer(array.type):
            return None
        flat[column] = np.asarray(array, dtype=np.int64)
    count = lengths["input_ids"]
    usual = count.min() > 0 and all(np.array_equal(count, other) for other in lengths.values())
    if (
        not usual
        or not _ids_are_valid(flat["input_ids"], flat["labels"])
        or not flat.get("attention_mask", count).all()
    ):
        return None
    return Chunk(flat["sample_id"], count, flat["input_ids"], flat["labels"])


def _read(rows: Sequence[Any], name: str, start: int) -> Chunk:
    """Rows one by one; whatever is wrong with one is told here, in words."""
    sample_ids, parts, of_labels = [], [], []
    for number, row in enumerate(rows, start):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{name}: row {number} is a {type(row).__name__}; a row is a dict with {_listed(_COLUMNS)}"
            )
        _check_columns(list(row), name)
        try:
            sample_ids.append(int(row["sample_id"]))
        except (TypeError, ValueError):
            raise ValueError(
                f"{name}: sample_id of row {number} is {row['sample_id']!r}; it must be a number"
            ) from None
        where = f"{name}: row {number} (sample_id {sample_ids[-1]})"
        ids, labels = _integers(row["input_ids"], f"{where}: input_ids"), _integers(row["labels"], f"{where}: labels")
        if not len(ids):
            raise ValueError(f"{where} has no tokens; leave it out")
        if len(ids) != len(labels):
            raise ValueError(
                f"{where} has {len(ids)} input_ids and {len(labels)} labels; give one label a token, "
                f"{IGNORE_INDEX} where nothing is to be predicted"
            )
        if (mask := row.get("attention_mask")) is not None:
            mask = _integers(mask, f"{where}: attention_mask")
            if len(mask) != len(ids) or not mask.all():
                raise ValueError(
                    f"{where} has {len(ids)} input_ids and an attention_mask of {len(mask)} with "
                    f"{int((mask == 0).sum())} zeros; give rows without padding, which the collator adds: leave out "
                    "tokens whose mask is 0"
                )
        if not _ids_are_valid(ids, labels):
            raise ValueError(
                f"{where} has the token ids {ids.min()} to {ids.max()} and labels down to {labels.min()}; ids are not "
                f"negative, and only the label {IGNORE_INDEX} is"
            )
        parts.append(ids)
        of_labels.append(labels)
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return Chunk(np.array(sample_ids, dtype=np.int64), lengths, np.concatenate(parts), np.concatenate(of_labels))


def _ids_are_valid(ids: Numbers, labels: Numbers) -> bool:
    return bool(ids.min() >= 0 and ((labels >= 0) | (labels == IGNORE_INDEX)).all())


def _integers(values: Any, what: str) -> Numbers:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # ragged, or a tensor that numpy cannot see
        array = np.empty(0, dtype=object)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise ValueError(f"{what} must be a list of integers, got {str(values)[:60]}")
    return array.astype(np.int64)


def _check_columns(columns: Sequence[str], name: str) -> None:
    missing = [column for column in _COLUMNS if column not in columns]
    if missing:
        raise ValueError(
            f"{name} lacks {_listed(missing)} (it has {_listed(columns)}); token rows are what pocl.data.tokenize "
            "makes, and sample_id is any number that names the row"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(str, names)) or "nothing"
