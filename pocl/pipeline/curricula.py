"""From a recipe to its curriculum: stages with their samples, steps, temperatures and rates."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pocl.curriculum import Curriculum, Ramp, per_stage
from pocl.pipeline.subsets import training_seed
from pocl.recipe import Recipe

HARMED_BY_RISING = frozenset({"fkl", "skew_rkl", "jsd"})  # in the first experiment of docs/evidence.md


def advice_on_stages(recipe: Recipe) -> str | None:
    """A sentence for a recipe whose stages did harm where this project measured them; None for any other."""
    rises = all(
        values[-1] > values[0] for values in (staged_values(recipe, key) for key in ("temperature", "kd_ratio"))
    )
    if not rises or recipe.loss.divergence not in HARMED_BY_RISING:
        return None
    return (
        "Temperature and kd_ratio rise together in this recipe, as in the paper; in our own experiment that left the "
        f"student 0.3 to 0.5 nats further from its teacher than plain distillation by {recipe.loss.divergence}: see "
        "docs/evidence.md, and ask your own data with `pocl compare`."
    )


def curriculum_of(recipe: Recipe, subsets: Sequence[int] | None = None, batch_size: int = 0) -> Curriculum:
    """The curriculum that a recipe asks for.

    Args:
        recipe: what to do.
        subsets: the subset of every training row. With them a control makes exactly as many optimizer steps as
            `baby_step`; without, about as many passes.
        batch_size: samples of an optimizer step, over processes and accumulation; needed with `subsets`.
    """
    section = recipe.curriculum
    made = _constant(recipe) if section.kind == "constant" else _staged(recipe, section.kind)
    if subsets is None or section.kind == "baby_step" or section.max_steps:
        return made
    steps = list(_staged(recipe, "baby_step").stage_steps(subsets, batch_size))
    steps = steps if len(made.stages) == len(steps) else [sum(steps)]
    return replace(made, stages=tuple(replace(s, max_steps=n) for s, n in zip(made.stages, steps, strict=True)))


def _constant(recipe: Recipe) -> Curriculum:
    section = recipe.curriculum
    # as many passes as the stages make together: stage i of n holds i / n of the samples
    passes = max(1, round(section.epochs[0] * (section.num_stages + 1) / 2))
    plain = Curriculum.constant(
        section.temperature[0],
        section.kd_ratio[0],
        passes,
        num_subsets=section.num_stages,
        skew=section.skew[0] if is_skewed(recipe) else None,
        learning_rate=section.learning_rate[0],
        max_steps=section.max_steps[0] if section.max_steps else None,
        patience=section.patience,
    )
    return replace(plain, start=section.start)


def _staged(recipe: Recipe, kind: str) -> Curriculum:
    section = recipe.curriculum
    count = section.num_stages
    options: dict[str, Any] = {
        name: staged_values(recipe, name)
        for name in ("temperature", "kd_ratio", "learning_rate", *(["skew"] if is_skewed(recipe) else []))
    }
    options["epochs"] = section.epochs if len(section.epochs) > 1 else section.epochs[0]
    if section.max_steps:
        options["max_steps"] = section.max_steps if len(section.max_steps) > 1 else section.max_steps[0]
    for name in ("patience", "start", "optimizer", "schedule"):
        options[name] = getattr(section, name)
    if kind == "shuffled":
        options["seed"] = training_seed(recipe)
    made: Curriculum = getattr(Curriculum, kind)(count, **options)
    return made


def plain_settings(recipe: Recipe, steps: Sequence[int]) -> dict[str, Any]:
    """The keys of the section `curriculum` for plain distillation: all samples in one stage, lowest temperature.

    Args:
        recipe: with the stages to compare with, whose values of other schedules are averaged over their steps.
        steps: optimizer steps of each stage; plain distillation makes as many in all.
    """
    section = recipe.curriculum

    def mean(key: str) -> float:
        pairs = zip(staged_values(recipe, key), steps, strict=True)
        return round(math.fsum(value * count for value, count in pairs) / sum(steps), 6)

    scheduled = [key for key in ("skew", "learning_rate") if len(getattr(section, key)) > 1]
    return {
        "kind": "constant",
        "temperature": staged_values(recipe, "temperature")[0],
        **{key: mean(key) for key in ("kd_ratio", *scheduled)},
        "epochs": section.epochs[0],
        "max_steps": sum(steps),
        "patience": None,
    }


def control_recipe(recipe: Recipe, steps: Sequence[int]) -> Recipe:
    """The recipe of `curriculum.control`, for as many steps as the stages make together."""
    section = recipe.curriculum
    values = section.model_dump() | plain_settings(recipe, steps) | {"control": False}
    ranking = recipe.ranking.model_copy(update={"refresh": "never"})
    return recipe.model_copy(update={"curriculum": type(section).model_validate(values), "ranking": ranking})


def batch_size_of(recipe: Recipe) -> int:
    """Samples of one optimizer step, over processes and accumulation."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return recipe.training.batch_size * recipe.training.gradient_accumulation_steps * processes


def even_parts(recipe: Recipe, count: int) -> list[int] | None:
    """The subset of each of `count` rows, easiest first, as if equal parts were cut; None where they are too few."""
    parts = recipe.curriculum.num_stages
    return None if count < parts else [min(i // (count // parts), parts - 1) for i in range(count)]


def steps_of(recipe: Recipe, count: int) -> list[int]:
    """Optimizer steps of each stage on `count` training rows."""
    subsets, batch = even_parts(recipe, count) or [], batch_size_of(recipe)
    return list(curriculum_of(recipe, subsets, batch).stage_steps(subsets, batch))


def staged_values(recipe: Recipe, name: str) -> tuple[float, ...]:
    """A schedule of the recipe, one number a stage."""
    section = recipe.curriculum
    values: tuple[float, ...] = getattr(section, name)
    if len(values) == 2 and section.num_stages != 2:
        return per_stage(name, Ramp(*values, section.spacing), section.num_stages)
    return per_stage(name, values[0] if len(values) == 1 else values, section.num_stages)


def is_skewed(recipe: Recipe) -> bool:
    """Whether the divergence takes the skew of the stages."""
    return recipe.loss.divergence in ("skew_fkl", "skew_rkl")


def teacher_passes(recipe: Recipe, num_samples: int | None = None) -> float:
    """How many times warm-up and stages send the average sample through an online teacher.

    Stages that count steps need the number of samples; without it, and without `data.num_train`, it is infinite.
    """
    curriculum = curriculum_of(recipe)
    if recipe.curriculum.max_steps is None:
        # subsets are of equal size but for a remainder, which does not matter here
        return recipe.warmup.epochs + curriculum.passes(range(recipe.curriculum.num_stages))
    count = num_samples or recipe.data.num_train
    steps = sum(stage.max_steps or 0 for stage in curriculum.stages)
    rows = steps * recipe.training.batch_size * recipe.training.gradient_accumulation_steps
    return recipe.warmup.epochs + (rows / count if count else math.inf)
