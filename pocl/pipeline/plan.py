"""What a recipe would do, without doing it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pocl.data.tables import values_of
from pocl.pipeline.curricula import curriculum_of, teacher_passes
from pocl.pipeline.dry_run import Findings
from pocl.pipeline.guess import CHARACTERS_PER_TOKEN
from pocl.pipeline.steps import build_steps
from pocl.pipeline.training import divergence_parameters, plans_cache, scales_by_temperature
from pocl.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    steps: list[tuple[str, str]]
    """Name and purpose of each step."""
    stages: list[dict[str, str]]
    """A row for each stage (see `Curriculum.table`), with a guess of its time where the models' sizes are known."""
    num_samples: int | None
    """Training samples, empty ones included; where the data cannot be read, `data.num_train`, which may be None."""
    unread: str
    """Why the data could not be read; empty if it was."""
    teacher: str
    """How often the teacher runs, in words."""
    loss: str
    """The divergence with its parameters, and its factor."""
    findings: Findings
    """What would end the run, and what becomes of its folder."""


def plan(recipe: Recipe, *, until: str = "report", change: bool = False) -> Plan:
    """Stages, samples, steps, temperatures and learning rates of a recipe, and what would end its run.

    Reads the data, and the models' configurations and tokenizers, where they are on this machine; fetches nothing,
    loads no weights, writes nothing.

    Args:
        recipe: what is asked for.
        until: the last step, see `run`.
        change: whether a folder of another recipe is accepted.

    Raises:
        ValueError: the recipe has no step `until`.
    """
    from pocl.data.corpus import is_corpus
    from pocl.errors import in_words
    from pocl.pipeline.dry_run import content_of, look
    from pocl.pipeline.guess import seconds_per_step
    from pocl.pipeline.prepare import split_examples
    from pocl.pipeline.run import needed_for

    steps = needed_for(build_steps(recipe, content=content_of(recipe)), until, recipe)
    count, unread, seconds, problem, train = recipe.data.num_train, "", None, "", None
    try:
        with _offline():
            train = split_examples(recipe)["train"]
            count = len(train)
            some = train.select(range(min(count, 1000)))
            texts = [prompt + response for prompt, response in zip(some["prompt"], some["response"], strict=True)]
            if is_corpus(train.column_names):
                count, texts = blocks_of(recipe, train)
            seconds = seconds_per_step(recipe, texts, cached=plans_cache(recipe))
    except ConnectionError:
        unread = "they are not on this machine, and a plan fetches nothing"
    except Exception as error:  # whatever a file or a loader may raise: a plan is possible without
        unread = f"{type(error).__name__}: {error}"
        problem = in_words(error)
    if train is not None and len(train) < recipe.curriculum.num_stages and not is_corpus(train.column_names):
        problem = (
            f"{len(train)} training samples cannot fill the {recipe.curriculum.num_stages} stages of "
            "curriculum.num_stages: use fewer stages or more data"
        )
    with _offline():
        findings = look(recipe, steps, train, change=change)
    findings.problems[:0] = [problem] if problem else []
    count = recipe.training.draw or count
    parts = recipe.curriculum.num_stages
    training = recipe.training
    subsets = (
        None if count is None or count < parts else [min(i // max(1, count // parts), parts - 1) for i in range(count)]
    )
    batch_size = training.batch_size * training.gradient_accumulation_steps
    stages = curriculum_of(recipe, subsets, batch_size).table(subsets, batch_size, seconds_per_step=seconds)
    for number, row in enumerate(stages):  # columns that fit a terminal, and a guess that looks like one
        row |= {"time": f"~{row['time']}"} if "time" in row else {}
        stages[number] = {"T" if name == "temperature" else name: value for name, value in row.items()}
    return Plan(
        [(step.name, step.why) for step in steps],
        stages,
        count,
        unread,
        _teacher(recipe),
        _loss(recipe),
        findings,
    )


def blocks_of(recipe: Recipe, train: Dataset) -> tuple[int, list[str]]:
    """How many blocks the texts of a corpus make, a guess, and one of them."""
    size = int(recipe.data.max_length * CHARACTERS_PER_TOKEN)
    lengths = [len(text) for text in values_of(train, "text")]
    joined = recipe.data.blocks == "joined"
    return -(-sum(lengths) // size) if joined else sum(-(-length // size) for length in lengths), ["x" * size]


def _loss(recipe: Recipe) -> str:
    name = recipe.loss.divergence
    parameters = "".join(f", {key} {value:g}" for key, value in divergence_parameters(recipe).items())
    return f"{name}{parameters}, {'times T^2' if scales_by_temperature(recipe, name) else 'without T^2'}"


def _teacher(recipe: Recipe) -> str:
    cached, on_policy = plans_cache(recipe), recipe.on_policy.share > 0
    passes = teacher_passes(recipe)
    rounds = f"{passes:.3g} passes over the samples" if math.isfinite(passes) else "steps of all stages"
    teacher = f"runs once, its hidden states serve all {rounds}" if cached else f"runs at every step, {rounds}"
    if on_policy and cached:
        teacher += ", and again for responses that the student samples"
    return teacher


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """The hub's libraries answer from their caches or fail at once, without retries."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
