"""Learning curves of the arms, and the differences with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl.compare.verdict import Comparison

Curve = Sequence[Sequence[float | None]]
"""Rows of step, KL, cross-entropy and ROUGE-L."""


def draw(path: Path, curves: Mapping[str, Sequence[Curve]], judged: Sequence[Comparison]) -> None:
    """Write a PNG: KL and, where measured, ROUGE-L over the steps, and every difference in KL and ROUGE-L.

    Args:
        path: file to write.
        curves: for each arm, those of its seeds.
        judged: the comparisons of these arms.
    """
    from matplotlib import colormaps

    from pocl.report.figures import _figure, _label, _save

    kinds = [("kl_to_teacher", "KL to the teacher, nats per token", 1), ("rouge_l", "ROUGE-L", 3)]
    kinds = [kind for kind in kinds if any(p[kind[2]] is not None for c in curves.values() for one in c for p in one)]
    figure = _figure(9.6, 3.6 * len(kinds))
    grid = figure.subplots(len(kinds), 2, squeeze=False)
    shades: Any = colormaps["tab10"]
    colours = {name: "black" if i == 0 else shades((i - 1) % 10) for i, name in enumerate(curves)}
    for (left, right), (key, title, column) in zip(grid, kinds, strict=True):
        for name, of_seeds in curves.items():
            points = mean_curve(of_seeds, column)
            if points:
                left.plot(
                    *zip(*points, strict=True), "o-", color=colours[name], label=name, linewidth=1.4, markersize=3
                )
        _label(left, title, "optimizer steps", "on validation samples")
        mine = [each for each in judged if each.metric.key == key and each.found is not None]
        for row, each in enumerate(mine):
            assert each.found is not None
            scale, half = each.metric.scale, each.found.half or 0.0
            right.errorbar(
                scale * each.found.mean, row, xerr=scale * half, fmt="D", color=colours[each.arm.name], capsize=4
            )
        right.axvline(0, color="black", linewidth=0.8)
        right.set_yticks(range(len(mine)), [each.arm.name for each in mine], fontsize=9)
        right.set_ylim(len(mine) - 0.5, -0.5)
        better = "left" if key == "kl_to_teacher" else "right"
        _label(right, f"minus {next(iter(curves))}, on test samples ({better} is better)", "", "")
    grid[0, 0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def mean_curve(curves: Sequence[Curve], column: int) -> list[tuple[float, float]]:
    """Mean over the seeds at the steps that all of them have."""
    tables = [{point[0]: point[column] for point in curve if point[column] is not None} for curve in curves if curve]
    if not tables:
        return []
    steps = sorted(set.intersection(*(set(table) for table in tables)))  # type: ignore[type-var]
    return [(float(step or 0), statistics.fmean(float(table[step] or 0) for table in tables)) for step in steps]
