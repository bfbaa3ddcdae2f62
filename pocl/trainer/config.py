"""`TrainingArguments` with the paper's optimizer settings, and what distillation adds."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from pocl.devices import accelerator
from pocl.interval import Interval
from pocl.launcher import check_launcher_precision

LOWER_IS_BETTER = ("loss", "divergence", "cross_entropy", "student_entropy", "teacher_entropy", "kl_to_teacher")


@dataclass
class POCLConfig(TrainingArguments):
    """Settings of `POCLTrainer`: those of `transformers.TrainingArguments`, with other defaults, and a few of its own.

    Defaults that differ are the paper's (learning rate 1e-4 falling to 1e-7 on a cosine, weight decay 0.01, clipping at
    1.0) or follow from the trainer: epochs belong to the curriculum, no reporter is chosen unasked, and a machine
    without an accelerator trains on the CPU.

    Raises:
        ValueError: `num_train_epochs` or `max_steps` is set: a `Stage` holds them; or an option contradicts that every
            sample of a stage is trained on once an epoch.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of stages that name none."})
    weight_decay: float = field(default=1e-2, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Schedule within a stage."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"min_lr": 1e-7}, metadata={"help": "Arguments of the schedule."}
    )
    num_train_epochs: float = field(default=0.0, metadata={"help": "Must stay 0: epochs belong to the curriculum."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A non-finite loss stops the run here."})
    save_every: str | int | None = field(
        default=None,
        metadata={"help": "Also save a checkpoint every so many optimizer steps (500) or so long (90s, 10min, 2h)."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept in a stage; None keeps all."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "Reporters, as in transformers."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns are chosen by the collator."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "The loss reaches every trained parameter, so none is searched for."}
    )
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Put the rows of a batch behind one another in place of padding them. None does so on a CPU, and "
            "elsewhere if the student uses flash-attn, where both models are found to support it."
        },
    )
    scale_by_temperature: bool = field(
        default=True,
        metadata={"help": "Multiply the divergence by the squared temperature, so gradients keep their size."},
    )

    on_policy: float = field(
        default=0.0, metadata={"help": "Share of batches whose responses are sampled from the student (GKD)."}
    )
    on_policy_max_new_tokens: int = field(default=128, metadata={"help": "Longest sampled response, in tokens."})
    on_policy_temperature: float = field(default=1.0, metadata={"help": "Temperature that responses are sampled at."})
    on_policy_replay: int = field(
        default=0, metadata={"help": "Sampled rows each process keeps for use again within a stage; 0 keeps none."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy must be a share of batches in [0, 1], got {self.on_policy}")
        if not self.on_policy_temperature > 0 or self.on_policy_max_new_tokens < 1 or self.on_policy_replay < 0:
            raise ValueError(
                "on_policy_temperature must be > 0, on_policy_max_new_tokens >= 1 and on_policy_replay >= 0, got "
                f"{self.on_policy_temperature}, {self.on_policy_max_new_tokens} and {self.on_policy_replay}"
            )
        if self.num_train_epochs or self.max_steps > 0:
            raise ValueError(
                "num_train_epochs and max_steps belong to the curriculum here, which trains every stage for its own "
                "number: leave them out and set epochs or max_steps in Curriculum.baby_step(...) or in each Stage "
                f"(got num_train_epochs={self.num_train_epochs:g}, max_steps={self.max_steps})"
            )
        if self.save_every is not None:
            try:
                Interval.parse(self.save_every)
            except ValueError as error:
                raise ValueError(f"save_every {error}") from None
        check_launcher_precision("bf16" if self.bf16 else "fp16" if self.fp16 else "no")
        check_reporters(self.report_to)
        if self.fp16 and accelerator() is None:
            raise ValueError("fp16=True needs a GPU, and there is none here; set bf16=True, or train in float32")
        if self.dataloader_drop_last:
            raise ValueError("dataloader_drop_last must be False: an epoch trains on every sample of its stage once")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor must be 0: soft labels come from the teacher")
        # transformers takes every metric that does not end in "loss" for one to be raised
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if metric in LOWER_IS_BETTER and vars(self).get("greater_is_better") is None:
            self.greater_is_better = False
        if accelerator() is None:
            self.use_cpu = True
        super().__post_init__()
        if self.device.type == "cpu":  # transformers before 5.17 resumes on "cpu:0", which torch does not know
            self.__dict__["_setup_devices"] = torch.device("cpu")


def check_reporters(names: str | Sequence[str] | None) -> None:
    """Refuses reporters that transformers does not know, or whose package is not installed.

    Raises:
        ValueError: names the reporter, those that are known, or what to install.
    """
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    installed = integration_utils.get_available_reporting_integrations()
    for name in [names] if isinstance(names, str) else names or ():
        if name in ("none", "all") or name in installed:
            continue
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; known are none, all, {', '.join(sorted(known))}"
            raise ValueError(f"report_to: there is no reporter {name!r}{hint}")
        try:
            known[name]()  # some are there without being listed
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"report_to: {name} needs a package that is not installed: pip install {name.replace('_', '-')}, or "
                "leave it out (the run's log is kept anyway)"
            ) from error
