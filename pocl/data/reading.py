"""Examples from the hub, from files and from memory, in one table: prompt, answer, and what conversation they are."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl.data.files import BATCH, Place
from pocl.data.forms import Example, ReadReport, RowReader
from pocl.data.refusals import needed
from pocl.data.sources import Rows, open_rows
from pocl.data.turns import RowError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

# Tables up to this size stay in memory; larger ones lie in a file that is mapped into memory.
_IN_MEMORY = 128 << 20  # bytes


def load_examples(
    source: Any,
    *,
    split: str = "train",
    limit: int | None = None,
    trust_remote_code: bool = False,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Reads prompts with answers, conversations, or the texts of a corpus; `docs/data.md` lists the forms of rows.

    Args:
        source: a hub id, a file (.jsonl, .json, .csv, .txt, each also with .gz or .zst, .parquet, .arrow), a folder of
            such files or one written by `Dataset.save_to_disk`, a `Dataset`, or a sequence of dicts.
        split: the split to take where the source has several; a single file has only `train`.
        limit: at most this many examples, from the start.
        trust_remote_code: refused by the hub loader of today; passed on only when true.
        streaming: read as the rows are asked for, for data that neither memory nor disk could hold.

    Returns:
        A `Dataset` (an `IterableDataset` when streaming) with `id` (int64, the position in the source) and the strings
        `prompt` and `response`: what comes before the answer, and the answer, as plain text. `instruction` and `input`
        are null but in rows of the Alpaca form that have nothing beside. `conversation` is null where prompt and
        response say all, else the JSON of a `pocl.data.Conversation`; `pocl.data.conversation_of` gives it for every
        row. Rows of a corpus have a `text`, and empty `prompt` and `response`.

    Raises:
        ValueError: unknown form or file type, missing path, empty or damaged data (says where), a row that cannot be
            read (says which, and why), `limit < 1`.
    """
    _check_limit(limit)
    rows = open_rows(source, split, trust_remote_code=trust_remote_code, streaming=streaming)
    if streaming:
        return _stream(rows, limit)
    found, report = to_examples(rows, limit=limit)
    logger.info("%s: %s", rows.name, report)
    return found


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out to take every example")


def to_examples(rows: Rows, *, limit: int | None = None) -> tuple[Dataset, ReadReport]:
    """The examples in rows, as `load_examples` gives them, and what became of the columns."""
    from datasets.utils import tqdm

    _check_limit(limit)
    read = RowReader(filled=rows.filled)
    with tqdm(desc="reading examples", unit=" rows", delay=2) as bar:
        read.report.unread = list(rows.unread)
        return _kept(_tables(rows, read, limit, bar.update)), read.report


def _stream(rows: Rows, limit: int | None) -> IterableDataset:
    """The examples as they are asked for; every pass reads the rows anew."""
    from datasets import DatasetInfo, Features, IterableDataset
    from datasets.iterable_dataset import ArrowExamplesIterable

    def tables() -> Iterator[tuple[int, pa.Table]]:
        read = RowReader(filled=rows.filled)
        yield from enumerate(_tables(rows, read, limit))
        logger.info("%s: %s", rows.name, read.report)

    first = next(tables())[1]  # what cannot be read is told before the first pass, not in it
    features = Features.from_arrow_schema(first.schema)
    return IterableDataset(ArrowExamplesIterable(tables, {}), info=DatasetInfo(features=features))


def _tables(
    rows: Rows, read: RowReader, limit: int | None, advance: Callable[[int], object] = lambda count: None
) -> Iterator[pa.Table]:
    """The examples in tables of some rows; there is at least one table, and all have one schema."""
    start, waiting = 0, []
    for place, examples in _examples(rows, read, limit):
        waiting.append((place, examples))
        advance(len(examples))
        count = sum(len(examples) for _, examples in waiting)
        # whether it is a corpus is known with the first row that is not empty
        if count >= BATCH and read.corpus is not None:
            yield _table(waiting, start, rows.name, corpus=read.corpus)
            start, waiting = start + count, []
    if waiting:
        yield _table(waiting, start, rows.name, corpus=bool(read.corpus))


