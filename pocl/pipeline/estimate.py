"""How long each step of a run will take, and what it leaves on the disk, by rates that are measured on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pocl.pipeline.curricula import batch_size_of, curriculum_of, even_parts
from pocl.pipeline.disk import BYTES, CHECKPOINT
from pocl.pipeline.lora import num_trained
from pocl.pipeline.rates import Rates, Shape, measure, shape_of
from pocl.pipeline.steps import (
    ADAPTATION,
    CACHE,
    CONTROL,
    DATA,
    EVALUATION,
    MODELS,
    RANKING,
    REPORT,
    TRAINING,
    UPLOAD,
    WARMUP,
)
from pocl.pipeline.teacher import plans_cache
from pocl.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

# What no rate tells; seen on two cores of an AMD EPYC.
_WRITTEN = 0.8e9  # bytes of weights a second
_READ = 1.5e9
_START = 1.0  # seconds until a step has what it needs: modules, tables, the check of a model's head
_TRIAL = 15  # steps of answering, by which the engine that makes answers is tried on a model
_BESIDE = 1.25  # of a training step against its products, loss and optimizer: masks, figures, the log
_PICTURES = 2.5
_AT_A_TIME = 64  # answers, see `pocl.generation.memory`


@dataclass(frozen=True)
class Lengths:
    """Token rows of training, as some of them are."""

    rows: Sequence[int]
    """Tokens of each."""
    responses: Sequence[int]
    """Response tokens of each."""
    seconds: float
    """That a row takes to become tokens."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.rows))

    @property
    def response(self) -> float:
        return float(np.mean(self.responses))

    def padded(self, rows: int) -> float:
        """Tokens of a batch, padding included, on average."""
        drawn = np.random.default_rng(0).choice(np.asarray(self.rows), (200, max(1, rows)))
        return float(drawn.max(axis=1).mean() * max(1, rows))


@dataclass(frozen=True)
class StepEstimate:
    """Of one step."""

    name: str
    seconds: float
    bytes: int
    """That lie on the disk when the step is done."""


@dataclass(frozen=True)
class Estimate:
    """Of a run."""

    steps: list[StepEstimate]
    seconds_per_step: float
    """Of the optimizer in the stages."""
    stages: list[float]
    """Seconds of each stage, validation included."""
    seconds: float
    """Of all steps."""
    bytes: int
    """That they leave."""


def lengths_of(rows: Dataset, seconds: float = 0.0) -> Lengths:
    """Of the token rows of some samples, which took `seconds` to make."""
    from pocl.data.token_rows import chunks

    lengths: list[int] = []
    responses: list[int] = []
    for chunk in chunks(rows, "rows"):
        starts = np.cumsum(chunk.lengths) - chunk.lengths
        lengths += chunk.lengths.tolist()
        responses += np.add.reduceat((chunk.labels != -100).astype(int), starts).tolist()
    return Lengths(lengths, responses, seconds / max(1, len(lengths)))


def estimate(
    recipe: Recipe, names: Sequence[str], counts: Mapping[str, int], lengths: Lengths, *, corpus: bool = False
) -> Estimate | None:
    """Measure the rates, a second or two, and add up what each step does.

    Args:
        recipe: what is planned.
        names: of its steps.
        counts: rows of train, validation and test.
        lengths: of rows of training.
        corpus: whether the rows are blocks of texts, which nobody answers.

    Returns:
        None where a model's configuration is not on this machine.
    """
    from pocl.pipeline.guess import configuration_of, num_parameters

    shapes: list[Shape] = []
    for student in (False, True):
        config, parameters = configuration_of(recipe, student=student), num_parameters(recipe, student=student)
        if config is None or parameters is None:
            return None
        trained = num_trained(recipe) if student else None
        shapes.append(shape_of(config, parameters, trained))
    rows = recipe.training.batch_size
    options: dict[str, Any] = {
        "length": round(lengths.mean),
        "rows": rows,
        "responses": round(rows * lengths.response),
        "answering": min(_AT_A_TIME, max(counts.values())),
        "precision": recipe.training.precision,
    }
    of_teacher = measure(shapes[0], teacher=shapes[0] if recipe.teacher.adapt_epochs else None, **options)
    of_student = measure(shapes[1], teacher=shapes[0], **options)
    return _Work(recipe, counts, lengths, corpus, shapes[0], shapes[1], of_teacher, of_student).all(names)


