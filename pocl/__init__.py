"""pocl: a small language model learns from a large one, by a curriculum and with exact fused losses.

``import pocl`` brings the losses and the curriculum and needs torch alone. What trains, scores and evaluates loads
transformers and datasets the first time it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pocl.curriculum import Curriculum, Stage
from pocl.loss import DistillationLoss
from pocl_kernels import (
    DIVERGENCES,
    JSD,
    TVD,
    Alpha,
    Divergence,
    DivergenceOutput,
    ForwardKL,
    Head,
    Jeffreys,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    fused_linear_cross_entropy,
    fused_linear_divergence,
)

if TYPE_CHECKING:
    from pocl.evaluate import evaluate
    from pocl.teacher import HiddenStateCache, OnlineTeacher
    from pocl.trainer import POCLConfig, POCLTrainer

# Public name -> module that defines it, imported at first use.
_LAZY = {
    "HiddenStateCache": "pocl.teacher",
    "OnlineTeacher": "pocl.teacher",
    "POCLConfig": "pocl.trainer",
    "POCLTrainer": "pocl.trainer",
    "evaluate": "pocl.evaluate",
}

__all__ = [
    "DIVERGENCES",
    "JSD",
    "TVD",
    "Alpha",
    "Curriculum",
    "DistillationLoss",
    "Divergence",
    "DivergenceOutput",
    "ForwardKL",
    "Head",
    "HiddenStateCache",
    "Jeffreys",
    "OnlineTeacher",
    "POCLConfig",
    "POCLTrainer",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "Stage",
    "evaluate",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pocl' has no attribute {name!r}; it offers {', '.join(__all__)}")
