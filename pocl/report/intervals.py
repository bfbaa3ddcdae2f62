"""How far a mean over samples may be off: 95 % intervals by bootstrap over the samples (Efron, 1979), seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_RESAMPLES = 2000
_PER_TOKEN = ("cross_entropy", "kl_to_teacher")  # means over tokens; the other measures are over samples


def half_width(result: Mapping[str, Any], measure: str) -> float | None:
    """Half of the 95 % interval of a measure's mean; None where the samples' own values are not known, or too few.

    Args:
        result: an evaluation with `of_each` (see `pocl.evaluate.EvaluationResult`).
        measure: `cross_entropy`, `kl_to_teacher`, `rouge_l` or `exact_match`.
    """
    ends = interval(result, measure)
    return None if ends is None else (ends[1] - ends[0]) / 2


def interval(result: Mapping[str, Any], measure: str) -> tuple[float, float] | None:
    """The 95 % interval itself; None as for `half_width`."""
    return _resampled(*_of_each(result, measure))


def difference(before: Mapping[str, Any], after: Mapping[str, Any], measure: str) -> tuple[float, float] | None:
    """95 % interval of `after - before` of a measure on the same samples; None as for `half_width`."""
    first, weights = _of_each(before, measure)
    last, _ = _of_each(after, measure)
    if len(first) != len(last):
        return None
    return _resampled([b - a for a, b in zip(first, last, strict=True)], weights)


def _of_each(result: Mapping[str, Any], measure: str) -> tuple[Sequence[float], Sequence[float]]:
    each = result.get("of_each") or {}
    values = each.get(measure) or []
    weights = each.get("num_tokens") if measure in _PER_TOKEN else None
    return values, weights or [1.0] * len(values)


def _resampled(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float] | None:
    """The middle 95 % of the weighted mean over samples drawn with replacement."""
    if len(values) < 3 or len(values) != len(weights):
        return None
    import numpy as np

    value, weight = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    generator = np.random.default_rng(0)
    means = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):  # one at a time: a matrix of all would not fit for large sets
        chosen = generator.integers(0, len(value), len(value))
        means[i] = value[chosen] @ weight[chosen] / weight[chosen].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
