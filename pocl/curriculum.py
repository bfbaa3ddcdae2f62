"""Training from easy to hard in stages, as pure data: which samples, how long, at which temperature and loss mix.

A `Curriculum` is a tuple of `Stage`s and four rules for passing from one to the next. It knows nothing of models or
trainers: sample counts go in, steps and tables come out. `Curriculum.baby_step()` is the paper's (Liu and Zhang, arXiv
2506.05695): stage i trains on the subsets 0..i, easiest first, and the temperature rises from stage to stage.
`constant`, `one_pass`, `reversed` and `shuffled` are what it is compared with.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Start = Literal["best", "last"]
Optimizer = Literal["fresh", "carried"]
Schedule = Literal["restart", "continuous"]


@dataclass(frozen=True)
class Ramp:
    """Values going from `start` (first stage) to `end` (last stage) in equal steps or in equal factors."""

    start: float
    end: float
    spacing: Literal["linear", "geometric"] = "linear"

    def __post_init__(self) -> None:
        if self.spacing not in ("linear", "geometric"):
            raise ValueError(f"spacing must be 'linear' or 'geometric', got {self.spacing!r}")
        if self.spacing == "geometric" and not (self.start > 0 and self.end > 0):
            raise ValueError(f"a geometric ramp needs start > 0 and end > 0, got {self.start} and {self.end}")

    def values(self, count: int) -> tuple[float, ...]:
        """The `count` values, ends included; one value alone is `start`."""
        fractions = [i / (count - 1) if count > 1 else 0.0 for i in range(count)]
        if self.spacing == "geometric":
            return tuple(self.start ** (1 - f) * self.end**f for f in fractions)
        return tuple(self.start * (1 - f) + self.end * f for f in fractions)


# A number (every stage), a pair (linear from first to last stage), one number a stage, or a Ramp or its fields.
Values = float | Sequence[float] | Ramp | Mapping[str, object]


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        index: position in the curriculum, from 0.
        subsets: subsets of the data it trains on (0 is the easiest).
        epochs: passes over its samples; an upper bound where the curriculum stops at convergence.
        temperature: of both softmaxes in the divergence, > 0.
        kd_ratio: weight of the divergence in [0, 1]; the rest is cross-entropy with the labels.
        skew: mixture weight of skew divergences in [0, 1); None leaves the divergence's own.
        learning_rate: peak; None takes the trainer's.
        max_steps: optimizer steps, in place of `epochs` when given.
    """

    index: int
    subsets: tuple[int, ...]
    epochs: int = 8
    temperature: float = 1.0
    kd_ratio: float = 1.0
    skew: float | None = None
    learning_rate: float | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "subsets", tuple(self.subsets))
        if not self.subsets or min(self.subsets) < 0 or len(set(self.subsets)) != len(self.subsets):
            raise self._error("subsets", self.subsets, "at least one subset, each a number >= 0 and named once")
        if self.epochs < 1 or self.epochs != int(self.epochs):
            raise self._error("epochs", self.epochs, "a whole number >= 1")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise self._error(
                "temperature", self.temperature, "a finite number > 0 (1 leaves the distributions as they are)"
            )
        if not 0 <= self.kd_ratio <= 1:
            raise self._error("kd_ratio", self.kd_ratio, "a number in [0, 1] (1 is pure distillation)")
        if self.skew is not None and not 0 <= self.skew < 1:
            raise self._error("skew", self.skew, "a number in [0, 1)")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise self._error("learning_rate", self.learning_rate, "a number > 0, or None for the trainer's")
        if self.max_steps is not None and self.max_steps < 1:
            raise self._error("max_steps", self.max_steps, "a number >= 1, or None to count epochs")

    def _error(self, name: str, value: object, allowed: str) -> ValueError:
        return ValueError(f"{name} of stage {self.index} must be {allowed}, got {value!r}")

    def steps(self, num_samples: int, batch_size: int) -> int:
        """Optimizer steps over `num_samples` samples in batches of `batch_size` over all processes and accumulation."""
        return self.max_steps or self.epochs * math.ceil(num_samples / batch_size)


