"""A whole comparison: what the arms share is made once, then every cell that has no result yet, then table and page."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl.compare.arms import Arm, build_arms
from pocl.compare.cells import Cell, adopt, judge_start, read_result, run_cell, shared_folder, shared_steps
from pocl.pipeline.engine import duration
from pocl.pipeline.steps import DATA
from pocl.recipe import Recipe
from pocl.run_folder import RunFolder, RunFolderError, differences, write_text
from pocl.run_lock import only_user

if TYPE_CHECKING:
    from rich.console import Console

COMPARISON = "compare.json"


def compare(
    recipe: Recipe,
    *,
    arms: Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
    jobs: int = 1,
    console: Console | None = None,
) -> Path:
    """Run what is missing of a comparison in the recipe's output folder, and write its table and page.

    Args:
        recipe: what the arms start from; its section `compare` says the rest.
        arms: named arms in place of `compare.arms`.
        seeds: their number, or a list of them, in place of `compare.seeds`.
        jobs: cells at a time, each in a process of its own; they share the cores, or take a GPU each.
        console: where progress is told; standard output when left out.

    Returns:
        The page, `index.html`; `report.md` and `results.json` lie beside it.

    Raises:
        ValueError: no such arm, equal arms, nothing to judge by, or a bad argument.
        RunFolderError: the folder is that of another comparison, or of a run.
        FolderInUseError: another process works in the folder.
    """
    from rich.console import Console

    from pocl.compare.page import write_page
    from pocl.pipeline.made import make_models

    console = console or Console()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("pocl compare starts its own processes: run it without torchrun or accelerate launch")
    if jobs < 1:
        raise ValueError(f"jobs must be a number of processes >= 1, got {jobs}")
    recipe = resolved(recipe, seeds)
    folder = Path(recipe.output)
    with only_user(folder):
        claim(folder, recipe)
        make_models(recipe, console.print)
        count = count_samples(folder, recipe, console)
        made = build_arms(recipe, count, arms)
        for arm in made:
            make_shared(folder, arm, console)
        cells = [Cell(arm, seed) for seed in recipe.compare.seeds for arm in made]
        start = judge_start(folder, made[0].recipe, console)
        write_text(folder / "start.json", json.dumps(start, indent=1) + "\n")
        run_cells(folder, cells, jobs, console)
        return write_page(folder, recipe, cells)


def resolved(recipe: Recipe, seeds: int | Sequence[int] | None = None) -> Recipe:
    """The recipe with the seeds asked for, and with the cache decided for all arms alike.

    Raises:
        ValueError: there is nothing to judge the arms by, or no seed.
    """
    from pocl.pipeline.teacher import plans_cache

    if recipe.data.num_test < 2:
        raise ValueError(
            f"data.num_test = {recipe.data.num_test}: arms are judged on test samples; set it to 2 or more, better 100"
        )
    update: dict[str, Any] = {}
    if seeds is not None:
        chosen = tuple(range(1, seeds + 1)) if isinstance(seeds, int) else tuple(seeds)
        if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
            raise ValueError(f"seeds must be a number >= 1 or different numbers >= 0, got {seeds}")
        update["compare"] = recipe.compare.model_copy(update={"seeds": chosen})
    if recipe.teacher_cache.mode == "auto":
        mode = "cached" if plans_cache(recipe) else "online"
        update["teacher_cache"] = recipe.teacher_cache.model_copy(update={"mode": mode})
    return recipe.model_copy(update=update)


def claim(folder: Path, recipe: Recipe, *, write: bool = True) -> None:
    """Make the folder that of a comparison, or with `write=False` only look; more arms and seeds are the same one.

    Raises:
        RunFolderError: it holds something else.
    """
    file = folder / COMPARISON
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    values = {key: value for key, value in values.items() if key not in ("output", "compare", "name")}
    if file.is_file():
        lines = differences(json.loads(file.read_text(encoding="utf-8")), values)
        if lines:
            listing = "\n  ".join(lines)
            raise RunFolderError(
                f"{folder} belongs to another comparison:\n  {listing}\nChoose another folder with --output."
            )
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise RunFolderError(
            f"{folder} is not empty and holds no {COMPARISON}: it is not the folder of a comparison. "
            "Choose another with --output."
        )
    if write:
        write_text(file, json.dumps(values, indent=1) + "\n")


def count_samples(folder: Path, recipe: Recipe, console: Console) -> int:
    """Samples that the stages train on; the data are read and split, once."""
    from pocl.pipeline.run import run

    # The arms are not known before the samples are counted; their shared folders take the data over from this one.
    path = folder / "shared" / "data"
    run(recipe.model_copy(update={"output": str(path)}), until=DATA, change=True, console=console)
    counts: dict[str, int] = RunFolder(path).record(DATA)["summary"]["counts"]
    if counts["test"] < 2:
        raise ValueError(f"{counts['test']} test samples are left, too few to judge by; raise data.num_test")
    draw = recipe.training.draw
    if draw is not None and draw > counts["train"]:
        raise ValueError(f"training.draw = {draw}, but there are {counts['train']} training samples; draw fewer")
    return draw or counts["train"]


def make_shared(folder: Path, arm: Arm, console: Console) -> None:
    """Do the steps before the stages of an arm, those that no other arm has done."""
    from pocl.pipeline.run import run

    path = shared_folder(folder, arm.recipe)
    recipe = arm.recipe.model_copy(update={"output": str(path)})
    steps = shared_steps(recipe)
    if all(RunFolder(path).record(step.name).get("state") == "finished" for step in steps):
        return
    others = [other for other in sorted((folder / "shared").iterdir()) if other != path and other.is_dir()]
    adopt(path, recipe, others)
    for step in steps:
        if not any(step.name in other.needs for other in steps):  # else it is done on the way
            run(recipe, until=step.name, change=True, console=console)


def run_cells(folder: Path, cells: Sequence[Cell], jobs: int, console: Console) -> None:
    """Make the results that are missing, and tell after each how long the rest will take."""
    todo = []
    for cell in cells:
        if read_result(folder, cell) is None:
            todo.append(cell)
        else:  # a process that died after it wrote the result
            shutil.rmtree(folder / "cells" / cell.name, ignore_errors=True)
    if len(todo) < len(cells):
        console.print(f"{len(cells) - len(todo)} of {len(cells)} cells are done already.", highlight=False)
    began, numbers = time.perf_counter(), iter(range(len(cells) - len(todo) + 1, len(cells) + 1))
    for done, (cell, result) in enumerate(_finished(folder, todo, min(jobs, max(len(todo), 1))), start=1):
        left = (time.perf_counter() - began) / done * (len(todo) - done)
        outcome = f"diverged: {result['diverged']}" if result["diverged"] else _shown(result["metrics"])
        rest = f"; about {duration(left)} left" if done < len(todo) else ""
        took = duration(sum(result["seconds"].values()))
        head = f"[bold]cell {next(numbers)} of {len(cells)}[/bold] {cell.arm.key}, seed {cell.seed}"
        console.print(f"{head}: {outcome} ({took}{rest})", highlight=False, soft_wrap=True)


def _shown(metrics: dict[str, Any]) -> str:
    names = {"kl_to_teacher": ("KL", 3), "cross_entropy": ("cross-entropy", 3), "rouge_l": ("ROUGE-L", 4)}
    known = [(name, digits, metrics[key]) for key, (name, digits) in names.items() if metrics.get(key) is not None]
    return ", ".join(f"{name} {value:.{digits}f}" for name, digits, value in known)


def _finished(folder: Path, cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Cells with their results as they come, from this process or from some of its own."""
    if jobs == 1:
        for cell in cells:
            yield cell, run_cell(folder, cell)
        return
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for place in range(jobs):
        places.put(place)
    executor = ProcessPoolExecutor(jobs, context, _settle, (places, jobs))
    try:
        futures = {executor.submit(run_cell, folder, cell): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()


def _settle(places: Any, jobs: int) -> None:
    """A process of its own takes its share of the cores, and one of the GPUs."""
    import torch

    from pocl.cli import quiet_libraries

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is told, and ends the others
    place = places.get()
    if devices := torch.cuda.device_count():
        torch.cuda.set_device(place % devices)
    torch.set_num_threads(max(1, math.floor(torch.get_num_threads() / jobs)))
    quiet_libraries()
