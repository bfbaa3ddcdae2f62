"""Texts without questions: every token is to be learnt, and rows are blocks of tokens.

Joined, documents follow one another with the end token between them, and the stream is cut into blocks of equal length;
a block may hold the end of one document and the beginning of another. Apart, every document is cut for itself.

The first token of a block has nothing before it to be predicted from: it carries no label, and is the row's "prompt".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pocl.data.encoder import IGNORE_INDEX, Encoder
from pocl.data.rows import Piece, row_schema

BLOCKS = ("joined", "apart")
DOCUMENTS = 64  # that are Python objects at a time, in each process
_BATCH = 16  # documents in one call of the tokenizer
# Which documents a block holds something of; columns that only the rows of a corpus have.
COLUMNS = ("first_document", "last_document")

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class CorpusReport:
    """What `tokenize` made of the documents of a corpus."""

    num_examples: int
    """Documents that came in."""
    num_samples: int
    """Blocks that went out."""
    empty: int
    """Documents without text, left out."""
    short: int
    """Blocks of a single token, left out: there is nothing to predict in them."""
    tokens: int
    """Tokens of all blocks."""

    def __str__(self) -> str:
        parts = [f"a corpus: {self.num_examples} documents make {self.num_samples} blocks of {self.tokens} tokens"]
        parts += [f"{self.empty} documents without text left out"] if self.empty else []
        parts += [f"{self.short} blocks of a single token left out"] if self.short else []
        return "; ".join(parts)


def is_corpus(columns: Sequence[str]) -> bool:
    """Whether a table with these columns holds the texts, or the rows, of a corpus."""
    return "text" in columns or COLUMNS[0] in columns


def corpus_schema() -> pa.Schema:
    """The columns of a corpus' rows: those of all rows, and the `id` of the first and of the last document in each."""
    from datasets import Features, Value

    columns = Features.from_arrow_schema(row_schema()) | {name: Value("int64") for name in COLUMNS}
    schema: pa.Schema = Features(columns).arrow_schema
    return schema


@dataclass
class Documents:
    """Some documents as tokens, each closed by the end token."""

    numbers: NDArray[np.int64]
    ids: Ids
    """Of all of them, one after another."""
    ends: NDArray[np.int64]
    """Where each ends in `ids`."""


def _nothing() -> Documents:
    return Documents(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int64))


def read_documents(encoder: Encoder) -> Callable[[list[dict[str, Any]]], tuple[Documents, int]]:
    """What turns examples with a `text` into documents; also says how many had no text."""
    eos = encoder.tokenizer.eos_token_id

    def read(examples: list[dict[str, Any]]) -> tuple[Documents, int]:
        kept = [example for example in examples if example["text"].strip()]
        ids: list[Ids] = []
        for first in range(0, len(kept), _BATCH):
            texts = [example["text"] for example in kept[first : first + _BATCH]]
            ids += [np.array([*found, eos], dtype=np.int32) for found in encoder.plain_ids(texts)]
        numbers = np.array([example["id"] for example in kept], dtype=np.int64)
        ends = np.cumsum([len(found) for found in ids], dtype=np.int64)
        return Documents(numbers, np.concatenate(ids) if ids else np.empty(0, np.int32), ends), len(examples) - len(
            kept
        )

    return read


@dataclass
class Blocks:
    """Cuts documents into blocks, as they come.

    Args:
        max_length: tokens of a block.
        joined: whether a block may hold several documents.
    """

    max_length: int
    joined: bool
    _count: int = 0
    _rest: Documents = field(default_factory=_nothing)

    def add(self, new: Documents, *, last: bool = False) -> Piece:
        """The blocks that are complete with some further documents; with the `last` of them all the rest."""
        numbers = np.concatenate([self._rest.numbers, new.numbers])
        ids = np.concatenate([self._rest.ids, new.ids])
        ends = np.concatenate([self._rest.ends, new.ends + len(self._rest.ids)])
        if self.joined:
            stop = len(ids) if last else len(ids) // self.max_length * self.max_length
            starts = np.arange(0, stop, self.max_length)
        else:
            stop, begins = len(ids), np.concatenate([[0], ends])[:-1]
            parts = [np.arange(b, e, self.max_length) for b, e in zip(begins.tolist(), ends.tolist(), strict=True)]
            starts = np.concatenate(parts) if parts else np.empty(0, np.int64)
        stops = np.minimum(starts + self.max_length, stop)
        if not self.joined:
            stops = np.minimum(stops, ends[np.searchsorted(ends, starts, side="right")])
        piece = self._piece(ids, starts, stops, numbers, ends)
        left = int(np.searchsorted(ends, stop, side="right"))  # documents that are used up
        self._rest = Documents(numbers[left:], ids[stop:], ends[left:] - stop)
        return piece

    def _piece(
        self,
        ids: Ids,
        starts: NDArray[np.int64],
        stops: NDArray[np.int64],
        numbers: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> Piece:
        whole = stops - starts > 1
        starts, stops, short = starts[whole], stops[whole], int((~whole).sum())
        lengths = stops - starts
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        chosen = ids[np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])]
        labels = chosen.copy()
        labels[offsets[:-1]] = IGNORE_INDEX
        columns = {
            "sample_id": np.arange(self._count, self._count + len(starts)),
            "input_ids": pa.ListArray.from_arrays(offsets.astype(np.int32), chosen),
            "labels": pa.ListArray.from_arrays(offsets.astype(np.int32), labels),
            "prompt_length": np.ones(len(starts), dtype=np.int32),
            COLUMNS[0]: numbers[np.searchsorted(ends, starts, side="right")],
            COLUMNS[1]: numbers[np.searchsorted(ends, stops - 1, side="right")],
        }
        schema = corpus_schema()
        arrays = [pa.array(columns[name], type=schema.field(name).type) for name in schema.names]
        self._count += len(starts)
        return pa.RecordBatch.from_arrays(arrays, schema=schema), {"short": short, "tokens": int(offsets[-1])}


def block_pieces(documents: Iterator[tuple[Documents, int]], max_length: int, blocks: str) -> Iterator[Piece]:
    """The rows of a corpus, piece by piece.

    Args:
        documents: some documents, and how many more were empty.
        max_length: tokens of a block.
        blocks: `joined` or `apart`.
    """
    cut = Blocks(max_length, blocks == "joined")
    for some, empty in documents:
        rows, counts = cut.add(some)
        yield rows, counts | {"empty": empty}
    yield cut.add(_nothing(), last=True)
