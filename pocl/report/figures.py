"""The pictures of a report, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl.report.intervals import half_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, GRID = "#1d2733", "#7b8794", "#e4e9f0"
TEACHING, LABELS, BEST = "#2f6fab", "#d1782a", "#2a8c6e"
DPI = 140
CRITERIA = {
    "rouge_l": "ROUGE-L",
    "cross_entropy": "cross-entropy",
    "num_tokens": "length",
    "teacher_cross_entropy": "teacher's cross-entropy",
    "kl_to_teacher": "KL to teacher",
}
"""What the columns of a ranking are called."""


def fused_criteria(ranked: Mapping[str, Any]) -> list[str]:
    """The columns that were ranked by, from the `rank_<column>` beside them."""
    return [name.removeprefix("rank_") for name in ranked if name.startswith("rank_")]


def draw_difficulty(ranked: Mapping[str, Any], path: Path) -> None:
    """Cross-entropies by part, and the rankings that were fused against each other, the first against each other one.

    Args:
        ranked: columns `cross_entropy`, `subset` and `rank_<criterion>` for each criterion.
        path: PNG to write.
    """
    from matplotlib.ticker import MaxNLocator

    first, *others = fused_criteria(ranked)
    figure = _figure(9.6 if others else 5.2, 3.7 * max(1, len(others)))
    grid = figure.add_gridspec(max(1, len(others)), 2 if others else 1)
    left = figure.add_subplot(grid[:, 0])
    subsets = sorted(set(ranked["subset"]))
    colours = _easy_to_hard(len(subsets))
    parts = {s: [i for i, value in enumerate(ranked["subset"]) if value == s] for s in subsets}
    left.hist(
        [[ranked["cross_entropy"][i] for i in parts[s]] for s in subsets],
        bins=30,
        stacked=True,
        color=colours,
        label=[_part_name(s, len(subsets)) for s in subsets],
    )
    read = "block of text" if "text" in ranked else "reference answer"
    _label(left, "Difficulty by cross-entropy", f"cross-entropy of the {read} (nats per token)", "samples")
    left.legend(frameon=False, fontsize=8)
    for row, other in enumerate(others):
        right = figure.add_subplot(grid[row, 1])
        for s, colour in zip(subsets, colours, strict=True):
            x, y = ([ranked[f"rank_{name}"][i] for i in parts[s]] for name in (first, other))
            right.scatter(x, y, s=9, color=colour, linewidths=0)
        title = "The two rankings that are fused" if len(others) == 1 else "Two of the rankings that are fused"
        _label(right, title, *(f"rank by {CRITERIA.get(name, name)} (1 = easiest)" for name in (first, other)))
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def draw_stages(log: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Samples, temperature, weight of the teacher and learning rate over the steps of the curriculum.

    Args:
        log: training lines with `step` and `learning_rate`.
        stages: for each stage `first_step`, `last_step`, `num_samples`, `temperature` and `kd_ratio`.
        path: PNG to write.
    """
    figure = _figure(9.6, 5.6)
    axes = figure.subplots(4, 1, sharex=True)
    _label(axes[0], "What each stage trains on, and how", "", "samples")
    for stage in stages:
        width = stage["last_step"] - stage["first_step"]
        axes[0].bar(stage["first_step"], stage["num_samples"], width, align="edge", color=TEACHING, alpha=0.85)
        middle = stage["first_step"] + width / 2
        axes[0].annotate(f"{stage['num_samples']:,}", (middle, 0), (0, 3), textcoords="offset points", **_ON_BAR)
    edges = [edge for stage in stages for edge in (stage["first_step"], stage["last_step"])]
    for axis, key, name in ((axes[1], "temperature", "temperature"), (axes[2], "kd_ratio", "weight of\nthe teacher")):
        axis.plot(edges, [stage[key] for stage in stages for _ in range(2)], color=INK, linewidth=1.6)
        _label(axis, "", "", name)
    axes[3].plot([line["step"] for line in log], [line["learning_rate"] for line in log], color=INK, linewidth=1.6)
    axes[3].set_ylim(bottom=0)
    _label(axes[3], "", "optimizer step", "learning\nrate")
    for axis in axes:
        axis.margins(y=0.3)
        _mark_stages(axis, stages, named=axis is axes[0])
    _save(figure, path)


