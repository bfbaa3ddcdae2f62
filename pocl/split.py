"""Holding prompts out for validation and test, the same ones every time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def normalized(text: str) -> str:
    """Case-folded words with single spaces between: what two spellings of the same question have in common."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def hold_out(prompts: Iterable[str], sizes: Sequence[int], *, seed: int) -> list[NDArray[np.int64]]:
    """Indices of disjoint parts of at most `sizes` samples, and, last, of all the rest in random but fixed order.

    Equal prompts (see `normalized`) stay together, so that no part repeats a question of another. A prompt's place is a
    hash of the seed and its text: it keeps its part when others are added, and no random state is involved. Of a prompt
    no more than that hash is kept in memory.

    Raises:
        ValueError: a negative size, or nothing left for the last part.
    """
    if any(size < 0 for size in sizes):
        raise ValueError(f"sizes must not be negative, got {list(sizes)}")
    marks = b"".join(hashlib.sha256(f"{seed}:{normalized(prompt) or prompt}".encode()).digest() for prompt in prompts)
    digits = np.frombuffer(marks, dtype=">u8").reshape(-1, 4).astype(np.uint64)  # as the bytes sort, so do these
    order = np.lexsort(digits.T[::-1])  # equal prompts side by side, in their order
    changes = np.flatnonzero((digits[order[1:]] != digits[order[:-1]]).any(axis=1)) + 1
    starts = np.concatenate([[0], changes]) if len(order) else np.empty(0, np.int64)
    counts = np.diff([*starts, len(order)])
    free = np.ones(len(starts), dtype=bool)
    parts: list[NDArray[np.int64]] = []
    for size in sizes:
        chosen: list[NDArray[np.int64]] = []
        room = size
        for group in np.flatnonzero(free).tolist() if size else []:
            if counts[group] <= room:
                chosen.append(order[starts[group] : starts[group] + counts[group]])
                free[group] = False
                room -= int(counts[group])
            if not room:
                break
        parts.append(np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64))
    rest = order[np.repeat(free, counts)]
    if not len(rest):
        raise ValueError(
            f"{len(order)} samples with {len(starts)} distinct prompts leave none to train on after holding out "
            f"{' and '.join(map(str, sizes))}; hold out fewer"
        )
    return [*parts, rest]
