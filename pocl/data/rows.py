"""Tables of token rows: made in chunks by several processes, written as they come, read by memory map.

A table is an Arrow stream on disk. Whoever maps it shares its pages with all others, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from pocl.data.mapped import MappedPages
from pocl.data.parallel import in_order
from pocl.data.tables import slice_of
from pocl.run_folder import replacing

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK = 1024  # examples that are Python objects at a time, in each process

Piece = tuple[pa.RecordBatch, dict[str, int]]
"""Rows, and what was counted while they were made."""
Result = TypeVar("Result")


def row_schema() -> pa.Schema:
    """The columns of token rows, as `tokenize` describes them."""
    from datasets import Features, Value
    from datasets import Sequence as ListOf

    columns: dict[str, Any] = {
        "sample_id": Value("int64"),
        "input_ids": ListOf(Value("int32")),
        "labels": ListOf(Value("int32")),
        "prompt_length": Value("int32"),
    }
    schema: pa.Schema = Features(columns).arrow_schema
    return schema


def in_chunks(
    examples: Dataset,
    work: Callable[[list[dict[str, Any]]], Result],
    *,
    size: int = CHUNK,
    workers: int | None = None,
    progress: bool = True,
    title: str = "tokenising",
) -> Iterator[Result]:
    """What `work` makes of the rows of a table, `size` neighbouring ones at a time, in order.

    Args:
        examples: the table.
        work: is called in every process with rows as Python objects.
        size: rows of one call.
        workers: processes; one for each core when left out. The results are the same for any number.
        progress: show a progress bar.
        title: of the bar.
    """
    from tqdm.auto import tqdm

    pages = MappedPages(examples.data.table)

    def of_chunk(first: int) -> Result:
        rows = slice_of(examples, first, size).to_pylist()
        pages.give_back()
        return work(rows)

    firsts = range(0, len(examples), size)
    with tqdm(total=len(examples), desc=title, unit=" samples", delay=2, disable=not progress) as bar:
        for first, result in zip(firsts, in_order(of_chunk, firsts, workers=workers), strict=True):
            yield result
            bar.update(min(size, len(examples) - first))


def write_rows(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Writes token rows to a file, whole or not at all.

    Raises:
        OSError: no space is left.
    """
    with replacing(path) as temporary, pa.ipc.new_stream(str(temporary), schema) as writer:
        for batch in batches:
            if len(batch):
                writer.write_batch(batch)


def map_rows(path: Path) -> Dataset:
    """A table that `write_rows` wrote, memory-mapped."""
    from datasets import Dataset

    return Dataset.from_file(str(path))