def draw_losses(
    warmup: Sequence[Mapping[str, Any]],
    log: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    labels: str = "the reference answers",
) -> None:
    """Divergence from the teacher and cross-entropy with the labels, step by step, warm-up first (negative steps)."""
    figure = _figure(9.6, 5.0)
    axes = figure.subplots(2, 1, sharex=True)
    shift = warmup[-1]["step"] if warmup else 0
    for axis, key, colour, title in (
        (axes[0], "divergence", TEACHING, "Divergence from the teacher (at the stage's temperature)"),
        (axes[1], "cross_entropy", LABELS, f"Cross-entropy with {labels}"),
    ):
        for lines, offset in ((warmup, -shift), (log, 0)):
            points = [(line["step"] + offset, line[key]) for line in lines if line.get(key) is not None]
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
                axis.plot(x, smooth(y), color=colour, linewidth=1.8)
        if warmup:
            axis.axvspan(-shift, 0, color=GRID, alpha=0.6, linewidth=0)
            axis.annotate("warm-up", (-shift / 2, 0.97), xycoords=("data", "axes fraction"), **_NOTE)
        _label(axis, title, "", "nats per token (log scale)")
        _mark_stages(axis, stages, named=True)
        axis.set_xlim(left=-shift)
        axis.set_yscale("log")  # the first steps of an untrained student would flatten all others
        axis.set_ylim(top=1.5 * axis.get_ylim()[1])
        _readable_ticks(axis)
    axes[-1].set_xlabel("optimizer step", fontsize=9)
    _save(figure, path)


_VALIDATION = (
    ("eval_cross_entropy", "Cross-entropy of the validation samples (lower is better)", LABELS),
    ("eval_kl_to_teacher", "KL to the teacher at temperature 1 (lower is better)", TEACHING),
    ("eval_rouge_l", "ROUGE-L of the answers to the validation samples (higher is better)", BEST),
)


