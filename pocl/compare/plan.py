"""What a comparison would do, without doing it: cells, time and disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocl.compare.arms import Arm, build_arms
from pocl.compare.cells import Cell, read_result
from pocl.compare.run import claim, resolved
from pocl.pipeline.steps import DATA, TRAINING
from pocl.recipe import Recipe
from pocl.run_folder import RunFolder

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class ComparisonPlan:
    """The plan of a comparison."""

    arms: list[Arm]
    cells: int
    done: int
    steps: int
    """Optimizer steps of a cell; where arms differ, the most."""
    seconds: float | None
    """Of the cells that are missing, one at a time; None where nothing tells the speed."""
    measured: bool
    """Whether the time comes from cells that are done, and is no estimate."""
    disk_bytes: int | None
    """At most at a time, for `jobs` cells and what they share; None where the models' sizes are not known."""


def plan_comparison(
    recipe: Recipe, *, arms: Sequence[str] | None = None, seeds: int | Sequence[int] | None = None, jobs: int = 1
) -> ComparisonPlan:
    """Cells, steps, time and disk; reads the data and the models' configurations, trains and writes nothing.

    Raises:
        ValueError: as `compare`, which would refuse the same.
    """
    from pocl.data.corpus import is_corpus
    from pocl.pipeline.curricula import steps_of
    from pocl.pipeline.guess import num_parameters
    from pocl.pipeline.plan import blocks_of
    from pocl.pipeline.prepare import split_examples

    recipe = resolved(recipe, seeds)
    folder = Path(recipe.output)
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        claim(folder, recipe, write=False)
    splits = split_examples(recipe)
    corpus = is_corpus(splits["train"].column_names)
    counts = {name: blocks_of(recipe, rows) if corpus else len(rows) for name, rows in splits.items()}
    there = RunFolder(folder / "shared" / "data").record(DATA).get("summary", {}).get("counts", {})
    there = there.get("train", counts["train"])
    count = recipe.training.draw or there
    if count > there:
        raise ValueError(f"training.draw = {count}, but there are {there} training samples; draw fewer")
    made = build_arms(recipe, count, arms)
    cells = [Cell(arm, seed) for seed in recipe.compare.seeds for arm in made]
    results = [result for cell in cells if (result := read_result(folder, cell)) is not None]
    steps = max(sum(steps_of(arm.recipe, count)) for arm in made)
    if results:
        seconds: float | None = sum(sum(result["seconds"].values()) for result in results) / len(results)
    else:
        seconds = _estimated(recipe, splits["train"], counts | {"train": count}, steps)
    student = num_parameters(recipe, student=True)
    # the weights it starts from; then for each cell two checkpoints of three times the model, its stages and its end
    disk = None if student is None else 4 * student * (2 + jobs * (6 + recipe.curriculum.num_stages + 1))
    missing = len(cells) - len(results)
    total = None if seconds is None else seconds * missing
    return ComparisonPlan(made, len(cells), len(results), steps, total, bool(results), disk)


def _estimated(recipe: Recipe, train: Dataset, counts: Mapping[str, int], steps: int) -> float | None:
    """Seconds of a cell of so many optimizer steps, by rates measured here; None without its models."""
    from rich.console import Console

    from pocl.data.corpus import is_corpus
    from pocl.pipeline.context import Context
    from pocl.pipeline.curricula import steps_of
    from pocl.pipeline.estimate import estimate, lengths_of

    some = train.select(range(min(len(train), 256)))
    try:
        rows = Context(recipe, Path(recipe.output), Console(quiet=True)).tokenize(some)
        made = estimate(recipe, [TRAINING], counts, lengths_of(rows), corpus=is_corpus(train.column_names))
    except OSError:
        return None
    # a tenth more, to judge the student in the end
    return None if made is None else 1.1 * made.seconds * steps / sum(steps_of(recipe, counts["train"]))
