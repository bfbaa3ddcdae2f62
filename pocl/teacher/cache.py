"""The teacher's last hidden states of the label positions, written once and read by memory map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocl.engines import Engine, running
from pocl.teacher.batches import rows_of
from pocl.teacher.online import OnlineTeacher
from pocl.teacher.store import DTYPES, Store
from pocl.teacher.stored import StoredTeacher, built, estimated_bytes, opened


class HiddenStateCache(StoredTeacher):
    """A teacher that was run once over the data. Exact at every temperature and for every divergence.

    Make one with `build`, or `open` an existing one. It is a `Teacher`: `head`, and `hidden_states(batch)`. Data
    loaders call `rows` in their workers instead, so that reading overlaps with training.
    """

    kind = "hidden_states"
    tensors = ("hidden",)

    def __init__(self, store: Store, index: Mapping[str, Any], fallback: OnlineTeacher | None = None) -> None:
        super().__init__(store, index)
        self.fallback = fallback
        self.head = store.read_head(index["scale"], index["softcap"])
        self.hidden_size: int = index["hidden_size"]
        self.dtype = DTYPES[index["dtype"]]

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        teacher: nn.Module | Engine | None = None,
        tokenizer: Any = None,
        template: str | None = None,
        dataset: Any = None,
        fallback: OnlineTeacher | None = None,
        verify: bool = False,
    ) -> HiddenStateCache:
        """Open a finished cache.

        Args:
            path: folder of the cache.
            teacher, tokenizer, template, dataset: what the cache must have been built with; each is checked if given. A
                data set must be contained in the cache.
            fallback: asked for batches that are not in the cache, such as responses sampled while training.
            verify: read every shard and compare its checksum, not only its size.

        Raises:
            ValueError: there is no cache, it is unfinished, it belongs to something else (says what), or a shard is
                corrupted (says which).
        """
        store, index = opened(cls, path, teacher=teacher, tokenizer=tokenizer, template=template, verify=verify)
        cache = cls(store, index, fallback)
        if dataset is not None:
            cache.check_contains(dataset)
        return cache

    def rows(self, samples: Sequence[Mapping[str, Any]]) -> Tensor:
        """Hidden states [N, H] of the label positions of samples, in their order, in the stored type.

        Args:
            samples: with `input_ids` and `labels`; samples whose labels are all ignored take no row.

        Raises:
            ValueError: a sample is not in the cache.
        """
        found = self._gather(samples)
        return torch.empty(0, self.hidden_size, dtype=self.dtype) if found is None else found[0]

    def lookups(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return {"teacher_hidden": self.rows(samples)}

    def hidden_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """See `Teacher.hidden_states`: what a loader attached as `teacher_hidden`, or read now."""
        hidden = batch.get("teacher_hidden")
        if hidden is None:
            rows = rows_of(batch)
            if self.fallback is not None and not self.contains(rows):
                return self.fallback.hidden_states(batch)
            hidden = self.rows(rows)
        device = batch["input_ids"].device
        if self.head.weight.device != device:
            self.to(device)
        return hidden.to(device, self.head.weight.dtype)

    def to(self, device: torch.device | str) -> HiddenStateCache:
        """Move the head, in place; hidden states follow the batches."""
        head = self.head
        bias = None if head.bias is None else head.bias.to(device)
        self.head = type(head)(head.weight.to(device), bias, scale=head.scale, softcap=head.softcap)
        return self

    @staticmethod
    def estimate_bytes(dataset: Any, hidden_size: int, dtype: torch.dtype = torch.float32) -> int:
        """Size of the hidden states on disk: distinct label tokens x hidden size x bytes a number."""
        return estimated_bytes(dataset, hidden_size * dtype.itemsize)

    @classmethod
    def build(
        cls,
        path: str | Path,
        teacher: OnlineTeacher | nn.Module | Engine | str | Path,
        dataset: Any,
        *,
        engine: str = "transformers",
        engine_args: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        template: str | None = None,
        batch_tokens: int = 4096,
        shard_mb: int = 256,
        repair: bool = False,
        disable_tqdm: bool = False,
    ) -> HiddenStateCache:
        """Run the teacher over every distinct sample and store what its label positions need.

        Any number of processes may call this with the same arguments at once: they share the shards among them, and a
        shard whose writer died is taken over. A build that was cut off goes on with the shards that are missing.

        Args:
            path: folder of the cache, made if missing.
            teacher: the model, on its device; an engine of `pocl.engines`; or, for vLLM, a folder or hub id.
            dataset: tokenised rows (`sample_id`, `input_ids`, `labels`): training rows, and evaluation rows if the
                trainer is to evaluate with the cache.
            engine: who runs the model: `transformers`, in this process, or `vllm`, which spreads it over GPUs.
            engine_args: arguments of `vllm.LLM`, such as `tensor_parallel_size`.
            dtype: float32, bfloat16 or float16; None keeps the teacher's, which loses nothing.
            tokenizer, template: noted, so that `open` can compare them.
            batch_tokens: tokens of one forward pass, padding included; an engine of its own decides for itself.
            shard_mb: size of a shard in MiB.
            repair: read all shards, and write those again whose checksum is wrong.
            disable_tqdm: show no progress bar.

        Raises:
            ValueError: the folder holds a cache of something else (says what), no row has a label, or one is longer
                than the teacher's context (names the sample).
            OSError: the disk is too small; said before anything is written.
        """
        model = teacher.model if isinstance(teacher, OnlineTeacher) else teacher
        options: dict[str, Any] = {"engine_args": engine_args, "tokenizer": tokenizer, "batch_tokens": batch_tokens}
        with running(model, engine, **options) as source:
            head = source.head()
            stored = dtype or head.weight.dtype
            built(
                cls,
                path,
                source,
                dataset,
                lambda samples, report: {"hidden": source.hidden_states(samples, report).to(stored)},
                token_bytes=head.hidden_size * stored.itemsize,
                further={
                    "dtype": str(stored).removeprefix("torch."),
                    "hidden_size": head.hidden_size,
                    "scale": head.scale,
                    "softcap": head.softcap,
                },
                tokenizer=tokenizer,
                template=template,
                shard_mb=shard_mb,
                repair=repair,
                disable_tqdm=disable_tqdm,
            )
        return cls.open(path)