def _table(waiting: list[tuple[Place, list[Example]]], start: int, name: str, *, corpus: bool) -> pa.Table:
    import pyarrow as pa

    examples = [example for _, batch in waiting for example in batch]
    columns = dict(zip(Example._fields, zip(*examples, strict=True), strict=True))
    fields = ("prompt", "response", "text") if corpus else tuple(field for field in Example._fields if field != "text")
    made = {"id": pa.array(range(start, start + len(examples)), pa.int64())}
    if corpus:
        columns["text"] = tuple(text or "" for text in columns["text"])  # an empty row among the texts
    try:
        return pa.table(made | {field: pa.array(columns[field], pa.string()) for field in fields})
    except UnicodeEncodeError:
        raise _half_character(waiting, name) from None


def _half_character(waiting: list[tuple[Place, list[Example]]], name: str) -> ValueError:
    """Which row holds half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    for place, examples in waiting:
        for offset, example in enumerate(examples):
            try:
                "".join(filter(None, example)).encode()
            except UnicodeEncodeError as error:
                half = ascii(error.object[error.start])
                where = f"{name}, {place.unit} {place.number + offset}"
                return ValueError(f"{where}: it holds half a character ({half}), which no text can; mend the row")
    raise AssertionError("no row holds half a character")


def _examples(rows: Rows, read: RowReader, limit: int | None) -> Iterator[tuple[Place, list[Example]]]:
    """The examples of the rows, batch after batch, each with the place of its first row; there is at least one."""
    left = limit
    columns: dict[str, Any] = {}
    for place, batch in rows.batches():
        batch = batch if left is None else batch[:left]
        examples = []
        for offset, row in enumerate(batch):
            try:
                if not isinstance(row, Mapping):
                    raise RowError(f"it is {type(row).__name__}, and a row must be a dict of columns")
                examples.append(read(row))
            except RowError as error:
                raise ValueError(f"{rows.name}, {place.unit} {place.number + offset}: {error}") from None
        if not read.num_whole:
            columns |= {name: value for row in batch for name, value in row.items() if value is not None}
            if read.report.num_rows >= BATCH:
                _refuse_columns(rows.name, columns)
        if examples:
            yield place, examples
        left = None if left is None else left - len(batch)
        if left is not None and left <= 0:
            break
    if not read.report.num_rows:
        raise ValueError(f"no examples in {rows.name}; it must hold at least one")
    if not read.num_whole:
        _refuse_columns(rows.name, columns)


def _refuse_columns(name: str, columns: Mapping[str, Any]) -> None:
    """Refuses a source of which no row, as far as it was read, has the columns of a form."""
    raise ValueError(f"{name} has columns {', '.join(sorted(columns)) or 'without values'}; {needed(columns)}")


def _kept(tables: Iterator[pa.Table]) -> Dataset:
    """The tables as one: in memory, or, where they are large, in a file that goes when the process ends."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint

    kept: list[pa.Table] = []
    size = 0
    for table in tables:
        kept.append(table)
        size += table.nbytes
        if size > _IN_MEMORY:
            break
    else:
        # without a fingerprint, `datasets` would pickle and hash the whole table
        return Dataset(pa.concat_tables(kept).combine_chunks(), fingerprint=generate_random_fingerprint())
    handle, path = tempfile.mkstemp(suffix=".arrow", dir=_scratch())
    with os.fdopen(handle, "wb") as file, pa.ipc.new_stream(file, kept[0].schema) as writer:
        while kept:
            writer.write_table(kept.pop(0))
        for table in tables:
            writer.write_table(table)
    return Dataset.from_file(path)


@cache
def _scratch() -> Path:
    """A folder beside the tables that `datasets` keeps."""
    from datasets import config

    Path(config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="pocl-examples-", dir=config.HF_DATASETS_CACHE))
    owner = os.getpid()  # not a forked child of it
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder
