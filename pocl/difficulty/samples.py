"""The samples to score, a shard at a time: what each shard holds and the mark by which it is known again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from pocl.data import IGNORE_INDEX, Encoder, check_columns


@dataclass(frozen=True)
class Sample:
    """A tokenised sample with the text that its answer is judged by."""

    sample_id: int
    prompt: list[int]
    response: list[int]
    """The tokens that carry labels."""
    reference: str

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def split_into_shards(dataset: Any, size: int) -> Iterator[tuple[int, Callable[[], Sequence[Mapping[str, Any]]]]]:
    """Yields (index, rows of the shard) for consecutive runs of `size` rows; a `Dataset`'s rows are read on demand."""
    if hasattr(dataset, "select"):
        for index, start in enumerate(range(0, len(dataset), size)):
            stop = min(start + size, len(dataset))
            yield index, partial(_select, dataset, range(start, stop))
        return
    rows, index = iter(dataset), 0
    while chunk := list(islice(rows, size)):
        yield index, partial(list, chunk)
        index += 1


def _select(dataset: Any, rows: range) -> list[Mapping[str, Any]]:
    return list(dataset.select(rows))


class SampleReader:
    """Turns rows, raw or tokenised, into samples: of a conversation, the last answer and all that stands before it.

    A tokenised row is split where its `prompt_length` says, or its first label; its answer is judged by its column
    `reference`, or, without one, by the text of its labels.

    Raises:
        ValueError: a tokenised row that is not a prompt followed by its response, or the texts of a corpus.
    """

    def __init__(
        self,
        tokenizer: Any,
        columns: Sequence[str],
        *,
        template: str,
        max_length: int,
        max_prompt_length: int,
        template_kwargs: Mapping[str, Any] | None = None,
        special_tokens: str = "text",
    ) -> None:
        self.tokenizer = tokenizer
        self.tokenised = "input_ids" in columns
        if not self.tokenised:
            check_columns(columns)
        self.id_column = "sample_id" if self.tokenised else "id"
        self.encoder = Encoder(
            tokenizer,
            template if not self.tokenised else "plain",
            max_length,
            max_prompt_length,
            template_kwargs=template_kwargs,
            special_tokens=special_tokens,
        )

    @classmethod
    def of_rows(cls, tokenizer: Any) -> SampleReader:
        """For rows from `tokenize`."""
        return cls(tokenizer, ["input_ids"], template="plain", max_length=8, max_prompt_length=4)

    def describe(self) -> dict[str, Any]:
        """What decides how a row becomes a sample."""
        if self.tokenised:
            return {"form": "tokens"}
        encoder = self.encoder
        lengths = {"max_length": encoder.max_length, "max_prompt_length": encoder.max_prompt_length}
        usual = {"template_kwargs": {}, "special_tokens": "text"}
        chosen = {name: value for name, was in usual.items() if (value := getattr(encoder, name)) != was}
        return {"form": "text", "template": encoder.template, **lengths, **chosen}

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> list[Sample]:
        """The samples of the rows; those without prompt or response are left out and counted."""
        if self.tokenised:
            return [sample for row in rows if (sample := self._from_tokens(row)) is not None]
        rows = list(rows)
        encoded = self.encoder.encode_batch(rows)
        return [_sample(row, found) for row, found in zip(rows, encoded, strict=True) if found is not None]

    def _from_tokens(self, row: Mapping[str, Any]) -> Sample | None:
        ids, labels = list(row["input_ids"]), list(row["labels"])
        first_label = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        prompt_length = first_label if first_label == len(labels) else row.get("prompt_length", first_label)
        if prompt_length == len(labels) or prompt_length == 0:
            self.encoder.counts["empty_responses" if prompt_length else "empty_prompts"] += 1
            return None
        if labels[prompt_length:] != ids[prompt_length:]:
            raise ValueError(
                f"labels of sample {row['sample_id']} are not -100 up to the response and its tokens from there on; "
                "several turns in one row cannot be ranked: give each its own row"
            )
        reference = row.get("reference")
        if reference is None:
            reference = self.tokenizer.decode(ids[prompt_length:], skip_special_tokens=True)
        return Sample(int(row["sample_id"]), ids[:prompt_length], ids[prompt_length:], reference)


def _sample(row: Mapping[str, Any], encoded: Mapping[str, Any]) -> Sample:
    n, ids = encoded["prompt_length"], encoded["input_ids"]
    return Sample(int(encoded["sample_id"]), ids[:n], ids[n:], row["response"])


def mark_of(samples: Sequence[Sample]) -> str:
    """A hash of everything about the samples that decides their scores."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(f"{sample.sample_id} {len(sample.prompt)} {len(sample.response)}\n".encode())
        digest.update(np.asarray(sample.prompt + sample.response, dtype=np.int64).tobytes())
        digest.update(sample.reference.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
