"""Examples to a table of token rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pocl.data.corpus import BLOCKS, DOCUMENTS, CorpusReport, block_pieces, corpus_schema, is_corpus, read_documents
from pocl.data.encoder import IGNORE_INDEX, Encoder
from pocl.data.parallel import check_workers
from pocl.data.report import DataReport
from pocl.data.rows import CHUNK, Piece, in_chunks, map_rows, row_schema, write_rows
from pocl.data.tables import slices
from pocl.data.templates import TEMPLATES, render_prompt, resolve_template
from pocl.run_folder import write_text

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "IGNORE_INDEX",
    "TEMPLATES",
    "CorpusReport",
    "DataReport",
    "Encoder",
    "check_columns",
    "render_prompt",
    "resolve_template",
    "tokenize",
]

_BATCH = 256  # examples in one call of the tokenizer
FORMAT = 1  # of what is stored; raise it when the same examples make other rows


def tokenize(
    examples: Dataset,
    tokenizer: Any,
    *,
    template: str = "auto",
    max_length: int = 512,
    max_prompt_length: int = 256,
    labels: str = "last",
    template_kwargs: Mapping[str, Any] | None = None,
    special_tokens: str = "text",
    blocks: str = "joined",
    workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[Dataset, DataReport | CorpusReport]:
    """Turns examples into token rows whose labels cover the answer and the token that ends it.

    Under a chat template the ids are those of the template's text of the whole conversation, up to the end of its last
    labelled turn: the turn is closed by the template's own token, and nothing follows. Where the template closes no
    turn, and under the other templates, the tokenizer's EOS ends the answer.

    A prompt longer than `max_prompt_length` loses tokens on its left. Where prompt and response together exceed
    `max_length` the prompt gives way too, down to a quarter of `max_length`; only then is the response cut on its
    right (and gets no end token, for it does not end there). Limits are the paper's (section 4.1). The prompt is what
    stands before the first label, the response the rest.

    Args:
        examples: what `load_examples` returns (`id`, `prompt`, `response`, ...).
        tokenizer: a Hugging Face tokenizer with an EOS token.
        template: `chat` (the tokenizer's), `alpaca` (the paper's), `plain`, or `auto`.
        max_length: longest row, in tokens.
        max_prompt_length: longest prompt, in tokens.
        labels: on the `last` answer of a conversation, or on `all` of them.
        template_kwargs: further variables of the chat template, such as `enable_thinking`; a row's own come first.
        special_tokens: what the text of a special token is in the data: `text`, or the token (`tokens`). The thoughts
            of an assistant, `<think>` and `</think>`, are tokens either way.
        blocks: of the texts of a corpus: `joined`, with the end token between them, or each `apart`.
        workers: processes that share the work, one for each core when left out; the rows are the same for any number.
        cache_dir: a folder where the rows are kept, memory-mapped, for whoever asks again with the same examples,
            tokenizer and options. None keeps them in memory.
        progress: show a progress bar.

    Returns:
        The rows, with `sample_id` int64, `input_ids` and `labels` list[int32] (not shifted, -100 where nothing is
        learnt) and `prompt_length` int32 (where the last answer begins); and the counts. Samples without prompt or
        response text are dropped and counted.

    Raises:
        ValueError: missing column, unknown argument, no EOS token, limits too small, nothing left, or a conversation
            that the template refuses or writes in part only (names the sample).
    """
    options: dict[str, Any] = {
        "template": template,
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "labels": labels,
        "template_kwargs": template_kwargs,
        "special_tokens": special_tokens,
        "blocks": blocks,
    }
    if cache_dir is None:
        return _in_memory(RowMaker(examples, tokenizer, **options, workers=workers, progress=progress))
    mark = rows_fingerprint(examples, tokenizer, options)
    path, note = (Path(cache_dir, f"rows-{mark}.{kind}") for kind in ("arrow", "json"))
    if path.is_file() and note.is_file():
        kind = CorpusReport if is_corpus(examples.column_names) else DataReport
        return map_rows(path), kind(**json.loads(note.read_text("utf-8")))
    maker = RowMaker(examples, tokenizer, **options, workers=workers, progress=progress)
    write_rows(path, maker.schema, maker.batches())
    write_text(note, json.dumps(asdict(maker.report())) + "\n")
    return map_rows(path), maker.report()


def _in_memory(maker: RowMaker) -> tuple[Dataset, DataReport | CorpusReport]:
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint

    table = pa.Table.from_batches(maker.batches(), schema=maker.schema)
    return Dataset(table, fingerprint=generate_random_fingerprint()), maker.report()


class RowMaker:
    """Token rows in the making; see `tokenize` for the arguments.

    Attributes:
        schema: of the rows.
    """

    def __init__(
        self,
        examples: Dataset,
        tokenizer: Any,
        *,
        template: str = "auto",
        max_length: int = 512,
        max_prompt_length: int = 256,
        labels: str = "last",
        template_kwargs: Mapping[str, Any] | None = None,
        special_tokens: str = "text",
        blocks: str = "joined",
        workers: int | None = None,
        progress: bool = True,
    ) -> None:
        self._corpus = is_corpus(examples.column_names)
        if not self._corpus:
            check_columns(examples.column_names)
        if blocks not in BLOCKS:
            raise ValueError(f"blocks must be one of {', '.join(BLOCKS)}, got {blocks!r}")
        check_workers(workers)
        self._examples, self._max_length, self._blocks = examples, max_length, blocks
        self._options: dict[str, Any] = {"workers": workers, "progress": progress}
        self._encoder = Encoder(  # made here, so that bad arguments are told before any process starts
            tokenizer,
            "plain" if self._corpus else template,
            max_length,
            max_prompt_length,
            labels=labels,
            template_kwargs=template_kwargs,
            special_tokens=special_tokens,
        )
        self.schema = corpus_schema() if self._corpus else row_schema()
        self._counts: Counter[str] = Counter()
        self._num_rows = 0

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, in order.

        Raises:
            ValueError: there is none.
        """
        for rows, counts in self._blocks_of_documents() if self._corpus else self._rows_of_examples():
            self._counts.update(counts)
            self._num_rows += len(rows)
            yield rows
        if not self._num_rows:
            wanted = "a prompt and a response; a conversation a turn of the user and one of the assistant"
            raise ValueError(
                f"no sample is left after tokenisation: {self.report()}"
                + ("" if self._corpus else f"; a sample needs {wanted}")
            )

    def report(self) -> DataReport | CorpusReport:
        """What became of the examples, once the batches are there."""
        kind = CorpusReport if self._corpus else DataReport
        names = {f.name for f in fields(kind)} - {"num_examples", "num_samples"}
        return kind(len(self._examples), self._num_rows, **{name: self._counts[name] for name in names})

    def _rows_of_examples(self) -> Iterator[Piece]:
        encoder, schema = self._encoder, self.schema

        def work(examples: list[dict[str, Any]]) -> Piece:
            before = dict(encoder.counts)
            batches = (examples[i : i + _BATCH] for i in range(0, len(examples), _BATCH))
            rows = [row for batch in batches for row in encoder.encode_batch(batch) if row is not None]
            counts = {name: count - before[name] for name, count in encoder.counts.items()}
            return pa.RecordBatch.from_pylist(rows, schema=schema), counts

        return in_chunks(self._examples, work, **self._options)

    def _blocks_of_documents(self) -> Iterator[Piece]:
        documents = in_chunks(self._examples, read_documents(self._encoder), size=DOCUMENTS, **self._options)
        return block_pieces(documents, self._max_length, self._blocks)


