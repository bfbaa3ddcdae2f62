"""The curriculum for TRL's `SFTTrainer`, `GKDTrainer` and `DistillationTrainer`, and for any `transformers.Trainer`.

A curriculum is an order of the data and a temperature that changes with the step. Both fit a trainer from outside: the
data set is laid out stage after stage, to be read once from front to back, and a callback sets the temperature.

    dataset = in_stages(dataset, subsets, curriculum, batch_size=64)
    args = GKDConfig(..., num_train_epochs=1, train_sampling_strategy="sequential")   # batches of 64 over all processes
    trainer = GKDTrainer(..., args=args, train_dataset=dataset)
    trainer.add_callback(CurriculumCallback(trainer, curriculum, subsets, batch_size=64))
    trainer.train()

Optimizer and learning rate run through; for the paper's fresh start in every stage use `pocl.POCLTrainer`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pocl.curriculum import Curriculum


def staged_order(subsets: Sequence[int], curriculum: Curriculum, batch_size: int, seed: int = 0) -> list[int]:
    """Row numbers of a whole run: every epoch of every stage a new permutation, filled up to whole batches.

    The rows that fill up an epoch are its own first ones, so that no batch lies in two stages.

    Args:
        subsets: the subset of every row, 0 the easiest.
        curriculum: its rules on best checkpoints, optimizers and convergence cannot be kept from outside, and are not.
        batch_size: samples of one optimizer step, over processes and accumulation.
        seed: together with stage and epoch it gives the permutation.
    """
    order: list[int] = []
    for stage, rows in zip(curriculum.stages, curriculum.rows(subsets), strict=True):
        wanted = stage.steps(len(rows), batch_size) * batch_size
        epoch = 0
        while wanted > 0:
            permuted = list(rows)
            random.Random(f"{seed} {stage.index} {epoch}").shuffle(permuted)
            whole = -(-len(rows) // batch_size) * batch_size
            permuted = (permuted * -(-whole // len(rows)))[: min(whole, wanted)]
            order += permuted
            wanted -= len(permuted)
            epoch += 1
    return order


def in_stages(dataset: Any, subsets: Sequence[int], curriculum: Curriculum, batch_size: int, seed: int = 0) -> Any:
    """The data set laid out stage after stage: train on it for one epoch, without shuffling.

    Args:
        dataset: a `datasets.Dataset`, in whatever format the trainer takes; rows are referred to, not copied.
        subsets, curriculum, batch_size, seed: as for `staged_order`.

    Raises:
        ValueError: a stage is left without rows, or `subsets` has another length than the data set.
    """
    if len(subsets) != len(dataset):
        raise ValueError(f"subsets must name the subset of each of the {len(dataset)} rows, got {len(subsets)} numbers")
    return dataset.select(staged_order(subsets, curriculum, batch_size, seed))


class CurriculumCallback(TrainerCallback):
    """Sets `trainer.temperature` at every step to that of the stage, where the trainer has one.

    `DistillationTrainer` reads it at every loss. The loss of TRL's `GKDTrainer` has no temperature, `SFTTrainer` has no
    teacher: they take the order alone. `stage` tells the stage of the step.

    Args:
        trainer: the trainer it is added to.
        curriculum, subsets, batch_size: as for `in_stages`.

    Raises:
        ValueError: (when training begins) the trainer would shuffle, or not take the curriculum's number of steps.
    """

    def __init__(self, trainer: Any, curriculum: Curriculum, subsets: Sequence[int], batch_size: int) -> None:
        self.trainer, self.curriculum = trainer, curriculum
        self.stage_steps = curriculum.stage_steps(subsets, batch_size)
        self.stage = curriculum.stages[0]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        shuffles = getattr(self.trainer, "shuffle_dataset", args.train_sampling_strategy != "sequential")
        if shuffles:
            raise ValueError(
                "the trainer shuffles the stages away; set train_sampling_strategy='sequential' (DistillationTrainer: "
                "shuffle_dataset=False)"
            )
        if state.max_steps != sum(self.stage_steps):
            raise ValueError(
                f"the trainer plans {state.max_steps} steps and the curriculum {sum(self.stage_steps)}; train for one "
                "epoch on in_stages(...), with a batch_size over processes and accumulation that is the trainer's"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stage = self.curriculum.stage_at(state.global_step, self.stage_steps)
        if hasattr(self.trainer, "temperature"):
            self.trainer.temperature = self.stage.temperature
