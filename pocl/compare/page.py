"""The outcome of a comparison: `index.html`, `report.md` and `results.json` in its folder."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl.compare.arms import Arm
from pocl.compare.cells import Cell, read_result
from pocl.compare.verdict import METRICS, Comparison, Metric, Results, comparisons, sentence, shown
from pocl.pipeline.engine import duration
from pocl.recipe import Recipe
from pocl.report.document import Code, Document, Heading, Paragraph, Picture, Table
from pocl.run_folder import write_text

CAPTION = "Left: on validation samples over the steps, mean of the seeds. Right: the differences."


def write_page(folder: Path, recipe: Recipe, cells: Sequence[Cell]) -> Path:
    """Read the results of a comparison's cells, those that are there, and write table and page.

    Returns:
        The self-contained HTML page.
    """
    found = {(c.arm.key, c.seed): result for c in cells if (result := read_result(folder, c)) is not None}
    arms = list({cell.arm.key: cell.arm for cell in cells}.values())
    seeds = list(recipe.compare.seeds)
    judged = comparisons(arms, seeds, found)
    start = json.loads((folder / "start.json").read_text(encoding="utf-8")) if (folder / "start.json").is_file() else {}
    write_text(folder / "results.json", json.dumps(_summary(arms, seeds, found, judged, start), indent=1) + "\n")
    document = Document(f"Comparison: {recipe.name}")
    document.add(Paragraph(_opening(recipe, arms, seeds, found, len(cells))))
    for base, of_level in _levels(arms):
        mine = [c for c in judged if c.arm.level == base.level]
        where = f" ({next(iter(recipe.compare.across))} = {base.level})" if base.level else ""
        document.add(Heading(f"What the arms do against {base.name}{where}"))
        document.add(*(Paragraph(sentence([c for c in mine if c.arm is arm], base)) for arm in of_level[1:]))
        document.add(_differences(of_level[1:], base, mine))
        document.add(Paragraph(_how_to_read(recipe, mine)))
        document.add(Heading(f"Each arm by itself{where}", 3), _means(of_level, seeds, found, start))
        name = f"curves{f'-{base.level}' if base.level else ''}.png"
        if _draw(folder / name, of_level, seeds, found, mine, start):
            document.add(Picture(name, CAPTION))
    document.add(Heading("What each arm costs"), _costs(arms, seeds, found))
    document.add(Heading("The arms"), Table(["arm", "what it is"], [[arm.key, arm.explanation] for arm in arms]))
    document.add(Heading("The recipe"), Code(recipe.model_copy(update={"output": folder.name}).to_yaml()))
    write_text(folder / "report.md", document.markdown())
    write_text(folder / "index.html", document.html(folder))
    return folder / "index.html"


def _levels(arms: Sequence[Arm]) -> list[tuple[Arm, list[Arm]]]:
    names = dict.fromkeys(arm.level for arm in arms)
    grouped = [[arm for arm in arms if arm.level == level] for level in names]
    return [(group[0], group) for group in grouped]


def _opening(recipe: Recipe, arms: Sequence[Arm], seeds: Sequence[int], found: Results, count: int) -> str:
    steps = sorted({result["steps"] for result in found.values() if not result["diverged"]})
    equal = (
        f"All make {steps[0]} optimizer steps" if len(steps) == 1 else f"They make {', '.join(map(str, steps))} steps"
    )
    done = f"{len(found)} of {count} cells are done. " if len(found) < count else ""
    diverged = sum(result["diverged"] is not None for result in found.values())
    lost = f" {diverged} cell(s) diverged; they are counted below." if diverged else ""
    return (
        f"{done}{len(arms)} arms, {len(seeds)} seed(s): each cell is one arm trained with one seed, from the same "
        "student, on the same samples for the same seed, and judged on the same test samples. "
        f"{equal}.{lost}"
    )


def _differences(arms: Sequence[Arm], base: Arm, judged: Sequence[Comparison]) -> Table:
    rows = []
    for arm in arms:
        mine = [each for each in judged if each.arm is arm]
        lost = f"{mine[0].diverged} seed(s), {base.name} {mine[0].baseline_diverged}"
        rows.append(
            [arm.name, *map(_difference, mine), lost if mine[0].diverged or mine[0].baseline_diverged else "no"]
        )
    header = [f"minus {base.name}", *(metric.title for metric in METRICS), "diverged"]
    return Table(header, rows, numbers=frozenset(range(1, 5)))


def _difference(comparison: Comparison) -> str:
    if comparison.found is None:
        return f"- ({comparison.missing})"
    return shown(comparison.found, comparison.metric) + (" *" if comparison.found.told else "")


def _how_to_read(recipe: Recipe, judged: Sequence[Comparison]) -> str:
    if len(recipe.compare.seeds) == 1:
        return (
            "There is a single seed, so there are no intervals: how much another seed would change cannot be known. "
            "Take five or more (--seeds 5)."
        )
    family = len({c.arm.key for c in judged})
    where = ", over all levels" if recipe.compare.across else ""
    return (
        "Mean over seeds and test samples of the paired differences, and its 95 % interval for seeds and samples that "
        "were not seen; * where it leaves out 0. Student's t on a two-way table of seeds and samples; intervals are "
        f"widened so that all those of a metric cover at once (Bonferroni{where}; {family} arm(s) here). "
        "KL and cross-entropy: lower is better; ROUGE-L and exact match: higher is better."
    )


def _means(arms: Sequence[Arm], seeds: Sequence[int], found: Results, start: Mapping[str, Any]) -> Table:
    titles = {"teacher": "teacher", "student-initial": "student before", "student-warmup": "after warm-up"}
    rows = [
        [titles.get(key, key), *(_figure(metrics.get(m.key), m) for m in METRICS), ""] for key, metrics in start.items()
    ]
    for arm in arms:
        results = [found[arm.key, seed] for seed in seeds if (arm.key, seed) in found]
        good = [result for result in results if not result["diverged"]]
        cells = []
        for metric in METRICS:
            values = [result["metrics"][metric.key] for result in good if result["metrics"][metric.key] is not None]
            spread = f" (sd {metric.scale * statistics.stdev(values):.{metric.digits}f})" if len(values) > 1 else ""
            cells.append(_figure(statistics.fmean(values) if values else None, metric) + spread)
        rows.append([arm.name, *cells, f"{len(good)} of {len(seeds)}"])
    return Table(["", *(metric.title for metric in METRICS), "seeds"], rows, numbers=frozenset(range(1, 5)))


def _figure(value: float | None, metric: Metric) -> str:
    return "-" if value is None else f"{metric.scale * value:.{metric.digits}f}"


def _costs(arms: Sequence[Arm], seeds: Sequence[int], found: Results) -> Table:
    rows = []
    for arm in arms:
        results = [found[arm.key, seed] for seed in seeds if (arm.key, seed) in found]
        if not results:
            rows.append([arm.key, "-", "-", "-", "-"])
            continue
        mean = {
            key: statistics.fmean(result["seconds"][key] for result in results) for key in ("training", "evaluation")
        }
        passes = statistics.fmean(result["teacher_samples"] for result in results)
        steps = "-".join(map(str, dict.fromkeys((min(r["steps"] for r in results), max(r["steps"] for r in results)))))
        online = f"{passes:.0f}" if passes else "none, its hidden states are stored"
        rows.append([arm.key, steps, duration(mean["training"]), duration(mean["evaluation"]), online])
    header = ["arm", "steps", "time to train a cell", "to judge it", "samples through the teacher"]
    return Table(header, rows, numbers=frozenset({1, 2, 3}))


def _summary(
    arms: Sequence[Arm], seeds: Sequence[int], found: Results, judged: Sequence[Comparison], start: Mapping[str, Any]
) -> dict[str, Any]:
    """What the page says, for programs."""
    rows = []
    for each in judged:
        estimate = each.found
        numbers = {} if estimate is None else dataclasses.asdict(estimate) | {"told": estimate.told}
        numbers.pop("squares", None)
        if estimate is not None:
            numbers["more_seeds"] = estimate.more_seeds
        rows.append(
            {
                "arm": each.arm.name,
                "level": each.arm.level,
                "metric": each.metric.key,
                "verdict": each.verdict,
                "diverged": each.diverged,
                "baseline_diverged": each.baseline_diverged,
                "missing": each.missing,
                **numbers,
            }
        )
    cells = [
        {key: result[key] for key in ("arm", "level", "seed", "metrics", "steps", "diverged")}
        for result in found.values()
    ]
    names = [{"name": arm.name, "level": arm.level, "explanation": arm.explanation} for arm in arms]
    return {"arms": names, "seeds": list(seeds), "start": start, "cells": cells, "differences": rows}


def _draw(
    path: Path,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    found: Results,
    judged: Sequence[Comparison],
    start: Mapping[str, Any],
) -> bool:
    from pocl.compare.picture import draw

    curves = {
        arm.name: [
            found[arm.key, s]["curve"] for s in seeds if (arm.key, s) in found and not found[arm.key, s]["diverged"]
        ]
        for arm in arms
    }
    if not any(curve for of_arm in curves.values() for curve in of_arm):
        return False
    draw(path, curves, judged)
    return True
