"""Pictures of the losses' results, each for light and for dark pages."""

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Entry
from benchmarks.targets import TRL, ratios

# Row of a table -> its name in pictures and in the README; others are left out there.
SHORT = {
    "pocl": "pocl",
    "chunked loop in eager torch": "chunked loop by hand",
    "eager torch, full logits": "PyTorch, full logits",
    "torch.compile, full logits": "torch.compile",
    TRL: "TRL",
    "Liger LigerFusedLinearJSDLoss": "Liger",
    "the POCL authors' loss": "the authors' code",
}
THEMES = {
    "light": {"text": "#1f2328", "grid": "#d1d9e0", "pocl": "#0969da", "page": "#ffffff"},
    "dark": {"text": "#e6edf3", "grid": "#3d444d", "pocl": "#58a6ff", "page": "#0d1117"},
}
OTHERS = ("#8c959f", "#bf8700", "#8250df", "#1a7f37", "#cf222e", "#bc4c00")


def short(name: str, versions: Mapping[str, str]) -> str:
    """A row's short name, with the version of a package."""
    package = {"TRL": "trl", "Liger": "liger-kernel"}.get(SHORT[name], "")
    return f"{SHORT[name]} {versions[package]}" if package in versions else SHORT[name]


@contextlib.contextmanager
def _two_panels(path: Path, theme: Mapping[str, str], height: float) -> Iterator[tuple[Any, Any]]:
    """A figure and its two axes in the colours of a theme; saved and closed at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {"text.color": theme["text"], "axes.labelcolor": theme["text"], "font.size": 10}
    style |= {"xtick.color": theme["text"], "ytick.color": theme["text"], "axes.edgecolor": theme["grid"]}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": theme["page"]}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, height), layout="constrained", facecolor=theme["page"])
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Software": None})
        pyplot.close(figure)


def bars(tables: Sequence[Entry], path: Path, theme: Mapping[str, str]) -> None:
    """Time over the floor and peak memory of each implementation, one bar for each shape."""
    from matplotlib.patches import Patch

    rows = [name for name in SHORT if any(name in table.values["rows"] for table in tables)]
    with _two_panels(path, theme, 1.0 + 0.5 * len(rows)) as (figure, axes):
        thickness = 0.8 / len(tables)
        for number, table in enumerate(tables):
            values = table.values
            present = [name for name in rows if name in values["rows"]]
            places = [rows.index(name) + (number - (len(tables) - 1) / 2) * thickness for name in present]
            sizes = (
                [statistics.median(ratios(values, name)) for name in present],
                [(values["rows"][name]["peak_bytes"] or 0) / 2**30 for name in present],
            )
            colours = [theme["pocl"] if name == "pocl" else OTHERS[0] for name in present]
            for axis, lengths, form in zip(axes, sizes, ("%.2f", "%.2f"), strict=True):
                # later shapes paler, so that the two bars of a row are told apart without colours
                drawn = axis.barh(places, lengths, 0.92 * thickness, color=colours, alpha=1.0 if number == 0 else 0.55)
                axis.bar_label(drawn, fmt=form, padding=3, fontsize=8.5)
        versions = tables[0].versions
        axes[0].set_yticks(range(len(rows)), [short(name, versions) for name in rows])
        axes[1].set_yticks(range(len(rows)), [""] * len(rows))
        axes[0].axvline(1, color=theme["text"], linewidth=0.8, linestyle=":")
        axes[0].set_xlabel("time over the floor (matrix products alone)")
        axes[1].set_xlabel("peak memory beyond the inputs, GiB")
        titles = [f"{t.values['tokens']:,} tokens, vocabulary {t.values['vocabulary']:,}" for t in tables]
        handles = [Patch(color=OTHERS[0], alpha=1.0 if number == 0 else 0.55) for number in range(len(titles))]
        figure.legend(handles, titles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
        for axis in axes:
            axis.invert_yaxis()
            axis.tick_params(left=False)
            axis.margins(x=0.12)


def curves(tables: Sequence[Entry], path: Path, theme: Mapping[str, str]) -> None:
    """The same over the vocabulary, a line for each implementation; tables by growing vocabulary."""
    rows = [name for name in SHORT if any(name in table.values["rows"] for table in tables)]
    with _two_panels(path, theme, 4.0) as (figure, axes):
        for number, name in enumerate(rows):
            points = [t.values for t in tables if name in t.values["rows"]]
            across = [values["vocabulary"] for values in points]
            heights = (
                [statistics.median(ratios(values, name)) for values in points],
                [(values["rows"][name]["peak_bytes"] or 0) / 2**30 for values in points],
            )
            ours = name == "pocl"
            colour = theme["pocl"] if ours else OTHERS[(number - 1) % len(OTHERS)]
            for axis, values in zip(axes, heights, strict=True):
                axis.plot(across, values, color=colour, linewidth=2.6 if ours else 1.4, marker="o", markersize=4)
            axes[0].plot([], [], color=colour, label=short(name, tables[0].versions), linewidth=2.6 if ours else 1.4)
        axes[0].axhline(1, color=theme["text"], linewidth=0.8, linestyle=":")
        axes[0].set_ylabel("time over the floor")
        axes[1].set_ylabel("peak memory beyond the inputs, GiB")
        sizes = [table.values["vocabulary"] for table in tables]
        for axis in axes:
            axis.set_xticks(sizes, [f"{size / 1000:.0f}" for size in sizes])
            axis.set_xlabel("vocabulary, thousands")
            axis.set_ylim(bottom=0)
            axis.grid(axis="y", color=theme["grid"], linewidth=0.6)
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
