"""pocl: a small language model learns from a large one, by a curriculum and with exact fused losses.

``import pocl`` costs nothing: every name is loaded when it is first used. The losses and the curriculum need torch
alone; what trains, scores and evaluates loads transformers and datasets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from pocl.curriculum import Curriculum, Stage
    from pocl.loss import DistillationLoss
    from pocl.teacher import HiddenStateCache, OnlineTeacher, TopKCache
    from pocl.trainer import POCLConfig, POCLTrainer
    from pocl_kernels import (
        DIVERGENCES,
        JSD,
        TVD,
        Alpha,
        AlphaBeta,
        CrossEntropyOutput,
        Divergence,
        DivergenceOutput,
        ForwardKL,
        Head,
        Jeffreys,
        MixedKL,
        ReverseKL,
        SkewForwardKL,
        SkewReverseKL,
        SparseTeacher,
        fused_divergence,
        fused_linear_cross_entropy,
        fused_linear_divergence,
    )

# Public name -> module that defines it, imported at first use; what is not named here comes from pocl_kernels.
_LAZY = {
    "Curriculum": "pocl.curriculum",
    "DistillationLoss": "pocl.loss",
    "HiddenStateCache": "pocl.teacher",
    "OnlineTeacher": "pocl.teacher",
    "POCLConfig": "pocl.trainer",
    "POCLTrainer": "pocl.trainer",
    "Stage": "pocl.curriculum",
    "TopKCache": "pocl.teacher",
}

__all__ = [
    "DIVERGENCES",
    "JSD",
    "TVD",
    "Alpha",
    "AlphaBeta",
    "CrossEntropyOutput",
    "Curriculum",
    "DistillationLoss",
    "Divergence",
    "DivergenceOutput",
    "ForwardKL",
    "Head",
    "HiddenStateCache",
    "Jeffreys",
    "MixedKL",
    "OnlineTeacher",
    "POCLConfig",
    "POCLTrainer",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SparseTeacher",
    "Stage",
    "TopKCache",
    "fused_divergence",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("pocl")
    if name not in __all__:
        raise AttributeError(f"module 'pocl' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_LAZY.get(name, "pocl_kernels")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