def rows_fingerprint(examples: Dataset, tokenizer: Any, options: Mapping[str, Any]) -> str:
    """32 hex digits that stand for everything that decides the rows of `tokenize`."""
    digest = hashlib.blake2b(digest_size=16)
    engine = getattr(tokenizer, "backend_tokenizer", None)
    model = getattr(tokenizer, "sp_model", None)
    vocabulary = engine.to_str() if engine is not None else repr(sorted(tokenizer.get_vocab().items()))
    parts = [FORMAT, options, type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map]
    digest.update(json.dumps([*parts, tokenizer.init_kwargs], sort_keys=True, default=str).encode())
    digest.update(vocabulary.encode())
    digest.update(model.serialized_model_proto() if model is not None else b"")
    for chunk in slices(examples, CHUNK):
        chunk = chunk.combine_chunks()
        chunk = chunk.take(pa.array(range(len(chunk))))  # a copy, that it lie the same however the table was cut
        for batch in chunk.replace_schema_metadata(None).to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def check_columns(columns: Sequence[str]) -> None:
    """Refuses a table that `load_examples` has not made.

    Raises:
        ValueError: `id`, `prompt` or `response` is missing, or they are the texts of a corpus.
    """
    if is_corpus(columns):
        raise ValueError(
            "examples are the texts of a corpus, without questions and answers; make token rows of them with tokenize, "
            "and score those with answers=False"
        )
    missing = [c for c in ("id", "prompt", "response") if c not in columns]
    if missing:
        raise ValueError(
            f"examples lack the columns {', '.join(missing)} (they have {', '.join(columns)}); "
            "read them with load_examples"
        )