def draw_validation(
    lines: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    control: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Cross-entropy, KL to the teacher and ROUGE-L of the validation samples at every evaluation, if measured.

    Args:
        lines: evaluation lines with `step` and `eval_cross_entropy`, `eval_kl_to_teacher` or `eval_rouge_l`.
        stages: as for `draw_stages`.
        path: PNG to write.
        control: evaluation lines of plain distillation, drawn in grey.
    """
    kinds = [kind for kind in _VALIDATION if any(line.get(kind[0]) is not None for line in lines)]
    figure = _figure(9.6, 2.5 * len(kinds))
    axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (key, title, colour) in zip(axes, kinds, strict=True):
        for drawn, shade, name in ((control, QUIET, "plain distillation"), (lines, colour, "in stages")):
            points = [(line["step"], line[key]) for line in drawn if line.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=shade, linewidth=1.6, markersize=4, label=name)
        if control:
            axis.legend(frameon=False, fontsize=8, loc="lower left")
        axis.margins(y=0.3)
        _label(axis, title, "", "")
        _mark_stages(axis, stages, named=True)
    axes[-1].set_xlabel("optimizer step", fontsize=9)
    _save(figure, path)


def draw_comparison(runs: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str], path: Path) -> None:
    """The validation measures of several runs over their steps, one line a run.

    Args:
        runs: for each run its evaluation lines, as for `draw_validation`.
        names: what the runs are called.
        path: PNG to write.
    """
    kinds = [kind for kind in _VALIDATION if any(line.get(kind[0]) is not None for lines in runs for line in lines)]
    figure = _figure(9.6, 2.5 * len(kinds))
    axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (key, title, _) in zip(axes, kinds, strict=True):
        for lines, name, colour in zip(runs, names, (TEACHING, LABELS), strict=True):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=1.6, markersize=4, label=name)
        axis.margins(y=0.3)
        _label(axis, title, "", "")
    axes[0].legend(frameon=False, fontsize=8)
    axes[-1].set_xlabel("optimizer step", fontsize=9)
    _save(figure, path)


def draw_results(names: Sequence[str], results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars for every model: cross-entropy, KL to the teacher, ROUGE-L, each with its 95 % interval."""
    kinds = [
        (key, title)
        for key, title in (
            ("cross_entropy", "cross-entropy (nats per token)\nlower is better"),
            ("kl_to_teacher", "KL to the teacher (nats per token)\nlower is better"),
            ("rouge_l", "ROUGE-L\nhigher is better"),
        )
        if any(result.get(key) is not None for result in results)
    ]
    figure = _figure(9.6, 0.8 + 0.45 * len(names))
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    colours = [QUIET] * (len(names) - 1) + [TEACHING]
    for axis, (key, title) in zip(axes, kinds, strict=True):
        values = [result.get(key) or 0.0 for result in results]
        axis.barh(range(len(names)), values, color=colours, height=0.62)
        halves = [half_width(result, key) or 0.0 for result in results]
        axis.errorbar(values, range(len(names)), xerr=halves, fmt="none", ecolor=INK, elinewidth=1.0, capsize=2.5)
        for row, result in enumerate(results):
            text = "" if result.get(key) is None else f" {result[key]:.3g}"
            axis.annotate(text, (values[row] + halves[row], row), va="center", fontsize=8.5, color=INK)
        axis.margins(x=0.22)
        axis.set_yticks(range(len(names)), names, fontsize=9)
        _label(axis, title, "", "")
        axis.grid(visible=False)
        axis.tick_params(axis="x", labelbottom=False, length=0)
    axes[0].invert_yaxis()
    _save(figure, path)


def _readable_ticks(axis: Axes) -> None:
    """On a logarithmic axis: 1, 2, 5 times powers of ten, or even steps where the limits are too near for three."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_ylim()
    locator: LogLocator | MaxNLocator = LogLocator(subs=(1.0, 2.0, 5.0))
    if sum(low <= tick <= high for tick in locator.tick_values(low, high)) < 3:
        locator = MaxNLocator(nbins=4, steps=[1, 2, 5, 10])
    axis.yaxis.set_major_locator(locator)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average without the pull towards 0 at the start."""
    out, total, mass = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        out.append(total / mass)
    return out


_NOTE: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8, "color": QUIET}
_ON_BAR: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8, "color": "white"}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no pyplot: no global state, no display
    return figure


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=QUIET)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(side == "bottom")
        axis.spines[side].set_color(QUIET)


def _mark_stages(axis: Axes, stages: Sequence[Mapping[str, Any]], *, named: bool) -> None:
    axis.set_xlim(0, stages[-1]["last_step"])
    for stage in stages:
        if stage["stage"] > 0:
            axis.axvline(stage["first_step"], color=QUIET, linewidth=0.8, linestyle=(0, (3, 3)))
        if named:
            middle = (stage["first_step"] + stage["last_step"]) / 2
            axis.annotate(f"stage {stage['stage']}", (middle, 0.97), xycoords=("data", "axes fraction"), **_NOTE)


def _part_name(subset: int, count: int) -> str:
    end = " (easiest)" if subset == 0 else " (hardest)" if subset == count - 1 else ""
    return f"part {subset}{end}"


def _easy_to_hard(count: int) -> list[Any]:
    """Light to dark of one hue."""
    from matplotlib import colormaps

    shades = colormaps["Blues"]
    return [shades(0.35 + 0.6 * i / max(count - 1, 1)) for i in range(count)]


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
