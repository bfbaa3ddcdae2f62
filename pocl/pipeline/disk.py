"""Whether the disk has room for a run, counted before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from pocl.pipeline.guess import num_parameters
from pocl.pipeline.lora import num_trained
from pocl.pipeline.steps import ADAPTATION, CONTROL, MODELS, TRAINING, WARMUP
from pocl.recipe import Recipe

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CHECKPOINT = 3  # times the model: weights and two moments
AT_ONCE = 2  # checkpoints: the last one is kept until the next is whole


def disk_needs(recipe: Recipe, pending: Collection[str]) -> dict[str, int] | None:
    """Bytes that the steps still to be done write, models and checkpoints alone: the least that a run needs.

    Args:
        recipe: what is asked for.
        pending: names of the steps that are not done yet.

    Returns:
        By what they are for; None where a model's configuration is not on this machine.
    """
    from pocl.models import adapter_base

    if not {MODELS, ADAPTATION, WARMUP, TRAINING, CONTROL} & set(pending):
        return {}
    student, teacher = num_parameters(recipe, student=True), num_parameters(recipe, student=False)
    if student is None or teacher is None:
        return None
    student *= BYTES[recipe.student.dtype]
    teacher *= BYTES[recipe.teacher.dtype]
    own = recipe.student.model
    if own and Path(own).is_dir() and adapter_base(own):  # a student of which the adapter alone is trained
        return {}
    copies = [step for step in (MODELS, WARMUP, TRAINING, CONTROL) if step in pending]
    if not recipe.student.from_teacher:
        copies = [step for step in copies if step != MODELS]
    needs = {"students": student * len(copies)}
    if lora := recipe.student.lora:
        whole = student * len({TRAINING, CONTROL} & set(pending)) if lora.merge else 0
        student = BYTES["float32"] * (num_trained(recipe) or 0)
        needs["students"] = student * len(copies) + whole
    if ADAPTATION in pending:
        needs["adapted teacher"] = teacher
    trained = [teacher] * (ADAPTATION in pending) + [student] * bool({WARMUP, TRAINING, CONTROL} & set(pending))
    needs["checkpoints"] = CHECKPOINT * AT_ONCE * max(trained, default=0)
    return {name: size for name, size in needs.items() if size}


def check_disk(recipe: Recipe, pending: Collection[str]) -> dict[str, int] | None:
    """Refuses to start a run that cannot end for want of disk; returns what it needs (see `disk_needs`).

    Raises:
        ValueError: says the folder, what is needed for what, and what is free.
    """
    needs = disk_needs(recipe, pending)
    folder = existing_parent(Path(recipe.output))
    free = shutil.disk_usage(folder).free
    if needs and sum(needs.values()) > free:
        listing = ", ".join(f"{name} {size_in_words(size)}" for name, size in needs.items())
        raise ValueError(
            f"output: {recipe.output} needs at least {size_in_words(sum(needs.values()))} ({listing}), and "
            f"{size_in_words(free)} are free there; free some, or choose another disk with --output"
        )
    return needs


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def size_in_words(size: float) -> str:
    """`1.5 GB`, `24.0 MB` or `0.3 kB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"
