"""Intervals of paired differences between two arms, over seeds and test samples at once.

The difference of seed s on sample i is modelled as `d[s, i] = mean + seed[s] + sample[i] + rest[s, i]`, all random:
another seed trains another student, another test set asks other questions. The variance of the mean follows from the
mean squares of a two-way table, its degrees of freedom by Satterthwaite's rule, the interval by Student's t.

Why no bootstrap: with five seeds, one that draws seeds and samples anew covers 83 to 89 % where it says 95 %, for five
numbers know too little of their own spread. The t interval covers 94 to 96 %, whichever of the three variances rules;
`tests/pocl/compare/test_statistics.py` simulates both.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_SEEDS = 1000


@dataclass(frozen=True)
class MeanSquares:
    """Of a table of seeds and samples, and of what neither explains."""

    seed: float
    sample: float
    rest: float


@dataclass(frozen=True)
class Estimate:
    """A mean paired difference, and what is known of its error."""

    mean: float
    half: float | None
    """Half of the interval; None for a single seed, which tells nothing of other seeds."""
    seeds: int
    samples: int
    confidence: float
    """Of this interval alone: higher than what is wanted of all intervals together."""
    squares: MeanSquares | None = field(repr=False)

    @property
    def told(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def more_seeds(self) -> int | None:
        """How many more seeds would tell the difference from 0 if it and its spread are what they seem; 0: it is told.

        None: unknown with a single seed; else no number of seeds would, but more test samples might.
        """
        if self.squares is None:
            return None
        return _more_seeds(self.mean, self.squares, self.seeds, self.samples, self.confidence)


def estimate(
    differences: NDArray[Any],  # [seeds, samples]
    weights: NDArray[Any] | None = None,  # [samples]
    *,
    confidence: float = 0.95,
    comparisons: int = 1,
) -> Estimate:
    """The mean of paired differences, with an interval for the seeds and the samples that were not seen.

    Args:
        differences: one arm minus the other, for each seed and test sample.
        weights: of the samples in the mean, such as their response tokens; equal when left out.
        confidence: that all `comparisons` intervals of a family cover at once, by Bonferroni's inequality.
        comparisons: intervals in the family.

    Raises:
        ValueError: a table that is empty or not finite, weights that do not fit, or fewer than two samples.
    """
    table = np.asarray(differences, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2 or not np.isfinite(table).all():
        raise ValueError(
            f"differences must be finite numbers for [seeds >= 1, samples >= 2], got the shape {list(table.shape)}"
        )
    seeds, samples = table.shape
    share = np.ones(samples) if weights is None else np.asarray(weights, dtype=np.float64)
    if share.shape != (samples,) or not (share.sum() > 0 and (share >= 0).all()):
        raise ValueError(f"weights must be {samples} numbers >= 0, one a sample, got the shape {list(share.shape)}")
    share = share / share.sum()
    mean = float((table @ share).mean())
    alone = 1 - (1 - confidence) / comparisons
    if seeds == 1:
        return Estimate(mean, None, seeds, samples, alone, None)
    # A weighted mean is a ratio of sums; these are the samples' contributions to it, whose plain mean it is.
    squares = _mean_squares(mean + samples * share * (table - mean))
    half = _half(squares, seeds, samples, alone)
    return Estimate(mean, half, seeds, samples, alone, squares)


def _mean_squares(table: NDArray[np.float64]) -> MeanSquares:
    seeds, samples = table.shape
    mean, by_seed, by_sample = table.mean(), table.mean(1), table.mean(0)
    rest = table - by_seed[:, None] - by_sample[None] + mean
    return MeanSquares(
        samples * float(((by_seed - mean) ** 2).sum()) / (seeds - 1),
        seeds * float(((by_sample - mean) ** 2).sum()) / (samples - 1),
        float((rest**2).sum()) / ((seeds - 1) * (samples - 1)),
    )


def _half(squares: MeanSquares, seeds: int, samples: int, confidence: float) -> float:
    """Half of the interval of the mean of such a table."""
    a, b, e = squares.seed, squares.sample, squares.rest
    variance = max(a + b - e, min(a, b))
    if variance == 0:
        return 0.0
    spread = a**2 / (seeds - 1) + max(b - e, 0.0) ** 2 / (samples - 1)
    freedom = max(variance**2 / spread, seeds - 1.0) if spread else float(seeds * samples)
    return student_t(0.5 + confidence / 2, round(freedom, 2)) * math.sqrt(variance / (seeds * samples))


def _more_seeds(mean: float, squares: MeanSquares, seeds: int, samples: int, confidence: float) -> int | None:
    """The fewest seeds that would tell, less those there are, were mean and variances what they seem."""
    of_seed = max(squares.seed - squares.rest, 0.0) / samples
    of_sample = max(squares.sample - squares.rest, 0.0) / seeds

    def tells(count: int) -> bool:
        then = MeanSquares(samples * of_seed + squares.rest, count * of_sample + squares.rest, squares.rest)
        return abs(mean) > _half(then, count, samples, confidence)

    if abs(mean) > _half(squares, seeds, samples, confidence):
        return 0
    low, high = seeds, seeds + 1
    while not tells(high):
        if high > MOST_SEEDS:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tells(middle) else (middle, high)
    return high - seeds


@functools.cache
def student_t(probability: float, freedom: float) -> float:
    """The quantile of Student's t for a probability of at least one half and `freedom` >= 1, to four digits.

    With `t = sqrt(freedom) * tan(angle)` the density becomes `cos(angle) ** (freedom - 1)` times a constant.
    """
    freedom = min(freedom, 2000.0)
    angle = np.linspace(0, math.pi / 2, 8193)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    found = np.interp(2 * probability - 1, below / below[-1], angle)
    return math.sqrt(freedom) * math.tan(float(found))
