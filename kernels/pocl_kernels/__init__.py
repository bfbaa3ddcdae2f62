"""Fused distillation losses for large vocabularies: exact divergences between two language models without their
logits.
"""

from pocl_kernels.api import fused_linear_divergence
from pocl_kernels.cross_entropy import fused_linear_cross_entropy
from pocl_kernels.divergences import (
    DIVERGENCES,
    JSD,
    TVD,
    Alpha,
    AlphaBeta,
    Divergence,
    ForwardKL,
    Jeffreys,
    MixedKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
)
from pocl_kernels.head import Head
from pocl_kernels.logits import fused_divergence
from pocl_kernels.output import CrossEntropyOutput, DivergenceOutput
from pocl_kernels.sparse import SparseTeacher

__all__ = [
    "DIVERGENCES",
    "JSD",
    "TVD",
    "Alpha",
    "AlphaBeta",
    "CrossEntropyOutput",
    "Divergence",
    "DivergenceOutput",
    "ForwardKL",
    "Head",
    "Jeffreys",
    "MixedKL",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SparseTeacher",
    "fused_divergence",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
]
