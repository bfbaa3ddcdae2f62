"""Examples to a table of token rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from pocl.data.encoder import IGNORE_INDEX, Encoder
from pocl.data.report import DataReport
from pocl.data.templates import TEMPLATES, render_prompt, resolve_template

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "IGNORE_INDEX",
    "TEMPLATES",
    "DataReport",
    "Encoder",
    "check_columns",
    "render_prompt",
    "resolve_template",
    "tokenize",
]

_CHUNK = 4096  # rows that are Python lists at a time; the rest lies packed in Arrow tables
_BATCH = 256  # examples in one call of the tokenizer


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
    progress: bool = True,
) -> tuple[Dataset, DataReport]:
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
        progress: show a progress bar.

    Returns:
        The rows, with `sample_id` int64, `input_ids` and `labels` list[int32] (not shifted, -100 where nothing is
        learnt) and `prompt_length` int32 (where the last answer begins); and the counts. Samples without prompt or
        response text are dropped and counted.

    Raises:
        ValueError: missing column, unknown argument, no EOS token, limits too small, nothing left, or a conversation
            that the template refuses or writes in part only (names the sample).
    """
    from datasets import Dataset, Features, Sequence, Value, concatenate_datasets

    check_columns(examples.column_names)
    encoder = Encoder(
        tokenizer,
        template,
        max_length,
        max_prompt_length,
        labels=labels,
        template_kwargs=template_kwargs,
        special_tokens=special_tokens,
    )
    features = Features(
        {
            "sample_id": Value("int64"),
            "input_ids": Sequence(Value("int32")),
            "labels": Sequence(Value("int32")),
            "prompt_length": Value("int32"),
        }
    )

    def rows() -> Iterator[dict[str, Any]]:
        from tqdm.auto import tqdm

        with tqdm(total=len(examples), desc="tokenising", unit=" samples", disable=not progress) as bar:
            for batch in _chunks(iter(examples), _BATCH):
                yield from (row for row in encoder.encode_batch(batch) if row is not None)
                bar.update(len(batch))

    chunks = [Dataset.from_list(list(chunk), features=features) for chunk in _chunks(rows(), _CHUNK)]
    report = encoder.report(len(examples), sum(map(len, chunks)))
    if not chunks:
        raise ValueError(f"no sample is left after tokenisation: {report}")
    return concatenate_datasets(chunks), report


def _chunks(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(islice(rows, size)):
        yield chunk


def check_columns(columns: Sequence[str]) -> None:
    """Refuses a table that `load_examples` has not made.

    Raises:
        ValueError: `id`, `prompt` or `response` is missing.
    """
    missing = [c for c in ("id", "prompt", "response") if c not in columns]
    if missing:
        raise ValueError(
            f"examples lack the columns {', '.join(missing)} (they have {', '.join(columns)}); "
            "read them with load_examples"
        )