@dataclass(frozen=True)
class Curriculum:
    """Stages, and the rules between them.

    Attributes:
        stages: numbered from 0.
        name: of the scheme, for tables and logs.
        patience: stop a stage after so many evaluations without improvement; None trains all its epochs.
        start: a stage starts from the best checkpoint of the one before (needs evaluation), or from its last weights.
        optimizer: anew in every stage, or carried with the weights.
        schedule: the learning rate restarts in every stage, or one schedule spans all of them.
        shuffle_seed: deal the samples to subsets of the same sizes at random, in place of by difficulty.
    """

    stages: tuple[Stage, ...]
    name: str = "custom"
    patience: int | None = None
    start: Start = "best"
    optimizer: Optimizer = "fresh"
    schedule: Schedule = "restart"
    shuffle_seed: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("stages must hold at least one Stage, got none")
        if [stage.index for stage in self.stages] != list(range(len(self.stages))):
            raise ValueError(f"stages must be numbered 0, 1, 2, ..., got {[stage.index for stage in self.stages]}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(
                f"patience must be a number of evaluations >= 1, or None for all epochs, got {self.patience}"
            )
        choices = {"start": ("best", "last"), "optimizer": ("fresh", "carried"), "schedule": ("restart", "continuous")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @classmethod
    def baby_step(
        cls,
        num_stages: int = 4,
        temperature: Values = (1.0, 2.0),
        kd_ratio: Values = (0.7, 1.0),
        epochs: int | Sequence[int] = 8,
        *,
        skew: Values | None = None,
        learning_rate: Values | None = None,
        max_steps: int | Sequence[int] | None = None,
        patience: int | None = None,
        start: Start = "best",
        optimizer: Optimizer = "fresh",
        schedule: Schedule = "restart",
    ) -> Curriculum:
        """The paper's: stage i trains on subsets 0..i, easy ones first and kept, while the temperature rises.

        Every quantity is a number for all stages, a pair (linear from the first stage to the last), one number a stage,
        or a `Ramp`. Defaults are the paper's forward-KL run; optimizer and learning rate start anew in every stage.

        Raises:
            ValueError: a value is out of its range, or a list has neither two entries nor one a stage.
        """
        if num_stages < 1:
            raise ValueError(f"num_stages must be a number >= 1, got {num_stages}")
        columns = zip(
            per_stage("temperature", temperature, num_stages),
            per_stage("kd_ratio", kd_ratio, num_stages),
            _counts("epochs", epochs, num_stages),
            (None,) * num_stages if skew is None else per_stage("skew", skew, num_stages),
            (None,) * num_stages if learning_rate is None else per_stage("learning_rate", learning_rate, num_stages),
            (None,) * num_stages if max_steps is None else _counts("max_steps", max_steps, num_stages),
            strict=True,
        )
        stages = (Stage(i, tuple(range(i + 1)), e, t, k, s, lr, m) for i, (t, k, e, s, lr, m) in enumerate(columns))
        return cls(tuple(stages), "baby_step", patience, start, optimizer, schedule)

    @classmethod
    def constant(
        cls,
        temperature: float = 1.0,
        kd_ratio: float = 1.0,
        epochs: int = 20,
        *,
        num_subsets: int = 4,
        skew: float | None = None,
        learning_rate: float | None = None,
        max_steps: int | None = None,
        patience: int | None = None,
    ) -> Curriculum:
        """Plain distillation: one stage over all subsets. 20 epochs see as much data as `baby_step` with its 8."""
        stage = Stage(0, tuple(range(num_subsets)), epochs, temperature, kd_ratio, skew, learning_rate, max_steps)
        return cls((stage,), "constant", patience)

    @classmethod
    def one_pass(cls, num_stages: int = 4, *args: object, **kwargs: object) -> Curriculum:
        """As `baby_step`, but stage i trains on subset i alone: easier samples are left behind."""
        base = cls.baby_step(num_stages, *args, **kwargs)  # type: ignore[arg-type]
        return replace(base, name="one_pass", stages=tuple(replace(s, subsets=(s.index,)) for s in base.stages))

    @classmethod
    def reversed(cls, num_stages: int = 4, *args: object, **kwargs: object) -> Curriculum:
        """As `baby_step`, but hard first: stage i trains on the i + 1 hardest subsets."""
        base = cls.baby_step(num_stages, *args, **kwargs)  # type: ignore[arg-type]
        stages = (replace(s, subsets=tuple(num_stages - 1 - j for j in s.subsets)) for s in base.stages)
        return replace(base, name="reversed", stages=tuple(stages))

    @classmethod
    def shuffled(cls, num_stages: int = 4, *args: object, seed: int = 0, **kwargs: object) -> Curriculum:
        """As `baby_step`, but over subsets dealt at random: the stages without the difficulty."""
        base = cls.baby_step(num_stages, *args, **kwargs)  # type: ignore[arg-type]
        return replace(base, name="shuffled", shuffle_seed=seed)

    @classmethod
    def whole(cls, num_stages: int = 4, *args: object, **kwargs: object) -> Curriculum:
        """All samples in every stage, for as many steps as `baby_step` makes: schedules and restarts without an order.

        Stages that count epochs make `epochs` passes over all samples; give `max_steps` for equal steps.
        """
        base = cls.baby_step(num_stages, *args, **kwargs)  # type: ignore[arg-type]
        return replace(
            base, name="whole", stages=tuple(replace(s, subsets=tuple(range(num_stages))) for s in base.stages)
        )

    @property
    def num_subsets(self) -> int:
        return 1 + max(subset for stage in self.stages for subset in stage.subsets)

    def rows(self, subsets: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Row numbers that each stage trains on, ascending.

        Args:
            subsets: the subset of every row of the training set.

        Raises:
            ValueError: there are fewer rows than stages, or a stage is left without rows.
        """
        if len(subsets) < len(self.stages):
            raise ValueError(
                f"the training set has {len(subsets)} samples for {len(self.stages)} stages; use fewer stages or more "
                "samples"
            )
        dealt = list(subsets)
        if self.shuffle_seed is not None:
            random.Random(self.shuffle_seed).shuffle(dealt)
        rows = tuple(tuple(i for i, subset in enumerate(dealt) if subset in stage.subsets) for stage in self.stages)
        for stage, chosen in zip(self.stages, rows, strict=True):
            if not chosen:
                raise ValueError(
                    f"stage {stage.index} has no samples: it trains on subsets {list(stage.subsets)}, and the training "
                    f"set has the subsets {sorted(set(subsets))}; rank with num_subsets={self.num_subsets}"
                )
        return rows

    def stage_steps(self, subsets: Sequence[int], batch_size: int) -> tuple[int, ...]:
        """Optimizer steps of each stage; `batch_size` counts all processes and accumulation."""
        rows = self.rows(subsets)
        return tuple(s.steps(len(r), batch_size) for s, r in zip(self.stages, rows, strict=True))

    def passes(self, subsets: Sequence[int], batch_size: int | None = None) -> float:
        """How often the average sample is trained on, which is what a teacher cache saves: 20 for the paper's.

        Args:
            subsets: the subset of every row.
            batch_size: samples of one optimizer step; needed where a stage has `max_steps`.
        """
        samples = 0
        for stage, rows in zip(self.stages, self.rows(subsets), strict=True):
            if stage.max_steps is None:
                samples += stage.epochs * len(rows)
            elif batch_size is None:
                raise ValueError(f"batch_size is needed, as stage {stage.index} has max_steps={stage.max_steps}")
            else:
                samples += stage.max_steps * min(batch_size, len(rows))
        return samples / len(subsets)

    def stage_at(self, step: int, stage_steps: Sequence[int] | None = None) -> Stage:
        """The stage of a global optimizer step counted from 0; the last stage goes on for ever.

        Args:
            step: global step, from 0.
            stage_steps: steps of each stage (`Curriculum.stage_steps`); not needed where every stage has `max_steps`.
        """
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if stage_steps is None:
            stage_steps = [stage.max_steps or 0 for stage in self.stages]
            if not all(stage_steps):
                raise ValueError("stage_steps is needed where a stage counts epochs; pass Curriculum.stage_steps(...)")
        for stage, steps in zip(self.stages, stage_steps, strict=True):
            if step < steps:
                return stage
            step -= steps
        return self.stages[-1]

    def table(
        self,
        subsets: Sequence[int] | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        seconds_per_step: float | None = None,
    ) -> list[dict[str, str]]:
        """One row a stage, ready to print; samples, steps and time (minutes) as far as the arguments tell them."""
        rows = None if subsets is None else self.rows(subsets)
        table = []
        for stage in self.stages:
            row = {"stage": str(stage.index), "subsets": _ranges(stage.subsets)}
            if rows is not None:
                row["samples"] = f"{len(rows[stage.index]):,}"
            row["epochs"] = "-" if stage.max_steps else f"{stage.epochs}"
            steps = stage.max_steps
            if rows is not None and batch_size is not None:
                steps = stage.steps(len(rows[stage.index]), batch_size)
            row["steps"] = "?" if steps is None else ("<= " if self.patience else "") + f"{steps:,}"
            row["temperature"] = f"{stage.temperature:.3g}"
            row["kd_ratio"] = f"{stage.kd_ratio:.3g}"
            row["skew"] = "-" if stage.skew is None else f"{stage.skew:.3g}"
            rate = learning_rate if stage.learning_rate is None else stage.learning_rate
            row["learning_rate"] = "-" if rate is None else f"{rate:.3g}"
            if seconds_per_step is not None and steps is not None:
                row["time"] = f"{seconds_per_step * steps / 60:.1f} min"
            table.append(row)
        return table

    def describe(
        self,
        subsets: Sequence[int] | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        seconds_per_step: float | None = None,
    ) -> str:
        """`table` as aligned text, with the rules between stages in the last line."""
        rows = self.table(subsets, batch_size, learning_rate, seconds_per_step)
        header = list(rows[0])
        widths = [max(len(name), *(len(row[name]) for row in rows)) for name in header]
        lines = ["  ".join(n.rjust(w) for n, w in zip(header, widths, strict=True))]
        lines += ["  ".join(row[n].rjust(w) for n, w in zip(header, widths, strict=True)) for row in rows]
        stop = "all epochs" if self.patience is None else f"until {self.patience} evaluations bring no improvement"
        lines.append(
            f"{self.name}: {stop}; each stage starts from the {self.start} weights of the one before, "
            f"optimizer {self.optimizer}, learning rate {self.schedule}"
        )
        return "\n".join(lines)


def per_stage(name: str, values: Values, count: int) -> tuple[float, ...]:
    """`values` spelled out for `count` stages: a number, a pair, one a stage, a `Ramp` or its fields as a mapping.

    Raises:
        ValueError: a list whose length is neither 2 nor `count`, or a mapping with other fields than a Ramp's.
    """
    if isinstance(values, Mapping):
        unknown = values.keys() - {"start", "end", "spacing"}
        if unknown or not {"start", "end"} <= values.keys():
            raise ValueError(f"{name} as a mapping must have start, end and, if wanted, spacing, got {sorted(values)}")
        values = Ramp(**values)  # type: ignore[arg-type]
    if isinstance(values, Ramp):
        return values.values(count)
    if not isinstance(values, Iterable):
        return (float(values),) * count
    numbers = tuple(float(value) for value in values)
    if len(numbers) == count:
        return numbers
    if len(numbers) == 2:
        return Ramp(*numbers).values(count)
    raise ValueError(
        f"{name} must be a number, a pair (first stage, last stage) or {count} numbers, got {len(numbers)}"
    )


def _counts(name: str, values: int | Sequence[int], count: int) -> tuple[int, ...]:
    if not isinstance(values, Iterable):
        return (values,) * count
    if len(values) != count:
        raise ValueError(f"{name} must be a number or {count} numbers, one a stage, got {len(values)}")
    return tuple(values)


def _ranges(subsets: tuple[int, ...]) -> str:
    low, high = min(subsets), max(subsets)
    if len(subsets) > 1 and set(subsets) == set(range(low, high + 1)):
        return f"{low}-{high}"
    return ",".join(map(str, subsets))
