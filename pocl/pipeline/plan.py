"""What a recipe would do, without doing it."""

from __future__ import annotations

from dataclasses import dataclass

from pocl.pipeline.steps import build_steps
from pocl.pipeline.training import curriculum_of, teacher_passes
from pocl.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    steps: list[tuple[str, str]]
    """Name and purpose of each step."""
    stages: list[dict[str, str]]
    """A row for each stage (see `Curriculum.table`)."""
    num_samples: int | None
    """Training samples, empty ones included; where the data cannot be read, `data.num_train`, which may be None."""
    unread: str
    """Why the data could not be read; empty if it was."""
    teacher: str
    """How often the teacher runs, in words."""


def plan(recipe: Recipe) -> Plan:
    """Stages, samples, steps, temperatures and learning rates of a recipe. Reads the data, never the models."""
    from pocl.pipeline.prepare import split_examples

    count, unread = recipe.data.num_train, ""
    try:
        count = len(split_examples(recipe)["train"])
    except Exception as error:  # whatever a hub, a network or a file may raise: a plan is possible without
        unread = f"{type(error).__name__}: {error}"
    curriculum = curriculum_of(recipe)
    parts = recipe.curriculum.num_stages
    training = recipe.training
    subsets = None if count is None else [min(i * parts // count, parts - 1) for i in range(count)]
    stages = curriculum.table(subsets, training.batch_size * training.gradient_accumulation_steps)
    passes = teacher_passes(recipe)
    mode, on_policy = recipe.teacher_cache.mode, recipe.on_policy.share > 0
    cached = mode == "cached" or (mode == "auto" and passes > 1 and not on_policy)
    rounds = f"{passes:.3g} passes over the samples"
    teacher = f"runs once, its hidden states serve all {rounds}" if cached else f"runs at every step, {rounds}"
    if on_policy and cached:
        teacher += ", and again for responses that the student samples"
    return Plan([(step.name, step.why) for step in build_steps(recipe)], stages, count, unread, teacher)
