"""What every stored teacher has in common: rows of numbers, found by the samples they belong to, built by shards."""

from __future__ import annotations

import errno
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pocl.engines import Engine, LocalEngine, ServerEngine
from pocl.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from pocl.teacher.online import OnlineTeacher
from pocl.teacher.store import FORMAT, ShardPlan, Store, data_fingerprint, keyed, label_count, plan_shards, sample_key

_WAIT_SECONDS = 0.5
_NO_LABELS = -1
_LOCAL = LocalEngine.name

Make = Callable[[Sequence[Mapping[str, Any]], Callable[[int], Any]], dict[str, Tensor]]
"""From samples, longest first, the tensors of a shard; reports label tokens as they are done."""


class StoredTeacher(ABC):
    """Reads what an engine said about every label position; see `HiddenStateCache` and `TopKCache`."""

    kind: ClassVar[str]
    """Of the store, as its plan and its index name it."""
    tensors: ClassVar[tuple[str, ...]]
    """Of a shard; each has a row for every label token."""
    fallback: Any = None
    """Asked for batches that are not in the store."""

    def __init__(self, store: Store, index: Mapping[str, Any]) -> None:
        self.store, self.index = store, index
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

    @property
    def num_tokens(self) -> int:
        """Label tokens in the store."""
        return int(self._counts.sum())

    def contains(self, samples: Sequence[Mapping[str, Any]]) -> bool:
        """Whether every sample with a label is in the store."""
        return all(self._find(sample) is not None for sample in samples)

    def check_contains(self, dataset: Any) -> None:
        """Raise a ValueError unless every row of a tokenised data set is in the store."""
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

    @abstractmethod
    def lookups(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """What a loader attaches to the batch of these samples, under the names by which the batch is read."""

    def _gather(self, samples: Sequence[Mapping[str, Any]]) -> list[Tensor] | None:
        """The stored tensors of samples, in order; None where they have no label."""
        places = [self._find(sample) for sample in samples]
        if None in places:
            self.check_contains(samples)
        parts = [self._read(place) for place in places if place is not None and place != _NO_LABELS]
        return [torch.cat(each) for each in zip(*parts, strict=True)] if parts else None

    def _find(self, sample: Mapping[str, Any]) -> int | None:
        """Place of a sample in the index, None if it is not there."""
        if not label_count(sample["labels"]):
            return _NO_LABELS
        key = sample_key(sample["input_ids"], sample["labels"])
        place = int(np.searchsorted(self._keys, key))
        return place if place < len(self._keys) and self._keys[place] == key else None

    def _read(self, place: int) -> list[Tensor]:
        shard, start = int(self._shards[place]), int(self._starts[place])
        if shard not in self._handles:
            file = safe_open(self.store.shard_path(shard), framework="pt")
            self._handles[shard] = [file.get_slice(name) for name in self.tensors]
        stop = start + int(self._counts[place])
        return [each[start:stop] for each in self._handles[shard]]

    def __getstate__(self) -> dict[str, Any]:
        # a loader's worker opens the files itself, and runs no model
        return {**self.__dict__, "_handles": {}, "fallback": None}


def opened(
    kind: type[StoredTeacher],
    path: str | Path,
    *,
    teacher: Any = None,
    tokenizer: Any = None,
    template: str | None = None,
    verify: bool = False,
) -> tuple[Store, dict[str, Any]]:
    """A finished store and its index, compared with what is given.

    Raises:
        ValueError: see `HiddenStateCache.open`.
    """
    store = Store(path)
    index = store.read_json("index.json")
    if index is None:
        state = "is unfinished" if store.read_json("plan.json") else "holds no cache"
        raise ValueError(f"path {path} {state}; (re)start {kind.__name__}.build with it, which goes on from there")
    wanted = _marks(tokenizer, template) | ({} if teacher is None else _engine_marks(teacher))
    _compare(index, {"kind": kind.kind, **wanted}, path)
    heads = [store.head_path] if "scale" in index else []
    for part in (*heads, *map(store.shard_path, range(index["num_shards"]))):
        fault = store.fault(part, full=verify)
        if fault is not None:
            raise ValueError(f"{part} is corrupted: {fault}; {kind.__name__}.build(..., repair=True) writes it again")
    return store, index


def built(
    kind: type[StoredTeacher],
    path: str | Path,
    engine: Engine,
    dataset: Any,
    make: Make,
    *,
    token_bytes: int,
    further: Mapping[str, Any],
    tokenizer: Any,
    template: str | None,
    shard_mb: int,
    repair: bool,
    disable_tqdm: bool,
) -> None:
    """Fill a store, or what is missing of it. See `HiddenStateCache.build` for the arguments that are not named here.

    Args:
        kind: whose store.
        engine: whose head is stored, too, where `further` has a scale.
        make: the tensors of a shard from its samples.
        token_bytes: of one label token.
        further: entries of the plan that decide the bytes of a shard.
    """
    shards = plan_shards(dataset, max(1, shard_mb * 2**20 // token_bytes))
    if not shards:
        raise ValueError("dataset has no row with a label; the teacher would have nothing to say")
    with_head = "scale" in further
    store = Store(path)
    plan = {
        "format": FORMAT,
        "kind": kind.kind,
        **_marks(tokenizer, template),
        **_engine_marks(engine),
        "data": data_fingerprint(shards),
        **further,
        "num_shards": len(shards),
        "num_samples": sum(len(shard.keys) for shard in shards),
        "num_tokens": sum(shard.tokens for shard in shards),
    }
    _check_context(dataset[shards[0].rows[0]], engine)
    existing = store.read_json("plan.json")
    if existing is not None:
        _compare(existing, plan, path)
    if repair:
        for part in (*[store.head_path] * with_head, *map(store.shard_path, range(len(shards)))):
            if store.fault(part, full=True) is not None:
                store.discard(part)
    missing = [i for i in range(len(shards)) if store.shard_fault(i) is not None]
    _check_space(store.folder, sum(shards[i].tokens for i in missing) * token_bytes)
    store.folder.mkdir(parents=True, exist_ok=True)
    if with_head and store.fault(store.head_path) is not None:
        store.write_head(engine.head())
    if existing is None:
        store.write_json("plan.json", plan)
    if isinstance(engine, ServerEngine):
        engine.recognise(store.folder, dataset[shards[-1].rows[-1]])
    _write_missing(store, shards, dataset, make, disable_tqdm)
    store.finish(plan)


def estimated_bytes(dataset: Any, token_bytes: int) -> int:
    """Of the distinct label tokens of a data set."""
    return token_bytes * sum(shard.tokens for shard in plan_shards(dataset, 1 << 62))


def _check_context(longest: Mapping[str, Any], engine: Engine) -> None:
    tokens, model = len(longest["input_ids"]), getattr(engine, "model", None)
    whose = f"a {type(model).__name__}" if isinstance(model, nn.Module) else f"in the engine {engine.name}"
    if engine.context and tokens > engine.context:
        raise ValueError(
            f"dataset: sample {longest.get('sample_id')} has {tokens} tokens, and the context of the teacher, {whose}, "
            f"is {engine.context}; make rows with max_length={engine.context} at most"
        )


def _marks(tokenizer: Any, template: str | None) -> dict[str, str]:
    marks = {"tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer), "template": template}
    return {name: value for name, value in marks.items() if value is not None}


def _engine_marks(teacher: Any) -> dict[str, str]:
    if isinstance(teacher, OnlineTeacher):
        teacher = teacher.model
    if isinstance(teacher, nn.Module):
        return {"teacher": model_fingerprint(teacher), "engine": _LOCAL}
    return {"teacher": teacher.fingerprint(), "engine": teacher.name}


def _compare(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str | Path) -> None:
    names = {"kind": "another kind (hidden states or top-k)", "teacher": "another teacher",
             "engine": "another engine", "tokenizer": "another tokenizer", "template": "another template",
             "data": "another data set", "dtype": "another dtype", "top_k": "another top_k",
             "num_shards": "another shard size", "format": "another version of the format"}  # fmt: skip
    found = {"kind": "hidden_states", "engine": _LOCAL, **found}  # of stores from before there were others
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
            "choose another disk, store bfloat16 or a smaller top_k, or train with the online teacher",
        )


def _write_missing(store: Store, shards: Sequence[ShardPlan], dataset: Any, make: Make, disable_tqdm: bool) -> None:
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
                        samples = [dataset[row] for row in shards[i].rows]  # longest first
                        store.write_shard(i, shards[i], make(samples, bar.update))
            still = [i for i in pending if store.shard_fault(i) is not None]
            if len(still) == len(pending):
                time.sleep(_WAIT_SECONDS)
            pending = still
