"""Two runs side by side: what differs in their recipes, and in their results on questions that both answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl.report.document import Document, Heading, Paragraph, Picture, Table
from pocl.report.intervals import difference
from pocl.report.run import MODEL_NAMES, Run
from pocl.run_folder import write_text

_MEASURES = {"cross_entropy": "cross-entropy", "kl_to_teacher": "KL to teacher", "rouge_l": "ROUGE-L"}


def write_comparison(first: Path, second: Path) -> Path:
    """Write `report/compare-<name of second>/` in the folder of the first run.

    Returns:
        The self-contained HTML page.

    Raises:
        ValueError: one of the two is not the folder of a run, or both are the same.
    """
    if first.resolve() == second.resolve():
        raise ValueError(f"{first} is compared with itself; name another run")
    from pocl.report import results_table
    from pocl.report.figures import draw_comparison

    runs = (Run.read(first), Run.read(second))
    names = [str(run.path) for run in runs] if first.name == second.name else [first.name, second.name]
    folder = first / "report" / f"compare-{second.resolve().name}"
    folder.mkdir(parents=True, exist_ok=True)
    document = Document(f"{names[0]} and {names[1]}")
    settings = _differing_settings(runs[0].recipe, runs[1].recipe)
    document.add(Heading("What differs in the recipes"))
    document.add(Table(["setting", *names], settings) if settings else Paragraph("Nothing but, perhaps, the folder."))
    document.add(Heading("Results on held-out questions"))
    for name, run in zip(names, runs, strict=True):
        if run.results:
            document.add(Heading(name, 3), results_table(run.results, run.parameters))
    document.add(*_paired(runs, names))
    if any(run.validation for run in runs):
        draw_comparison([run.validation for run in runs], names, folder / "validation.png")
        document.add(Picture("validation.png", "Validation samples of both runs while training."))
    write_text(folder / "comparison.md", document.markdown())
    write_text(folder / "index.html", document.html(folder))
    return folder / "index.html"


def _differing_settings(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            rows += _differing_settings(a, b, f"{prefix}{key}.")
        elif a != b:
            rows.append((f"{prefix}{key}", str(a), str(b)))
    return rows


def _paired(runs: Sequence[Run], names: Sequence[str]) -> list[Table | Paragraph]:
    """The difference of the last students on the same questions, with its interval."""
    if list(runs[0].test.get("prompt", [])) != list(runs[1].test.get("prompt", [])):
        return [Paragraph("The two were asked different questions: their figures do not compare.")]
    last = [run.results.get("student-final") for run in runs]
    if last[0] is None or last[1] is None:
        return [Paragraph("One of the two has no results yet.")]
    rows = []
    for measure, title in _MEASURES.items():
        interval = difference(last[0], last[1], measure)
        if interval is None:
            continue
        low, high = interval
        sure = "no difference that so many questions could show" if low <= 0 <= high else "yes"
        change = last[1][measure] - last[0][measure]
        rows.append([title, f"{change:+.4f}", f"{low:+.4f} to {high:+.4f}", sure])
    if not rows:
        return [Paragraph("The samples' own values are not known: evaluate both runs with this version of pocl.")]
    title = f"{MODEL_NAMES['student-final']}: {names[1]} less {names[0]}"
    return [
        Table([title, "difference", "95 % interval", "a difference"], rows, numbers=frozenset({1, 2})),
        Paragraph(
            "Paired by question, by bootstrap over the questions. One seed each: how much another seed would have "
            "changed is not in the interval; `pocl compare` measures that too."
        ),
    ]
