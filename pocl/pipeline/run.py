"""Running a recipe up to one of its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pocl.launcher import check_launcher_precision
from pocl.pipeline.context import Context, source_fingerprint
from pocl.pipeline.disk import check_disk
from pocl.pipeline.engine import Step, fingerprints, run_steps
from pocl.pipeline.foresight import foresee
from pocl.pipeline.guess import check_student
from pocl.pipeline.hub import check_hub
from pocl.pipeline.made import make_models
from pocl.pipeline.preflight import check_settings
from pocl.pipeline.steps import CACHE, DATA, MODELS, RANKING, REPORT, UPLOAD, build_steps
from pocl.recipe import Recipe
from pocl.run_folder import RunFolder, RunFolderError, differences
from pocl.run_lock import only_user

if TYPE_CHECKING:
    from rich.console import Console


def run(
    recipe: Recipe,
    *,
    until: str = "report",
    change: bool = False,
    only: bool = False,
    console: Console | None = None,
) -> Path:
    """Do what is missing in the recipe's output folder for the step `until`, and that step.

    Under `torchrun` or `accelerate launch` the processes rank and train together.

    Args:
        recipe: what to do.
        until: name of the last step: models, data, teacher-cache, warm-up, ranking, training, evaluation, report (and
            the upload, if one is asked for).
        change: accept a folder of a recipe that differs and do again what is affected.
        only: do the step `until` and none of those before it, which must be done.
        console: where progress is told; standard output when left out.

    Returns:
        The run folder.

    Raises:
        ValueError: the recipe has no such step.
        RunFolderError: the folder belongs to another recipe, or with `only` lacks an earlier step.
        FolderInUseError: another process works in the folder.
    """
    from rich.console import Console

    from pocl.difficulty.processes import Processes

    path = Path(recipe.output)
    check_precision(recipe)
    console = console or Console()
    make_models(recipe, console.print)
    with Processes.current(devices=True) as processes, contextlib.ExitStack() as held:
        # one process reads the weights, where they have to be read at all
        steps = build_steps(recipe, content=lambda *what: processes.first(partial(source_fingerprint, *what)))
        needed = needed_for(steps, until, recipe)
        processes.first(lambda: held.enter_context(only_user(path)))
        folder = RunFolder(path, change=change)
        processes.first(lambda: folder.claim(recipe.model_dump(mode="json")))
        context = Context(recipe, path, console if processes.rank == 0 else Console(quiet=True))
        if only:
            processes.first(lambda: check_done(steps, needed, folder))
        marks = fingerprints(steps)
        pending = [step.name for step in needed if not folder.is_finished(step.name, marks[step.name])]
        processes.first(lambda: check_settings(recipe, pending))
        if MODELS in pending:
            processes.first(lambda: check_student(recipe))
        if UPLOAD in pending:
            processes.first(lambda: check_hub(recipe))
        processes.first(lambda: check_disk(recipe, pending))
        later = {DATA: lambda: foresee(context, [name for name in pending if name not in (MODELS, DATA)])}
        run_steps(needed, context, folder, context.console, processes, after={} if context.console.quiet else later)
    return path


def check_precision(recipe: Recipe) -> None:
    """Refuses a precision that this machine or its launcher would not train in.

    Raises:
        ValueError: 16-bit arithmetic without an accelerator, or a launcher that asks for another (see
            `check_launcher_precision`).
    """
    from pocl.devices import accelerator

    precision = recipe.training.precision
    check_launcher_precision({"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision])
    if precision == "float16" and accelerator() is None:
        raise ValueError(
            "training.precision is float16, which needs a GPU, and there is none here: set it to float32 "
            "(a CPU can do bfloat16, slowly)"
        )


def needed_for(steps: Sequence[Step], until: str, recipe: Recipe) -> list[Step]:
    """The step `until` and those that it depends on, in order.

    Raises:
        ValueError: the recipe has no such step.
    """
    names = [step.name for step in steps]
    until = names[-1] if until == REPORT else until  # what follows the report belongs to a whole run
    if until not in names:
        hints = {
            CACHE: "; to cache all the same, set teacher_cache.mode to cached",
            RANKING: f"; a curriculum of kind {recipe.curriculum.kind} orders nothing: set it to baby_step",
        }
        hint = hints.get(until, "")
        raise ValueError(f"this recipe has no step {until!r}, its steps are {', '.join(names)}{hint}")
    found = {until}
    for step in reversed(steps):
        if step.name in found:
            found |= set(step.needs)
    return [step for step in steps if step.name in found]


def check_done(steps: Sequence[Step], needed: Sequence[Step], folder: RunFolder) -> None:
    """Refuses a folder in which a step that the last of `needed` builds on is not done, or was with other inputs.

    Raises:
        RunFolderError: names the first such step.
    """
    marks = fingerprints(steps)
    until = needed[-1].name
    for step in needed[:-1]:
        if not folder.is_finished(step.name, marks[step.name]):
            known = folder.record(step.name)
            changed = known.get("state") == "finished" and known["fingerprint"] != marks[step.name]
            lines = differences(known["settings"], step.settings) if changed else []
            why = "was done with other inputs" if changed else "is not done, or has lost a file"
            raise RunFolderError(
                f"{folder.path}: the step {step.name!r} {why}{''.join(f'{chr(10)}  {line}' for line in lines)}\n"
                f"The step {until!r} alone does not do it again; `pocl distill` does"
            )
