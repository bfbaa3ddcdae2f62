"""Sums of what is logged, kept on the device until they are logged, and the guard against a loss that is not finite."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pocl.curriculum import Stage

ENTROPIES = ("student_entropy", "teacher_entropy")
NAMES = ("loss", "divergence", "cross_entropy", *ENTROPIES, "mean_token_accuracy", "router_loss", "num_tokens")


class Figures:
    """Sums of figures over micro-batches; one read of the device and one exchange between processes a log line.

    Args:
        accelerator: of the trainer.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: Tensor | int = 0
        self.steps = 0
        self.started = time.perf_counter()

    def add(self, outputs: Mapping[str, Tensor]) -> None:
        for name in NAMES:
            if outputs.get(name) is not None:
                value = outputs[name].detach().double()
                self.sums[name] = self.sums[name] + value if name in self.sums else value

    def count_tokens(self, batch: Mapping[str, Tensor]) -> None:
        """Count the tokens that are not padding, for the speed."""
        mask = batch.get("attention_mask")
        self.tokens = self.tokens + (batch["input_ids"].numel() if mask is None else mask.sum())

    def pause(self, seconds: float) -> None:
        """Leave time out of the speed."""
        self.started += seconds

    def totals(self) -> dict[str, float]:
        """Sums over all processes."""
        names = sorted(self.sums)
        values = torch.stack([self.sums[name] for name in names])
        return dict(zip(names, self.accelerator.reduce(values, reduction="sum").tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Figures of a mean optimizer step since the last call, and tokens per second; starts anew."""
        tokens = torch.as_tensor(self.tokens, device=self.accelerator.device).double()
        self.sums["tokens"] = tokens
        totals = self.totals()
        speed = totals.pop("tokens") / max(time.perf_counter() - self.started, 1e-9)
        totals.pop("loss", None)
        means = {name: value / max(self.steps, 1) for name, value in totals.items()}
        self.clear()
        return means | {"tokens_per_second": round(speed, 1)}


class FiniteLossGuard:
    """Stops a run whose loss is not finite, before that reaches a checkpoint.

    On a CPU every loss is looked at when it is made; elsewhere one step later, so that the device is not waited for.
    """

    def __init__(self) -> None:
        self.pending: tuple[Tensor, Any, Stage, int] | None = None

    def watch(self, loss: Tensor, inputs: Mapping[str, Any], stage: Stage, step: int) -> None:
        self.check()
        self.pending = (loss, inputs.get("sample_id"), stage, step)
        if loss.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise for the loss that was not looked at yet."""
        pending, self.pending = self.pending, None
        if pending is not None and not torch.isfinite(pending[0]):
            loss, ids, stage, step = pending
            shown = "unknown" if ids is None else ", ".join(map(str, ids.flatten().tolist()))
            raise FloatingPointError(
                f"loss is {loss.item()} in stage {stage.index} at step {step}, on the samples with sample_id {shown}. "
                "Nothing is lost: the checkpoints before it are whole. Look at these samples, lower learning_rate, or "
                "leave fp16"
            )
