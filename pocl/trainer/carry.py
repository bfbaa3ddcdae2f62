"""Optimizer states and learning rates that go on from one stage to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR


def carry_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Path, learning_rate: float, device: Any) -> None:
    """Load the state that an optimizer had in a checkpoint, and start at a learning rate of its own."""
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = learning_rate


def shifted(scheduler: Any, steps: int) -> LambdaLR:
    """The same schedule, beginning `steps` later."""
    lambdas: Any = [lambda step, f=f: f(step + steps) for f in scheduler.lr_lambdas]
    return LambdaLR(scheduler.optimizer, lambdas)
