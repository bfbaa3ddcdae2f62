"""What a comparison would do, without doing it: cells, time and disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pocl.compare.arms import Arm, build_arms
from pocl.compare.cells import Cell, read_result
from pocl.compare.run import claim, resolved
from pocl.pipeline.curricula import batch_size_of
from pocl.pipeline.steps import DATA
from pocl.recipe import Recipe
from pocl.run_folder import RunFolder


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
    """Whether the time comes from cells that are done, and is no guess from the models' sizes."""
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
    from pocl.pipeline.curricula import curriculum_of
    from pocl.pipeline.guess import num_parameters, seconds_per_step
    from pocl.pipeline.plan import blocks_of
    from pocl.pipeline.prepare import split_examples

    recipe = resolved(recipe, seeds)
    folder = Path(recipe.output)
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        claim(folder, recipe, write=False)
    train = split_examples(recipe)["train"]
    if is_corpus(train.column_names):
        there, texts = blocks_of(recipe, train)
    else:
        there = len(train)
        texts = [prompt + response for prompt, response in zip(train["prompt"], train["response"], strict=True)]
    there = RunFolder(folder / "shared" / "data").record(DATA).get("summary", {}).get("counts", {}).get("train", there)
    count = recipe.training.draw or there
    if count > there:
        raise ValueError(f"training.draw = {count}, but there are {there} training samples; draw fewer")
    made = build_arms(recipe, count, arms)
    cells = [Cell(arm, seed) for seed in recipe.compare.seeds for arm in made]
    results = [result for cell in cells if (result := read_result(folder, cell)) is not None]
    parts = recipe.curriculum.num_stages
    subsets = [min(i // max(1, count // parts), parts - 1) for i in range(count)]
    batch = batch_size_of(recipe)
    steps = max(sum(curriculum_of(arm.recipe, subsets, batch).stage_steps(subsets, batch)) for arm in made)
    if results:
        seconds: float | None = sum(sum(result["seconds"].values()) for result in results) / len(results)
    else:
        step = seconds_per_step(recipe, texts, cached=recipe.teacher_cache.mode == "cached")
        seconds = None if step is None else step * steps * 1.3  # a third more to validate and to judge
    student = num_parameters(recipe, student=True)
    # the weights it starts from; then for each cell two checkpoints of three times the model, its stages and its end
    disk = None if student is None else 4 * student * (2 + jobs * (6 + parts + 1))
    missing = len(cells) - len(results)
    total = None if seconds is None else seconds * missing
    return ComparisonPlan(made, len(cells), len(results), steps, total, bool(results), disk)
