"""The difficulty ranking: several criteria, one rank a sample, by reciprocal rank fusion.

    rrf_score(i) = sum_c weight_c / (k + rank_c(i))

where `rank_c` counts from 1 = easiest under criterion c. Samples are then ordered by falling score and cut into
subsets, easy first. Source: arXiv 2506.05695, section 3.2; fusion: Cormack et al., SIGIR 2009, k = 60.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pocl.data.tables import arrow_column
from pocl.run_folder import fingerprint

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger(__name__)

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


def ordinal_ranks(values: ArrayLike, *, direction: str = "ascending") -> NDArray[np.int64]:
    """1-based ranks of finite `values` [N], 1 = easiest; ties keep their order: the ranks are a permutation of 1..N."""
    keys = np.asarray(values, dtype=np.float64)
    order = np.argsort(-keys if direction == "descending" else keys, kind="stable")
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = np.arange(1, len(keys) + 1)
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
    finite = {c.column: _finite(scores, c) for c in chosen}
    _warn_of_constants(finite)
    columns = {f"rank_{c.column}": ordinal_ranks(finite[c.column], direction=c.direction) for c in chosen}
    # rounded once: samples with the same ranks under other criteria tie exactly, whatever the criteria's order
    fused = _exact_sums(
        [np.divide(c.weight, k + ranks, dtype=np.float64) for c, ranks in zip(chosen, columns.values(), strict=True)]
    )
    ranks = ordinal_ranks(fused, direction="descending")
    subsets = _by_count(ranks, num_subsets) if partition == "count" else _by_quantile(fused, ranks, num_subsets)
    new = {"rank": ranks, "rrf_score": fused, "subset": subsets, **columns}
    out = scores.remove_columns([c for c in new if c in scores.column_names])
    # a fingerprint that is given spares `datasets` the pickling of every value
    settings = [scores._fingerprint, k, num_subsets, list(map(asdict, chosen)), partition]
    for name, values in new.items():
        out = out.add_column(name, values, new_fingerprint=fingerprint([*settings, name]))
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


def _warn_of_constants(values: Mapping[str, NDArray[np.float64]]) -> None:
    same = [f"{name} ({column[0]:g})" for name, column in values.items() if len(column) > 1 and np.ptp(column) == 0]
    if same:
        logger.warning(
            "%s: the same for all %d samples, so it ranks them in the order of the data and says nothing of difficulty",
            ", ".join(same),
            len(next(iter(values.values()))),
        )


def _finite(scores: Dataset, criterion: Criterion) -> NDArray[np.float64]:
    values = _numbers(arrow_column(scores, criterion.column), criterion.column)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        ids = scores["sample_id"] if "sample_id" in scores.column_names else range(len(scores))
        raise ValueError(
            f"criterion {criterion.column!r} is not finite for sample {ids[int(bad[0])]}"
            f"{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}; score it again or drop it"
        )
    return values


def _numbers(column: pa.ChunkedArray, name: str) -> NDArray[np.float64]:
    """A column as float64, null as NaN."""
    import pyarrow as pa

    try:
        return column.cast(pa.float64(), safe=False).to_numpy()
    except pa.ArrowException:
        raise ValueError(
            f"criterion {name!r} must be a column of numbers, got one of type {column.type}; name another column"
        ) from None


def _exact_sums(terms: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Elementwise sums, each rounded once, as `math.fsum` rounds: what is lost is added up beside the sum."""
    total, lost, size = terms[0], np.zeros_like(terms[0]), np.zeros_like(terms[0])
    for term in terms[1:]:
        new = total + term
        kept = new - total
        error = (total - (new - kept)) + (term - kept)  # exactly what this addition lost (Knuth's TwoSum)
        total, lost, size = new, lost + error, size + np.abs(error)
    slack = size * (len(terms) * np.finfo(np.float64).eps)  # of `lost`, which is a sum of rounded numbers itself
    low, high = total + (lost - slack), total + (lost + slack)
    for i in np.flatnonzero(low != high):  # between two numbers by a hair: few, if any
        high[i] = math.fsum(float(term[i]) for term in terms)
    return high


def _by_count(ranks: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    return np.minimum((ranks - 1) // (len(ranks) // n), n - 1)


def _by_quantile(fused: NDArray[np.float64], ranks: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    # A sample's place is that of the first (easiest) sample with its score: ties never straddle a cut.
    ordered = np.empty_like(fused)
    ordered[ranks - 1] = fused  # easiest first, that is, from large to small
    first = len(fused) - np.searchsorted(ordered[::-1], fused, side="right")
    subsets = first * n // len(fused)
    empty = np.setdiff1d(np.arange(n), subsets)
    if len(empty):
        raise ValueError(
            f'partition="quantile" leaves subset {empty[0]} empty, for too many samples have the same score; '
            'use partition="count", fewer subsets or another criterion'
        )
    return subsets
