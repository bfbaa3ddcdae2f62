"""Checkpoints between the epochs: every so many optimizer steps or minutes, so that a kill costs no more than that."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pocl.interval import Interval


class SaveEvery(TrainerCallback):
    """Asks for a checkpoint at an interval, on top of those that `save_strategy` asks for.

    By time, the first process looks at its clock and the others do as it says. They ask it at a few steps only: the
    next one is where, by the speed so far, half of the time that is left will have passed.

    Args:
        interval: between two checkpoints.
        device: where the processes exchange a number.
    """

    def __init__(self, interval: Interval, device: torch.device) -> None:
        self.interval, self.device = interval, device

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._start(state)

    def _start(self, state: TrainerState) -> None:
        self.step, self.next_look, self.time = state.global_step, state.global_step + 1, time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.interval.steps is not None:
            control.should_save |= state.global_step % self.interval.steps == 0
        elif self.interval.seconds is not None and state.global_step >= self.next_look:
            passed = self._agreed(time.perf_counter() - self.time)
            control.should_save |= passed >= self.interval.seconds
            taken = state.global_step - self.step
            ahead = int(taken * (self.interval.seconds - passed) / max(2 * passed, 1e-9))
            self.next_look = state.global_step + min(max(1, ahead), 2 * taken)

    def _agreed(self, seconds: float) -> float:
        if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
            return seconds
        number = torch.tensor([seconds], dtype=torch.float32, device=self.device)
        torch.distributed.broadcast(number, src=0)
        return float(number.item())
