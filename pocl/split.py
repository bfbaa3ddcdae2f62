"""Holding prompts out for validation and test, the same ones every time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence


def normalized(text: str) -> str:
    """Case-folded words with single spaces between: what two spellings of the same question have in common."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def hold_out(prompts: Iterable[str], sizes: Sequence[int], *, seed: int) -> list[list[int]]:
    """Indices of disjoint parts of at most `sizes` samples, and, last, of all the rest in random but fixed order.

    Equal prompts (see `normalized`) stay together, so that no part repeats a question of another. A prompt's place is a
    hash of the seed and its text: it keeps its part when others are added, and no random state is involved.

    Raises:
        ValueError: a negative size, or nothing left for the last part.
    """
    if any(size < 0 for size in sizes):
        raise ValueError(f"sizes must not be negative, got {list(sizes)}")
    groups: dict[bytes, list[int]] = {}  # by digest: the texts of a million prompts need not be kept
    for index, prompt in enumerate(prompts):
        text = normalized(prompt) or prompt
        groups.setdefault(hashlib.sha256(f"{seed}:{text}".encode()).digest(), []).append(index)
    order = sorted(groups)
    parts: list[list[int]] = []
    for size in sizes:
        part: list[int] = []
        left_over = []
        for digest in order:
            if len(part) + len(groups[digest]) <= size:
                part += groups[digest]
            else:
                left_over.append(digest)
        parts.append(sorted(part))
        order = left_over
    rest = [index for digest in order for index in groups[digest]]
    if not rest:
        count = sum(map(len, groups.values()))
        raise ValueError(
            f"{count} samples with {len(groups)} distinct prompts leave none to train on after holding out "
            f"{' and '.join(map(str, sizes))}; hold out fewer"
        )
    return [*parts, rest]
