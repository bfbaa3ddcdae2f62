"""The difficulty ranking: several criteria, one rank a sample, by reciprocal rank fusion.

    rrf_score(i) = sum_c weight_c / (k + rank_c(i))

where `rank_c` counts from 1 = easiest under criterion c. Samples are then ordered by falling score and cut into
subsets, easy first. Source: arXiv 2506.05695, section 3.2; fusion: Cormack et al., SIGIR 2009, k = 60.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

DIRECTIONS = ("ascending", "descending")
PARTITIONS = ("count", "quantile")


@dataclass(frozen=True)
class Criterion:
    """One column of the scores and how it speaks of difficulty."""

    column: str
    direction: str = "ascending"
    """`ascending`: small values are easy (cross-entropy); `descending`: large values are easy (ROUGE-L)."""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(
                f"direction of criterion {self.column!r} must be one of {', '.join(DIRECTIONS)}, got {self.direction!r}"
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight of criterion {self.column!r} must be positive and finite, got {self.weight}")


ROUGE_L = Criterion("rouge_l", "descending")
CROSS_ENTROPY = Criterion("cross_entropy", "ascending")
RESPONSE_LENGTH = Criterion("num_tokens", "ascending")
TEACHER_CROSS_ENTROPY = Criterion("teacher_cross_entropy", "ascending")
KL_TO_TEACHER = Criterion("kl_to_teacher", "ascending")
PAPER_CRITERIA = (ROUGE_L, CROSS_ENTROPY)


def ordinal_ranks(values: Sequence[float], *, direction: str = "ascending") -> list[int]:
    """1-based ranks of `values`, 1 = easiest; ties keep their order, so the ranks are a permutation of 1..N."""
    order = sorted(range(len(values)), key=lambda i: values[i], reverse=direction == "descending")
    ranks = [0] * len(values)
    for position, index in enumerate(order, start=1):
        ranks[index] = position
    return ranks


def rank(
    scores: Dataset,
    *,
    k: float = 60,
    num_subsets: int = 4,
    criteria: Sequence[Criterion | Mapping[str, Any]] = PAPER_CRITERIA,
    partition: str = "count",
) -> Dataset:
    """Adds `rank` (1 = easiest), `rrf_score` and `subset` (0 = easiest) to a table of scores.

    Args:
        scores: one row a sample; has a column for every criterion.
        k: the constant of reciprocal rank fusion.
        num_subsets: into how many subsets the ranking is cut.
        criteria: which columns count, in which direction and with what weight.
        partition: `count` gives parts of floor(N / n) with the remainder in the last, as the paper does;
            `quantile` cuts at the n-quantiles of `rrf_score`: sizes differ by one at most, except that samples of
            equal score stay together.

    Returns:
        The same rows in the same order with the three columns, and `rank_<column>` for each criterion.

    Raises:
        ValueError: missing column, non-finite value (names the sample), more subsets than samples, an empty subset,
            or a bad argument.
    """
    chosen = tuple(c if isinstance(c, Criterion) else Criterion(**c) for c in criteria)
    _check(scores, k, num_subsets, chosen, partition)
    columns = {f"rank_{c.column}": ordinal_ranks(_finite(scores, c), direction=c.direction) for c in chosen}
    weights = [c.weight for c in chosen]
    # fsum rounds once: samples with the same ranks under other criteria tie exactly, whatever the criteria's order
    fused = [
        math.fsum(w / (k + r) for w, r in zip(weights, ranks, strict=True))
        for ranks in zip(*columns.values(), strict=True)
    ]
    ranks = ordinal_ranks(fused, direction="descending")
    subsets = _by_count(ranks, num_subsets) if partition == "count" else _by_quantile(fused, ranks, num_subsets)
    new = {"rank": ranks, "rrf_score": fused, "subset": subsets, **columns}
    out = scores.remove_columns([c for c in new if c in scores.column_names])
    for name, values in new.items():
        out = out.add_column(name, values)
    return out


def _check(scores: Dataset, k: float, num_subsets: int, criteria: Sequence[Criterion], partition: str) -> None:
    if not criteria:
        raise ValueError("criteria is empty; give at least one, for example PAPER_CRITERIA")
    names = [c.column for c in criteria]
    if len(set(names)) < len(names):
        raise ValueError(f"criteria name a column twice: {', '.join(names)}; give each once, with a weight")
    missing = [name for name in names if name not in scores.column_names]
    if missing:
        raise ValueError(
            f"scores lack the columns {', '.join(missing)} of the criteria; they have {', '.join(scores.column_names)}"
        )
    if not (math.isfinite(k) and k >= 0):
        raise ValueError(f"k must be finite and not negative, got {k}; the paper uses 60")
    if not 1 <= num_subsets <= len(scores):
        raise ValueError(
            f"num_subsets must be between 1 and the number of samples ({len(scores)}), got {num_subsets}; "
            "use fewer stages or more data"
        )
    if partition not in PARTITIONS:
        raise ValueError(f"partition must be one of {', '.join(PARTITIONS)}, got {partition!r}")


def _finite(scores: Dataset, criterion: Criterion) -> list[float]:
    values = [math.nan if v is None else float(v) for v in scores[criterion.column]]
    bad = [i for i, v in enumerate(values) if not math.isfinite(v)]
    if bad:
        ids = scores["sample_id"] if "sample_id" in scores.column_names else range(len(scores))
        raise ValueError(
            f"criterion {criterion.column!r} is not finite for sample {ids[bad[0]]}"
            f"{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}; score it again or drop it"
        )
    return values


def _by_count(ranks: Sequence[int], n: int) -> list[int]:
    size = len(ranks) // n
    return [min((r - 1) // size, n - 1) for r in ranks]


def _by_quantile(fused: Sequence[float], ranks: Sequence[int], n: int) -> list[int]:
    # A sample's place is that of the first (easiest) sample with its score: ties never straddle a cut.
    first: dict[float, int] = {}
    for r, score in sorted(zip(ranks, fused, strict=True)):
        first.setdefault(score, r)
    subsets = [(first[score] - 1) * n // len(fused) for score in fused]
    empty = sorted(set(range(n)) - set(subsets))
    if empty:
        raise ValueError(
            f'partition="quantile" leaves subset {empty[0]} empty, for too many samples have the same score; '
            'use partition="count", fewer subsets or another criterion'
        )
    return subsets
