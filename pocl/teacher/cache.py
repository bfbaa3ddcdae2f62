"""The teacher's last hidden states of the label positions, written once and read by memory map."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pocl.models import view_of
from pocl.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from pocl.teacher.batches import rows_of
from pocl.teacher.online import OnlineTeacher
from pocl.teacher.store import (
    DTYPES,
    FORMAT,
    ShardPlan,
    Store,
    data_fingerprint,
    keyed,
    label_count,
    plan_shards,
    sample_key,
)

_WAIT_SECONDS = 0.5
_NO_LABELS = -1


class HiddenStateCache:
    """A teacher that was run once over the data. Exact at every temperature and for every divergence.

    Make one with `build`, or `open` an existing one. It is a `Teacher`: `head`, and `hidden_states(batch)`. Data
    loaders call `rows` in their workers instead, so that reading overlaps with training.
    """

    def __init__(self, store: Store, index: Mapping[str, Any], fallback: OnlineTeacher | None = None) -> None:
        self.store = store
        self.index = index
        self.fallback = fallback
        self.head = store.read_head(index["scale"], index["softcap"])
        self.hidden_size: int = index["hidden_size"]
        self.dtype = DTYPES[index["dtype"]]
        self._handles: dict[int, Any] = {}
        keys, shards, starts, counts = [], [], [], []
        for shard in range(index["num_shards"]):
            with safe_open(store.shard_path(shard), framework="numpy") as file:
                of_shard = file.get_tensor("counts")
                keys.append(file.get_tensor("keys"))
            counts.append(of_shard)
            starts.append(np.cumsum(of_shard) - of_shard)
            shards.append(np.full(len(of_shard), shard))
        order = np.argsort(np.concatenate(keys))
        self._keys, self._shards = np.concatenate(keys)[order], np.concatenate(shards)[order]
        self._starts, self._counts = np.concatenate(starts)[order], np.concatenate(counts)[order]

    # ---------------------------------------------------------------------------------------------------- reading

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        teacher: nn.Module | None = None,
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
        store = Store(path)
        index = store.read_json("index.json")
        if index is None:
            state = "is unfinished" if store.read_json("plan.json") else "holds no cache"
            raise ValueError(f"path {path} {state}; (re)start HiddenStateCache.build with it, which goes on from there")
        _compare(index, _fingerprint(teacher, tokenizer, template), path)
        for part in (store.head_path, *map(store.shard_path, range(index["num_shards"]))):
            fault = store.fault(part, full=verify)
            if fault is not None:
                raise ValueError(
                    f"{part} is corrupted: {fault}; HiddenStateCache.build(..., repair=True) writes it again"
                )
        cache = cls(store, index, fallback)
        if dataset is not None:
            cache.check_contains(dataset)
        return cache

    def contains(self, samples: Sequence[Mapping[str, Any]]) -> bool:
        """Whether every sample with a label is in the cache."""
        return all(self._find(sample) is not None for sample in samples)

    def check_contains(self, dataset: Any) -> None:
        """Raise a ValueError unless every row of a tokenised data set is in the cache."""
        counts, keys = np.array([found[1:] for found in keyed(dataset)], dtype=np.int64).reshape(-1, 2).T
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        missing = np.flatnonzero((counts > 0) & (self._keys[places] != keys)).tolist()
        if missing:
            names = ", ".join(str(dataset[row].get("sample_id", row)) for row in missing[:5])
            names += ", ..." * (len(missing) > 5)
            raise ValueError(
                f"the cache in {self.store.folder} is of another data set, template or tokenizer: {len(missing)} of "
                f"{len(dataset)} samples are not in it (sample_id {names}); build it from the tokenised rows in use"
            )

    @property
    def num_tokens(self) -> int:
        return int(self._counts.sum())

    def rows(self, samples: Sequence[Mapping[str, Any]]) -> Tensor:
        """Hidden states [N, H] of the label positions of samples, in their order, in the stored type.

        Args:
            samples: with `input_ids` and `labels`; samples whose labels are all ignored take no row.

        Raises:
            ValueError: a sample is not in the cache.
        """
        places = [self._find(sample) for sample in samples]
        if None in places:
            self.check_contains(samples)
        parts = [self._read(place) for place in places if place is not None and place != _NO_LABELS]
        return torch.cat(parts) if parts else torch.empty(0, self.hidden_size, dtype=self.dtype)

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

    def _find(self, sample: Mapping[str, Any]) -> int | None:
        """Place of a sample in the index, None if it is not there."""
        if not label_count(sample["labels"]):
            return _NO_LABELS
        key = sample_key(sample["input_ids"], sample["labels"])
        place = int(np.searchsorted(self._keys, key))
        return place if place < len(self._keys) and self._keys[place] == key else None

    def _read(self, place: int) -> Tensor:
        shard, start = int(self._shards[place]), int(self._starts[place])
        if shard not in self._handles:
            self._handles[shard] = safe_open(self.store.shard_path(shard), framework="pt").get_slice("hidden")
        return self._handles[shard][start : start + int(self._counts[place])]

    def __getstate__(self) -> dict[str, Any]:
        # a loader's worker opens the files itself, and runs no model
        return {**self.__dict__, "_handles": {}, "fallback": None}

    # --------------------------------------------------------------------------------------------------- building

    @staticmethod
    def estimate_bytes(dataset: Any, hidden_size: int, dtype: torch.dtype = torch.float32) -> int:
        """Size of the hidden states on disk: distinct label tokens x hidden size x bytes a number."""
        tokens = sum(shard.tokens for shard in plan_shards(dataset, 1 << 62))
        return tokens * hidden_size * dtype.itemsize

    @classmethod
    def build(
        cls,
        path: str | Path,
        teacher: OnlineTeacher | nn.Module,
        dataset: Any,
        *,
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
            teacher: the model, on its device.
            dataset: tokenised rows (`sample_id`, `input_ids`, `labels`): training rows, and evaluation rows if the
                trainer is to evaluate with the cache.
            dtype: float32, bfloat16 or float16; None keeps the teacher's, which loses nothing.
            tokenizer, template: noted, so that `open` can compare them.
            batch_tokens: tokens of one forward pass, padding included.
            shard_mb: size of a shard in MiB.
            repair: read all shards, and write those again whose checksum is wrong.
            disable_tqdm: show no progress bar.

        Raises:
            ValueError: the folder holds a cache of something else (says what), no row has a label, or one is longer
                than the teacher's context (names the sample).
            OSError: the disk is too small; said before anything is written.
        """
        online = teacher if isinstance(teacher, OnlineTeacher) else OnlineTeacher(teacher)
        dtype = dtype or online.head.weight.dtype
        hidden_size = online.head.weight.shape[1]
        shards = plan_shards(dataset, max(1, shard_mb * 2**20 // (hidden_size * dtype.itemsize)))
        if not shards:
            raise ValueError("dataset has no row with a label; the teacher would have nothing to say")
        _check_context(dataset[shards[0].rows[0]], online.model)
        store, plan = Store(path), _plan(shards, online, tokenizer, template, dtype, hidden_size)
        existing = store.read_json("plan.json")
        if existing is not None:
            _compare(existing, plan, path)
        if repair:
            for part in (store.head_path, *map(store.shard_path, range(len(shards)))):
                if store.fault(part, full=True) is not None:
                    store.discard(part)
        missing = [i for i in range(len(shards)) if store.shard_fault(i) is not None]
        _check_space(store.folder, sum(shards[i].tokens for i in missing) * hidden_size * dtype.itemsize)
        store.folder.mkdir(parents=True, exist_ok=True)
        if store.fault(store.head_path) is not None:
            store.write_head(online.head)
        if existing is None:
            store.write_json("plan.json", plan)
        _write_missing(store, shards, online, dataset, dtype, batch_tokens, disable_tqdm)
        store.finish(plan)
        return cls.open(path)


def _plan(
    shards: Sequence[ShardPlan],
    online: OnlineTeacher,
    tokenizer: Any,
    template: str | None,
    dtype: Any,
    hidden_size: int,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        **_fingerprint(online.model, tokenizer, template),
        "data": data_fingerprint(shards),
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": hidden_size,
        "scale": online.head.scale,
        "softcap": online.head.softcap,
        "num_shards": len(shards),
        "num_samples": sum(len(shard.keys) for shard in shards),
        "num_tokens": sum(shard.tokens for shard in shards),
    }


def _check_context(longest: Mapping[str, Any], teacher: nn.Module) -> None:
    view, tokens = view_of(teacher), len(longest["input_ids"])
    if view.context and tokens > view.context:
        raise ValueError(
            f"dataset: sample {longest.get('sample_id')} has {tokens} tokens, and the context of the teacher, a "
            f"{view.name}, is {view.context}; make rows with max_length={view.context} at most"
        )


def _fingerprint(teacher: Any, tokenizer: Any, template: str | None) -> dict[str, str]:
    parts = {
        "teacher": None if teacher is None else model_fingerprint(teacher),
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "template": template,
    }
    return {name: value for name, value in parts.items() if value is not None}


def _compare(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str | Path) -> None:
    names = {"teacher": "another teacher", "tokenizer": "another tokenizer", "template": "another template",
             "data": "another data set", "dtype": "another dtype", "num_shards": "another shard size",
             "format": "another version of the format"}  # fmt: skip
    differing = [
        text for name, text in names.items() if name in wanted and found.get(name, wanted[name]) != wanted[name]
    ]
    if differing:
        raise ValueError(
            f"path {path} holds the cache of {', '.join(differing)}; choose another folder or remove this one"
        )


def _check_space(folder: Path, needed: int) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the teacher cache needs {needed / 1e9:.2f} GB in {folder}, and {free / 1e9:.2f} GB are free; free some, "
            "choose another disk, store bfloat16, or train with the online teacher",
        )


def _write_missing(
    store: Store,
    shards: Sequence[ShardPlan],
    online: OnlineTeacher,
    dataset: Any,
    dtype: torch.dtype,
    batch_tokens: int,
    disable_tqdm: bool,
) -> None:
    """Write shards until none is missing, leaving those alone that other processes are writing."""
    from tqdm.auto import tqdm

    done = [i for i in range(len(shards)) if store.shard_fault(i) is None]
    total, initial = sum(s.tokens for s in shards), sum(shards[i].tokens for i in done)
    pending = [i for i in range(len(shards)) if i not in set(done)]
    with tqdm(
        total=total, initial=initial, desc="teacher cache", unit="tok", unit_scale=True, disable=disable_tqdm
    ) as bar:
        while pending:
            for i in pending:
                with store.lock(i) as mine:
                    if mine and store.shard_fault(i) is not None:
                        store.write_shard(
                            i, shards[i], _run(online, dataset, shards[i], dtype, batch_tokens, bar.update)
                        )
            still = [i for i in pending if store.shard_fault(i) is not None]
            if len(still) == len(pending):
                time.sleep(_WAIT_SECONDS)
            pending = still


def _run(
    online: OnlineTeacher,
    dataset: Any,
    plan: ShardPlan,
    dtype: torch.dtype,
    batch_tokens: int,
    report: Callable[[int], Any],
) -> Tensor:
    """Hidden states of one shard [tokens, H] on the CPU, in batches of like length."""
    parts = []
    place = 0
    while place < len(plan.rows):
        longest = len(dataset[plan.rows[place]]["input_ids"])  # rows come longest first
        size = max(1, batch_tokens // longest)
        samples = [dataset[row] for row in plan.rows[place : place + size]]
        parts.append(online.hidden_states(_padded(samples)).to(dtype))
        report(sum(plan.counts[place : place + size]))
        place += size
    return torch.cat(parts)


def _padded(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    from pocl.data import Collator

    return Collator(pad_token_id=0)(samples)
