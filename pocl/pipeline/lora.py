"""What a run does where its student learns by adapters of low rank (`student.lora`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocl.pipeline.card import write_merged_card
from pocl.recipe import Recipe
from pocl.recipe.models import LoraSection, StudentSection


def check_lora(recipe: Recipe) -> None:
    """Refuses what the student's adapters cannot be made of, as far as this machine can tell without weights.

    Raises:
        ValueError: PEFT is not installed, the student is an adapter itself, or has no such layers.
    """
    from pocl.models import adapter_base
    from pocl.models.lora import adapted_modules, check_peft
    from pocl.pipeline.guess import skeleton

    section, source = recipe.student.lora, recipe.student.model
    if section is None or source is None:
        return
    try:
        check_peft()
        if Path(source).is_dir() and adapter_base(source):
            raise ValueError(
                f"lora: {source} is an adapter already, which is trained as it is; leave student.lora out, or merge "
                f"that adapter first (pocl merge {source}) and name the merged model"
            )
        model = skeleton(recipe, student=True)
        if model is not None:
            adapted_modules(model, section.targets, section.dropout)
    except ValueError as error:
        raise ValueError(f"student.{error}") from error


def num_trained(recipe: Recipe) -> int | None:
    """How many numbers the recipe's adapters have; None without them, or where their model is not on this machine.

    Raises:
        ValueError: as `check_lora`.
    """
    from pocl.models.lora import num_lora_parameters
    from pocl.pipeline.guess import skeleton

    section = recipe.student.lora
    model = skeleton(recipe, student=True) if section else None
    if section is None or model is None:
        return None
    try:
        return num_lora_parameters(model, section.targets, section.r)
    except ValueError as error:
        raise ValueError(f"student.{error}") from error


def with_lora(model: Any, section: LoraSection, *, seed: int, revision: str | None) -> Any:
    """A student with new adapters, as its section asks for; see `pocl.models.lora.add_lora`."""
    from pocl.models.lora import add_lora

    return add_lora(
        model,
        r=section.r,
        alpha=section.scale,
        dropout=section.dropout,
        targets=section.targets,
        rank_stabilized=section.rank_stabilized,
        dora=section.dora,
        seed=seed,
        revision=revision,
    )


def lora_settings(recipe: Recipe, *, merge: bool = False) -> dict[str, Any]:
    """What a step that trains depends on; nothing without adapters. With `merge`, how the student is saved as well."""
    section = recipe.student.lora
    if section is None:
        return {}
    return {"lora": section.model_dump(mode="json", exclude=None if merge else {"merge"})}


def merged_by(recipe: Recipe) -> Callable[[Path, Path], None] | None:
    """Makes a merged model of an adapter's folder, where the recipe asks for one."""
    student = recipe.student
    return _merging(student) if student.lora and student.lora.merge else None


def _merging(student: StudentSection) -> Callable[..., None]:
    import torch

    from pocl.models.lora import merge_folder

    dtype = getattr(torch, student.dtype)
    return functools.partial(merge_folder, dtype=dtype, trust_remote_code=student.trust_remote_code)


def merge_student(folder: Path, output: Path | None = None) -> Path:
    """Write the merged student of a run, or that of an adapter's folder; returns where.

    Raises:
        ValueError: see `pocl.models.lora.merge_folder`.
        RunFolderError: the run has no student yet.
    """
    from pocl.models.lora import merge_folder
    from pocl.recipe import load_recipe
    from pocl.run_folder import RECIPE, RunFolderError

    if not (folder / RECIPE).is_file():
        target = output or folder.with_name(f"{folder.name}-merged")
        merge_folder(folder, target, finishing=functools.partial(write_merged_card, folder))
        return target
    student = folder / "student"
    if not student.is_dir():
        raise RunFolderError(f"{folder} has no trained student yet: run pocl distill first")
    target = output or folder / "student-merged"
    _merging(load_recipe(folder).student)(student, target, finishing=functools.partial(write_merged_card, student))
    return target