@dataclass(frozen=True)
class _Work:
    recipe: Recipe
    counts: Mapping[str, int]
    lengths: Lengths
    corpus: bool
    teacher: Shape
    student: Shape
    of_teacher: Rates
    of_student: Rates

    def all(self, names: Sequence[str]) -> Estimate:
        stages = self.stage_seconds() if {TRAINING, CONTROL} & set(names) else []
        of = {
            MODELS: self.models,
            DATA: self.data,
            ADAPTATION: self.adaptation,
            CACHE: self.cache,
            WARMUP: self.warm_up,
            RANKING: self.ranking,
            TRAINING: lambda: self.training(stages),
            CONTROL: lambda: self.training(stages),  # as many steps
            EVALUATION: self.evaluation,
            REPORT: lambda: (_PICTURES, 1_000_000),
            UPLOAD: lambda: (self.saved / 10e6, 0),  # at the speed of a good line
        }
        steps = [StepEstimate(name, seconds, int(size)) for name in names for seconds, size in [of[name]()]]
        seconds, left = sum(step.seconds for step in steps), sum(step.bytes for step in steps)
        return Estimate(steps, self.step(), stages, seconds, left)

    # -------------------------------------------------------------------------------------------------------- pieces

    @property
    def student_bytes(self) -> int:
        return self.student.parameters * BYTES[self.recipe.student.dtype]

    @property
    def teacher_bytes(self) -> int:
        return self.teacher.parameters * BYTES[self.recipe.teacher.dtype]

    @property
    def saved(self) -> int:
        """Bytes of a trained student."""
        return self.student_bytes if self.student.trained is None else 4 * self.student.trained

    def load(self, *sizes: int) -> float:
        return _START + sum(sizes) / _READ

    def step(self, teacher: float = 0.0) -> float:
        """Seconds of an optimizer step of the student; `teacher`: kd, 0 with a cache."""
        training, lengths, rates = self.recipe.training, self.lengths, self.of_student
        rows = training.batch_size
        padded, responses = lengths.padded(rows), rows * lengths.response
        seconds = padded * rates.learn * (4 / 3 if training.activation_checkpointing else 1)
        seconds += responses * rates.compare
        if not plans_cache(self.recipe):
            seconds += padded * self.of_teacher.read
        if share := self.recipe.on_policy.share:
            asked = self.answers(rates, rows, self.recipe.on_policy.max_new_tokens)
            seconds += share * (asked + padded * self.of_teacher.read)
        return _BESIDE * (training.gradient_accumulation_steps * seconds + rates.update)

    def answers(self, rates: Rates, count: int, longest: int) -> float:
        """Seconds of so many answers: of the length of the data's, or the longest possible, or between."""
        if self.corpus:
            return 0.0
        each = math.sqrt(longest * min(longest, max(1.0, self.lengths.response)))
        steps = max(longest, count * each / _AT_A_TIME)  # some answer is the longest possible
        return (_TRIAL + steps) * rates.step + count * each * rates.answer

    def scores(self, rates: Rates, count: int) -> float:
        return count * (self.lengths.mean * rates.read + self.lengths.response * rates.judge)

    def validation(self) -> float:
        count, lengths = self.counts["validation"], self.lengths
        if not count:
            return 0.0
        padded = lengths.padded(self.recipe.training.batch_size) / self.recipe.training.batch_size * count
        seconds = 2 * (padded * self.of_student.read + count * lengths.response * 2 * self.of_student.judge)
        if not plans_cache(self.recipe):
            seconds += 2 * padded * self.of_teacher.read
        if self.recipe.training.metric == "rouge_l":
            longest = self.recipe.ranking.max_new_tokens
            seconds += self.answers(self.of_student, count, longest)
        return seconds

    def checkpoint(self, parameters: int) -> float:
        return 4 * CHECKPOINT * parameters / _WRITTEN

    def epochs(self, count: int, epochs: float, step: float, parameters: int) -> float:
        """Seconds of plain epochs over the training rows, with a checkpoint after each."""
        batch = batch_size_of(self.recipe)
        return epochs * (math.ceil(count / batch) * step + self.checkpoint(parameters))

    # --------------------------------------------------------------------------------------------------------- steps

    def models(self) -> tuple[float, float]:
        written = self.student_bytes if self.recipe.student.from_teacher else 0
        read = self.teacher_bytes + (0 if written else self.student_bytes)
        return self.load(read) + written / _WRITTEN, written

    def data(self) -> tuple[float, float]:
        count = sum(self.counts.values())
        return _START + count * self.lengths.seconds, count * (12 * self.lengths.mean + 4 * self.lengths.response)

    def adaptation(self) -> tuple[float, float]:
        rows, rates = self.recipe.training.batch_size, self.of_teacher
        step = self.lengths.padded(rows) * rates.learn + rows * self.lengths.response * rates.compare + rates.update
        numbers = self.teacher.parameters
        seconds = self.epochs(self.counts["train"], self.recipe.teacher.adapt_epochs, step, numbers)
        return self.load(self.teacher_bytes) + seconds + self.teacher_bytes / _WRITTEN, self.teacher_bytes

    def cache(self) -> tuple[float, float]:
        count = self.counts["train"] + self.counts["validation"]
        width = BYTES[self.recipe.teacher_cache.dtype or self.recipe.teacher.dtype]
        size = count * self.lengths.response * self.teacher.hidden * width
        together = max(1, self.recipe.teacher_cache.batch_tokens // max(self.lengths.rows))
        seconds = count * self.lengths.padded(together) / together * self.of_teacher.read + size / _WRITTEN
        return self.load(self.teacher_bytes) + seconds, size

    def warm_up(self) -> tuple[float, float]:
        numbers = self.student.trained or self.student.parameters
        seconds = self.epochs(self.counts["train"], self.recipe.warmup.epochs, self.step(), numbers)
        return self.load(self.student_bytes) + seconds + self.saved / _WRITTEN, self.saved

    def ranking(self) -> tuple[float, float]:
        section, count = self.recipe.ranking, self.counts["train"]
        seconds = self.load(self.student_bytes) + self.scores(self.of_student, count)
        if section.needs_answers:
            seconds += self.answers(self.of_student, count, section.max_new_tokens)
        if section.needs_teacher:
            seconds += self.scores(self.of_teacher, count) + self.load(self.teacher_bytes)
        return seconds, count * 16 * self.lengths.mean

    def stage_seconds(self) -> list[float]:
        recipe, batch = self.recipe, batch_size_of(self.recipe)
        subsets = even_parts(recipe, recipe.training.draw or self.counts["train"]) or []
        curriculum = curriculum_of(recipe, subsets, batch)
        every, numbers = recipe.training.eval_every, self.student.trained or self.student.parameters
        found = []
        for stage, rows in zip(curriculum.stages, curriculum.rows(subsets), strict=True):
            steps = stage.steps(len(rows), batch)
            epochs = max(1, round(steps / math.ceil(len(rows) / batch)))
            pauses = epochs if every == "epoch" else max(1, steps // int(every))
            pause = self.validation() + self.checkpoint(numbers)
            found.append(steps * self.step() + pauses * pause + 4 * numbers / _READ)
        return found

    def training(self, stages: Sequence[float]) -> tuple[float, float]:
        seconds = self.load(self.student_bytes) + self.validation() + sum(stages) + self.saved / _WRITTEN
        if not plans_cache(self.recipe) or self.recipe.on_policy.share:
            seconds += self.teacher_bytes / _READ
        return seconds, self.saved

    def evaluation(self) -> tuple[float, float]:
        section, count = self.recipe.evaluation, self.counts["test"]
        runs = len(section.seeds) if section.temperature else 1
        models = 2 + bool(self.recipe.warmup.epochs) + self.recipe.curriculum.control
        of_one = self.scores(self.of_student, count) + self.scores(self.of_teacher, count)
        of_one += runs * self.answers(self.of_student, count, section.max_new_tokens)
        seconds = self.load(self.teacher_bytes) + models * (self.load(self.student_bytes) - _START / 2 + of_one)
        if section.include_teacher:
            seconds += self.scores(self.of_teacher, count)
            seconds += runs * self.answers(self.of_teacher, count, section.max_new_tokens)
        return seconds, count * 4 * 8 * self.lengths.mean
