"""The teacher's likeliest tokens at the label positions with their log-probabilities, written once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocl.engines import Engine, LocalEngine, running
from pocl.engines.top_k import check_k
from pocl.teacher.batches import rows_of
from pocl.teacher.online import OnlineTeacher
from pocl.teacher.store import Store
from pocl.teacher.stored import StoredTeacher, built, estimated_bytes, opened
from pocl_kernels import SparseTeacher

ENTRY_BYTES = 8  # int32 and float32


class TopKCache(StoredTeacher):
    """A teacher that was asked once for its K likeliest next tokens at every label position.

    8 bytes an entry: the id as int32, the log-probability at temperature 1 as float32. bfloat16 would save a quarter
    and round log-probabilities by 0.2 %: a probability of e^-10 would be off by 2 %, and a row could sum to over 1.
    What the K tokens leave of the probability is known in total and not by token: see `pocl.SparseTeacher`.

    Attributes:
        top_k: entries of a row.
        vocabulary: number of the teacher's logits.
        tail: what is assumed of all other tokens; see `pocl.SparseTeacher`.
    """

    kind = "top_k"
    tensors = ("token_ids", "log_probs")

    def __init__(
        self, store: Store, index: Mapping[str, Any], fallback: Engine | None = None, tail: str = "bucket"
    ) -> None:
        super().__init__(store, index)
        self.fallback, self.tail = fallback, tail
        self.top_k: int = index["top_k"]
        self.vocabulary: int = index["vocabulary"]

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        teacher: nn.Module | Engine | None = None,
        tokenizer: Any = None,
        template: str | None = None,
        dataset: Any = None,
        fallback: OnlineTeacher | Engine | None = None,
        tail: str = "bucket",
        verify: bool = False,
    ) -> TopKCache:
        """Open a finished cache; see `HiddenStateCache.open`.

        Args:
            path, teacher, tokenizer, template, dataset, verify: as there.
            fallback: a teacher or an engine that is asked about batches that are not in the cache.
            tail: bucket, renormalise, zero or uniform; see `pocl.SparseTeacher`.
        """
        store, index = opened(cls, path, teacher=teacher, tokenizer=tokenizer, template=template, verify=verify)
        asked = LocalEngine(fallback.model) if isinstance(fallback, OnlineTeacher) else fallback
        cache = cls(store, index, asked, tail)
        if dataset is not None:
            cache.check_contains(dataset)
        return cache

    def rows(self, samples: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """Ids int32 [N, K] and log-probabilities float32 [N, K] of the label positions of samples, likeliest first.

        Args:
            samples: with `input_ids` and `labels`; samples whose labels are all ignored take no row.

        Raises:
            ValueError: a sample is not in the cache.
        """
        found = self._gather(samples)
        if found is None:
            return torch.empty(0, self.top_k, dtype=torch.int32), torch.empty(0, self.top_k)
        return found[0], found[1]

    def lookups(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        token_ids, log_probs = self.rows(samples)
        return {"teacher_token_ids": token_ids, "teacher_log_probs": log_probs}

    def sparse(self, batch: Mapping[str, Tensor]) -> SparseTeacher:
        """See `LikelyTokens.sparse`: what a loader attached, or read now."""
        token_ids, log_probs = batch.get("teacher_token_ids"), batch.get("teacher_log_probs")
        if token_ids is None or log_probs is None:
            rows = rows_of(batch)
            if self.fallback is not None and not self.contains(rows):
                token_ids, log_probs = self.fallback.top_k(rows, self.top_k)
            else:
                token_ids, log_probs = self.rows(rows)
        device = batch["input_ids"].device
        return SparseTeacher(token_ids.to(device), log_probs.to(device), tail=self.tail, vocab_size=self.vocabulary)

    def mean_tail(self) -> float:
        """Mean probability that the K tokens leave to all others, over every label token."""
        tails = 0.0
        for shard in range(self.index["num_shards"]):
            log_probs = self.store.read_tensor(shard, "log_probs")
            tails += float((1 - log_probs.double().exp().sum(-1)).clamp(min=0).sum())
        return tails / max(self.num_tokens, 1)

    @staticmethod
    def estimate_bytes(dataset: Any, top_k: int) -> int:
        """Size of the entries on disk: distinct label tokens x K x 8 bytes."""
        return estimated_bytes(dataset, top_k * ENTRY_BYTES)

    @classmethod
    def build(
        cls,
        path: str | Path,
        teacher: OnlineTeacher | nn.Module | Engine | str | Path,
        dataset: Any,
        *,
        top_k: int = 64,
        engine: str = "transformers",
        engine_args: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        template: str | None = None,
        batch_tokens: int = 4096,
        shard_mb: int = 64,
        repair: bool = False,
        disable_tqdm: bool = False,
    ) -> TopKCache:
        """Ask the teacher about every distinct sample and store its likeliest tokens; see `HiddenStateCache.build`.

        A model of this process never makes the logits of a whole vocabulary (`pocl.engines.top_k`). The same model and
        rows give the same bytes, cut off or not.

        Args:
            path, teacher, dataset, engine, engine_args, tokenizer, template, batch_tokens, shard_mb, repair,
                disable_tqdm: as there.
            top_k: tokens to keep, at most the vocabulary.

        Raises:
            ValueError: as there; or top_k is out of range.
            OSError: the disk is too small; said before anything is written.
        """
        model = teacher.model if isinstance(teacher, OnlineTeacher) else teacher
        options: dict[str, Any] = {"engine_args": engine_args, "tokenizer": tokenizer, "batch_tokens": batch_tokens}
        with running(model, engine, **options) as source:
            check_k(top_k, source.vocabulary)

            def make(samples: Sequence[Mapping[str, Any]], report: Any) -> dict[str, Tensor]:
                token_ids, log_probs = source.top_k(samples, top_k, report)
                return {"token_ids": token_ids, "log_probs": log_probs}

            built(
                cls,
                path,
                source,
                dataset,
                make,
                token_bytes=top_k * ENTRY_BYTES,
                further={"top_k": top_k, "vocabulary": source.vocabulary},
                tokenizer=tokenizer,
                template=template,
                shard_mb=shard_mb,
                repair=repair,
                disable_tqdm=disable_tqdm,
            )
        return cls.open(path)
