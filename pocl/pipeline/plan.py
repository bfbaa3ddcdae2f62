"""What a recipe would do, without doing it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pocl.data.tables import values_of
from pocl.pipeline.curricula import batch_size_of, curriculum_of, even_parts, teacher_passes
from pocl.pipeline.dry_run import Findings
from pocl.pipeline.estimate import Estimate, estimate
from pocl.pipeline.guess import CHARACTERS_PER_TOKEN
from pocl.pipeline.steps import build_steps
from pocl.pipeline.teacher import is_apart, plans_cache, stores_top_k
from pocl.pipeline.training import divergence_parameters, scales_by_temperature
from pocl.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    steps: list[tuple[str, str]]
    """Name and purpose of each step."""
    stages: list[dict[str, str]]
    """A row for each stage (see `Curriculum.table`), with its time where that could be estimated."""
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
    estimate: Estimate | None
    """Time and disk of each step that is to be done, by rates measured on this machine; None where the models or the
    data are not on it."""


def plan(recipe: Recipe, *, until: str = "report", change: bool = False) -> Plan:
    """Stages, samples, steps, temperatures and learning rates of a recipe, and what would end its run.

    Reads the data, and the models' configurations and tokenizers, where they are on this machine, and times layers of
    their shape for a second or two; fetches nothing, loads no weights, writes nothing.

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
    from pocl.pipeline.prepare import split_examples
    from pocl.pipeline.run import needed_for

    steps = needed_for(build_steps(recipe, content=content_of(recipe)), until, recipe)
    count, unread, problem, train, corpus = recipe.data.num_train, "", "", None, False
    counts: dict[str, int] = {}
    try:
        with _offline():
            splits = split_examples(recipe)
            train = splits["train"]
            corpus = is_corpus(train.column_names)
            counts = {name: blocks_of(recipe, rows) if corpus else len(rows) for name, rows in splits.items()}
            count = counts["train"]
    except ConnectionError:
        unread = "they are not on this machine, and a plan fetches nothing"
    except Exception as error:  # whatever a file or a loader may raise: a plan is possible without
        unread = f"{type(error).__name__}: {error}"
        problem = in_words(error)
    if train is not None and len(train) < recipe.curriculum.num_stages and not corpus:
        problem = (
            f"{len(train)} training samples cannot fill the {recipe.curriculum.num_stages} stages of "
            "curriculum.num_stages: use fewer stages or more data"
        )
    with _offline():
        findings, lengths = look(recipe, steps, train, change=change)
        findings.problems[:0] = [problem] if problem else []
        made = None
        if lengths is not None and count and not findings.problems:
            pending = [step.name for step in steps if findings.steps.get(step.name) != "done"]
            made = estimate(recipe, pending, counts, lengths, corpus=corpus)
    count = recipe.training.draw or count
    subsets, batch_size = even_parts(recipe, count or 0), batch_size_of(recipe)
    stages = curriculum_of(recipe, subsets, batch_size).table(subsets, batch_size)
    for number, row in enumerate(stages):  # columns that fit a terminal
        row |= {"time": f"~{made.stages[number] / 60:.1f} min"} if made and made.stages else {}
        stages[number] = {"T" if name == "temperature" else name: value for name, value in row.items()}
    return Plan(
        [(step.name, step.why) for step in steps],
        stages,
        count,
        unread,
        _teacher(recipe),
        _loss(recipe),
        findings,
        made,
    )


def blocks_of(recipe: Recipe, train: Dataset) -> int:
    """How many blocks the texts of a corpus make, a guess."""
    size = int(recipe.data.max_length * CHARACTERS_PER_TOKEN)
    lengths = [len(text) for text in values_of(train, "text")]
    joined = recipe.data.blocks == "joined"
    return -(-sum(lengths) // size) if joined else sum(-(-length // size) for length in lengths)


def _loss(recipe: Recipe) -> str:
    name = recipe.loss.divergence
    parameters = "".join(f", {key} {value:g}" for key, value in divergence_parameters(recipe).items())
    return f"{name}{parameters}, {'times T^2' if scales_by_temperature(recipe, name) else 'without T^2'}"


def _teacher(recipe: Recipe) -> str:
    cached, on_policy = plans_cache(recipe), recipe.on_policy.share > 0
    passes = teacher_passes(recipe)
    rounds = f"{passes:.3g} passes over the samples" if math.isfinite(passes) else "steps of all stages"
    kept = f"its {recipe.teacher.top_k} likeliest tokens serve" if stores_top_k(recipe) else "its hidden states serve"
    teacher = f"runs once, {kept} all {rounds}" if cached else f"runs at every step, {rounds}"
    if is_apart(recipe):
        where = f"on the server {recipe.teacher.server}" if recipe.teacher.server else "in vLLM"
        teacher = f"runs once {where}, {kept} all {rounds}"
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
