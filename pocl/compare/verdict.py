"""From the cells' results to estimates of the differences, and to plain sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocl.compare.arms import Arm
from pocl.compare.statistics import Estimate, estimate
from pocl.run_folder import RunFolderError


@dataclass(frozen=True)
class Metric:
    """What is measured on the test samples."""

    key: str
    title: str
    short: str
    lower_is_better: bool
    scale: float
    """What the figures are multiplied by to be read."""
    digits: int
    by_tokens: bool
    """Whether samples count by their response tokens."""


METRICS = (
    Metric("kl_to_teacher", "KL to the teacher, nats per token", "KL", True, 1.0, 3, True),
    Metric("cross_entropy", "cross-entropy, nats per token", "cross-entropy", True, 1.0, 3, True),
    Metric("rouge_l", "ROUGE-L x 100", "ROUGE-L", False, 100.0, 2, False),
    Metric("exact_match", "exact match, %", "exact match", False, 100.0, 2, False),
)


@dataclass(frozen=True)
class Comparison:
    """An arm against the one it is compared with, in one metric."""

    arm: Arm
    metric: Metric
    found: Estimate | None
    """Of arm minus the other, over the seeds that both finished; None where nothing can be measured."""
    diverged: int
    """Seeds in which the arm diverged."""
    baseline_diverged: int
    missing: str = ""
    """Why there is no estimate."""

    @property
    def verdict(self) -> str:
        """`helps`, `harms` or `cannot be told`."""
        if self.diverged > self.baseline_diverged:
            return "harms"  # whatever the seeds that went well say
        if self.found is None or not self.found.told:
            return "cannot be told"
        return "helps" if (self.found.mean < 0) == self.metric.lower_is_better else "harms"


DIVERGED = "diverged"
Results = Mapping[tuple[str, int], Mapping[str, Any]]
"""By the arm's key and the seed."""


def comparisons(arms: Sequence[Arm], seeds: Sequence[int], results: Results) -> list[Comparison]:
    """Every arm against the first of its level, in every metric; intervals of a metric cover together.

    Raises:
        RunFolderError: cells of one seed did not start from the same weights, or were judged on other samples.
    """
    first = {arm.level: arm for arm in reversed(arms)}
    others = [arm for arm in arms if first[arm.level] is not arm]
    return [
        _compared(arm, first[arm.level], metric, seeds, results, len(others)) for metric in METRICS for arm in others
    ]


def _compared(arm: Arm, base: Arm, metric: Metric, seeds: Sequence[int], results: Results, family: int) -> Comparison:
    both = [seed for seed in seeds if (arm.key, seed) in results and (base.key, seed) in results]
    pairs = [(results[arm.key, seed], results[base.key, seed]) for seed in both]
    lost, base_lost = (sum(pair[side]["diverged"] is not None for pair in pairs) for side in (0, 1))

    def outcome(found: Estimate | None, missing: str = "") -> Comparison:
        return Comparison(arm, metric, found, lost, base_lost, missing)

    rows, weights = [], None
    for one, other in pairs:
        _check_pair(one, other)
        if one["diverged"] or other["diverged"]:
            continue
        values = [each["of_each"].get(metric.key) for each in (one, other)]
        if None in values or not all(map(math.isfinite, [*values[0], *values[1]])):
            return outcome(None, f"{metric.short} was not measured")
        judged = len(values[0])  # answers may have been asked of the first samples alone
        rows.append(np.subtract(values[0], values[1]))
        weights = np.array(one["of_each"]["num_tokens"][:judged], float) if metric.by_tokens else None
    if not rows:
        return outcome(None, DIVERGED if lost or base_lost else "no seed is finished in both arms")
    if len(rows[0]) < 2:
        return outcome(None, f"{metric.short} was measured on less than two samples")
    return outcome(estimate(np.stack(rows), weights, comparisons=family))


def _check_pair(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    if one["start"] != other["start"]:
        raise RunFolderError(
            f"the cells {one['arm']!r} and {other['arm']!r} of seed {one['seed']} started from different weights, made "
            "by different machines or versions; remove the results of that seed to make them again"
        )
    ids = [each["of_each"].get("sample_id") for each in (one, other) if not each["diverged"]]
    if len(ids) == 2 and ids[0] != ids[1]:
        raise RunFolderError(
            f"the cells {one['arm']!r} and {other['arm']!r} of seed {one['seed']} were judged on different samples; "
            "remove the results of that seed to make them again"
        )


def shown(found: Estimate, metric: Metric) -> str:
    """`+0.320 ± 0.235`, scaled to be read."""
    text = f"{metric.scale * found.mean:+.{metric.digits}f}"
    return text if found.half is None else f"{text} ± {metric.scale * found.half:.{metric.digits}f}"


def sentence(of_arm: Sequence[Comparison], base: Arm) -> str:
    """What an arm's comparisons say in words."""
    arm = of_arm[0].arm
    parts = [text for comparison in of_arm if (text := _clause(comparison))]
    count = of_arm[0].diverged
    head = f"{arm.key} against {base.key}: "
    if count:
        other = of_arm[0].baseline_diverged
        parts.insert(0, f"it diverged in {count} seed(s), {base.key} in {other}, and these are not in the means")
    return head + ("; ".join(parts) or "nothing could be measured") + "."


def _clause(comparison: Comparison) -> str:
    found, metric = comparison.found, comparison.metric
    if found is None:
        return f"{metric.short} cannot be told ({comparison.missing})" if comparison.missing != DIVERGED else ""
    if found.mean == 0 and found.half == 0:
        return f"{metric.short} is the same in every sample"
    figures = f"{shown(found, metric)}{' nats' if metric.scale == 1 else ''}"
    if found.told:
        better = (found.mean < 0) == metric.lower_is_better
        return f"{'helps' if better else 'harms'} {metric.short} ({figures})"
    if found.half is None:
        return f"{metric.short} cannot be told with one seed ({figures}, no interval)"
    more = found.more_seeds
    advice = (
        f"about {more} more would tell, if the difference is what it seems"
        if more
        else "more seeds would not tell such a difference, more test samples might"
    )
    return f"{metric.short} cannot be told with {found.seeds} seeds ({figures}; {advice})"
