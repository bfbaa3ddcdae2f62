"""The files of a stored teacher: a plan before it runs, shards one at a time, an index at the end.

    cache/
        plan.json                 fingerprint and the shards to be written
        head.safetensors          of hidden states: the teacher's projection, with head.json as for a shard
        shard-00000.safetensors   `keys` [samples] int64, `counts` [samples] int64, and by label token
                                  `hidden` [tokens, H], or `token_ids` [tokens, K] int32 and `log_probs` [tokens, K]
        shard-00000.json          checksum of the shard, written after it: the shard is whole
        shard-00000.lock          held while a process writes the shard; a dead process holds nothing
        index.json                written last: the cache is whole

A sample is found by its *key*, a hash of its token ids and labels. So the same text under another number is found,
another text under the same number is not, and a text that occurs twice is stored once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pocl.data.token_rows import chunks, is_table
from pocl.heads import IGNORE_INDEX
from pocl.modes import follow_umask
from pocl_kernels import Head

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sample_key(input_ids: Sequence[int], labels: Sequence[int]) -> int:
    """A 63-bit hash of a tokenised sample; the first label, which nothing predicts, is left out."""
    return _key(np.asarray(input_ids, dtype=np.int32).tobytes(), np.asarray(labels[1:], dtype=np.int32).tobytes())


def _key(input_ids: bytes, labels: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(input_ids + labels, digest_size=8).digest(), "little") >> 1


def label_count(labels: Sequence[int]) -> int:
    """Positions that predict a label: the first token is never predicted."""
    return int((np.asarray(labels[1:]) != IGNORE_INDEX).sum())


def keyed(dataset: Any) -> Iterator[tuple[int, int, int]]:
    """Length, label count and key of each row of a data set."""
    if not is_table(dataset):
        for row in range(len(dataset)):
            sample = dataset[row]
            ids, labels = sample["input_ids"], sample["labels"]
            yield len(ids), label_count(labels), sample_key(ids, labels)
        return
    for chunk in chunks(dataset, "dataset"):
        stops = np.cumsum(chunk.lengths)
        starts = stops - chunk.lengths
        predicted = (chunk.labels != IGNORE_INDEX).astype(np.int64)
        predicted[starts] = 0
        counts = np.add.reduceat(predicted, starts).tolist()
        ids, labels = chunk.ids.astype(np.int32).tobytes(), chunk.labels.astype(np.int32).tobytes()
        for start, stop, count in zip((4 * starts).tolist(), (4 * stops).tolist(), counts, strict=True):
            yield (stop - start) // 4, count, _key(ids[start:stop], labels[start + 4 : stop])


@dataclass(frozen=True)
class ShardPlan:
    """The samples of one shard, as row numbers of the data, with their keys and label counts."""

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.counts)


def plan_shards(dataset: Any, tokens_per_shard: int) -> list[ShardPlan]:
    """Split the distinct samples with labels into shards; long samples first, so that lengths in a shard are alike.

    Args:
        dataset: tokenised rows with `input_ids` and `labels`.
        tokens_per_shard: label tokens at which a shard is full.
    """
    seen: dict[int, tuple[int, int, int]] = {}  # key -> (length, row, count)
    for row, (length, count, key) in enumerate(keyed(dataset)):
        if count:
            seen.setdefault(key, (length, row, count))
    ordered = sorted(((-length, row, count, key) for key, (length, row, count) in seen.items()))
    shards: list[ShardPlan] = []
    members: list[tuple[int, int, int]] = []
    tokens = 0
    for _, row, count, key in ordered:
        if members and tokens + count > tokens_per_shard:
            shards.append(ShardPlan(*zip(*members, strict=True)))
            members, tokens = [], 0
        members.append((row, key, count))
        tokens += count
    if members:
        shards.append(ShardPlan(*zip(*members, strict=True)))
    return shards


class Store:
    """Reads and writes the files above.

    Args:
        folder: of the cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def shard_path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    @property
    def head_path(self) -> Path:
        return self.folder / "head.safetensors"

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the cache, None if it is not there.

        Raises:
            ValueError: it cannot be read.
        """
        path = self.folder / name
        try:
            return json.loads(path.read_text("utf-8")) if path.exists() else None
        except ValueError:
            raise ValueError(f"{path} is corrupted; remove it and start build again") from None

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._replace(self.folder / name, json.dumps(content, indent=1).encode())

    def write_head(self, head: Head) -> None:
        tensors = {"weight": head.weight.detach()} | ({} if head.bias is None else {"bias": head.bias.detach()})
        self._save(self.head_path, {n: t.contiguous().cpu() for n, t in tensors.items()})
        self._note(self.head_path)

    def read_head(self, scale: float, softcap: float | None) -> Head:
        tensors = load_file(self.head_path)
        return Head(tensors["weight"], tensors.get("bias"), scale=scale, softcap=softcap)

    def write_shard(self, index: int, plan: ShardPlan, of_tokens: Mapping[str, Tensor]) -> None:
        """Write a shard, then its checksum.

        Args:
            index: of the shard.
            plan: its samples.
            of_tokens: by name, tensors with a row for every label token.
        """
        assert all(len(tensor) == plan.tokens for tensor in of_tokens.values())
        tensors = {name: tensor.contiguous() for name, tensor in of_tokens.items()}
        path = self.shard_path(index)
        self._save(path, {**tensors, "keys": torch.tensor(plan.keys), "counts": torch.tensor(plan.counts)})
        self._note(path, tokens=plan.tokens)

    def read_tensor(self, index: int, name: str) -> Tensor:
        """One tensor of a shard, whole."""
        with safe_open(self.shard_path(index), framework="pt") as file:
            return file.get_tensor(name)

    def shard_fault(self, index: int, full: bool = False) -> str | None:
        """What is wrong with a shard, or None; the contents are read only if `full`."""
        return self.fault(self.shard_path(index), full)

    def fault(self, path: Path, full: bool = False) -> str | None:
        """What is wrong with a shard or the head, or None."""
        note = self.read_json(f"{path.stem}.json")
        if note is None and path == self.head_path and path.exists():
            return None  # it is there in full or not at all; the run died before it was noted
        if note is None or not path.exists():
            return "it is missing"
        if path.stat().st_size != note["bytes"]:
            return f"it has {path.stat().st_size} bytes instead of {note['bytes']}"
        if full and checksum(path) != note["checksum"]:
            return "its checksum is wrong"
        return None

    def discard(self, path: Path) -> None:
        """Remove a shard or the head."""
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    @contextmanager
    def lock(self, index: int) -> Iterator[bool]:
        """Whether this process may write the shard; the system frees the lock of a process that dies."""
        lock = FileLock(self.shard_path(index).with_suffix(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def finish(self, index: Mapping[str, Any]) -> None:
        """Write the index; nobody needs the locks, nor what dead processes left half written, from then on."""
        self.write_json("index.json", index)
        for pattern in ("*.lock", ".shard-*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def _note(self, path: Path, **further: int) -> None:
        content = {"checksum": checksum(path), "bytes": path.stat().st_size, **further}
        self.write_json(f"{path.stem}.json", content)

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file(tensors, temporary)
        follow_umask(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def _replace(self, path: Path, content: bytes) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def checksum(path: Path) -> str:
    """BLAKE2b of a file, 128 bits, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def data_fingerprint(shards: Sequence[ShardPlan]) -> str:
    """A hash of the set of distinct samples."""
    keys = np.sort(np.array([key for shard in shards for key in shard.keys], dtype=np.int64))
    return hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()
