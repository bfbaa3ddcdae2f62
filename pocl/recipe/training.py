"""The section of a recipe for training, and the kinds of values that it shares with others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from pocl.interval import Interval
from pocl.recipe.comparing import Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def as_tuple(value: Any) -> Any:
    """One value is a list of one; `1,2`, as a command line has it, is a list of two."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return (value,) if isinstance(value, (int, float)) else value


def _as_interval(value: Any) -> Any:
    Interval.parse(value)
    return str(value)


def _steps_or_epoch(value: Any) -> Any:
    steps = int(value) if isinstance(value, str) and value.strip().isdigit() else value
    if steps != "epoch" and not (isinstance(steps, int) and steps > 0):
        raise ValueError(f"must be `epoch`, or a number of optimizer steps of at least 1, got {value!r}")
    return steps


class TrainingSection(Section):
    """The optimisation of warm-up and stages alike."""

    batch_size: PositiveInt = 16
    """Samples of one process in one forward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes for one optimizer step."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's."""
    adam_beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """AdamW's memory for squared gradients; 0.95 suits runs of a few hundred steps."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping: longer ones are scaled down to this norm."""
    warmup_steps: NonNegativeFloat = 0.0
    """Optimizer steps at the start of each stage in which the learning rate rises to its peak; below 1: that fraction
    of the stage's steps."""
    min_learning_rate_ratio: Fraction = 1e-3
    """Where the cosine ends, as a fraction of its peak."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of forward and backward; the 16-bit ones need a GPU."""
    seed: NonNegativeInt | None = None
    """Of the stages alone: order, draw, shuffled deal, dropout. Empty: that of the recipe."""
    draw: PositiveInt | None = None
    """Train in the stages on this many of the training samples, drawn by the seed. Empty: all."""
    group_by_length: bool = False
    """Batches of samples of like length: less padding, an order that is less random."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    metric: Literal["rouge_l", "loss", "kl_to_teacher"] = "rouge_l"
    """What `best` means on the validation samples: the answers' ROUGE-L (the paper), or what is cheaper: the stage's
    loss, or KL(teacher || student) at temperature 1."""
    save_every: Annotated[str, BeforeValidator(_as_interval)] = "10min"
    """A kill costs no more than this: checkpoints every so many optimizer steps (500) or so long (90s, 10min, 2h), and
    at every epoch's end."""
    eval_every: Annotated[PositiveInt | Literal["epoch"], BeforeValidator(_steps_or_epoch)] = "epoch"
    """Measure the validation samples at every epoch's end, or every so many optimizer steps and at a stage's end; there
    are the weights that `best` is chosen from."""
    log_every: PositiveInt | None = None
    """Optimizer steps between two lines of the log. Empty: 1 below 5,000 samples, else 10."""
    dataloader_workers: NonNegativeInt = 0
    """Processes that load batches beside the training. 0: the training process itself."""
    report_to: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Where transformers also reports what is logged, such as tensorboard or wandb; the run's log is kept anyway."""
    extra: dict[str, Any] = {}  # noqa: RUF012
    """Further fields of transformers' TrainingArguments, checked by name, such as `{adam_epsilon: 1.0e-6,
    neftune_noise_alpha: 5}`. What the recipe sets elsewhere is refused here."""

    @field_validator("warmup_steps")
    @classmethod
    def _whole_or_a_fraction(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"must be a number of steps, or a fraction of a stage's steps below 1, got {value:g}")
        return value
