"""The order of samples, as a pure function of (seed, stage, epoch), whatever the number of processes.

Every epoch of a stage yields each of its rows once. Several processes need whole batches; the rows that are missing are
*fillers*: real rows whose labels are all ignored, so they add nothing to loss or gradient.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from pocl.data.token_rows import row_lengths
from pocl.heads import IGNORE_INDEX


def derived_seed(*numbers: int) -> int:
    """A seed below 2**31 from several numbers: the same everywhere and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "little") >> 1


class StageRows(Dataset[dict[str, Any]]):
    """The chosen rows of a data set, and behind them as many fillers as anyone asks for.

    Args:
        rows: map-style data set of dicts with `input_ids` and `labels`.
        chosen: row numbers.
    """

    def __init__(self, rows: Any, chosen: Sequence[int]) -> None:
        self.rows = rows
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def lengths(self) -> list[int]:
        """Tokens of each chosen row."""
        found: list[int] = row_lengths(self.rows)[np.asarray(self.chosen, dtype=np.int64)].tolist()
        return found

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.rows[self.chosen[index % len(self.chosen)]])
        if index >= len(self.chosen):
            row["labels"] = [IGNORE_INDEX] * len(row["labels"])
        return row


class StageSampler(Sampler[int]):
    """Indices into `StageRows`: a permutation of the rows, then fillers up to a multiple of `micro_batch`.

    Args:
        lengths: tokens of each row; only used by `order="group_by_length"`.
        order: `random`, `sequential`, or `group_by_length` (random, but rows of like length share a batch).
        micro_batch: rows of one forward pass over all processes.
        batch: rows of one optimizer step over all processes and accumulation.
        seed: of the permutation; together with the epoch it fixes the order.
        epoch: tells the epoch when an iteration starts.
    """

    def __init__(
        self,
        count: int,
        *,
        order: str = "random",
        lengths: Sequence[int] | None = None,
        micro_batch: int = 1,
        batch: int = 1,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        if order not in ("random", "sequential", "group_by_length"):
            raise ValueError(
                f"train_sampling_strategy must be random, sequential or group_by_length, got {order!r}; other "
                "strategies would make the order depend on the number of processes"
            )
        self.count, self.order, self.lengths, self.batch = count, order, lengths, batch
        self.total = math.ceil(count / micro_batch) * micro_batch
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        indices = list(range(self.count))
        if self.order != "sequential":
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch()))
            indices = torch.randperm(self.count, generator=generator).tolist()
            if self.order == "group_by_length":
                indices = self._grouped(indices, generator)
        yield from indices
        yield from range(self.count, self.total)

    def _grouped(self, indices: list[int], generator: torch.Generator) -> list[int]:
        """Sort by length inside pools of 32 batches, then shuffle whole batches; a short batch stays last."""
        assert self.lengths is not None
        pool = 32 * self.batch
        batches: list[list[int]] = []
        for start in range(0, len(indices), pool):
            by_length = sorted(indices[start : start + pool], key=lambda i: self.lengths[i])  # type: ignore[index]
            batches += [by_length[i : i + self.batch] for i in range(0, len(by_length), self.batch)]
        short = [batches.pop()] if len(batches[-1]) < self.batch else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [i for batch in [batches[j] for j in order] + short for i in batch]
