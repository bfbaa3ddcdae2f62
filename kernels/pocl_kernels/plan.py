"""What one fused call asks of a backend: run-time numbers and choices, no tensors."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from pocl_kernels.divergences import Divergence

STATE_ROWS = 6


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a backend needs besides the tensors; see :func:`pocl_kernels.fused_linear_divergence` for the
    meaning.
    """

    divergence: Divergence
    temperature: float
    divergence_factor: float  # (1 - ce_weight) * T^2, or without the T^2
    ce_weight: float
    ignore_index: int
    student_scale: float
    student_softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    workspace_mb: float
    process_group: str = ""  # name of the group whose processes share the vocabulary; empty: the heads are whole
    memory: str = "fast"  # or "low"
    products: torch.dtype | None = None  # 16-bit dtype for the factors of all matrix products; None: that of the inputs

    @property
    def slope_coefficient(self) -> float:
        """Factor of ``slope - q c`` in the gradient with respect to the student's transformed logits."""
        return self.divergence_factor / self.temperature


class Gradients(NamedTuple):
    """Which gradients a call wants."""

    hidden: bool
    weight: bool
    bias: bool


class Rows(NamedTuple):
    """A backend's answer: per-row results ``[N]`` (0 for ignored rows) and the gradients of ``sum row_scale * loss``.

    Gradients have the compute dtype (float32, or float64 for float64 inputs), not the dtype of the inputs: the caller
    multiplies by the upstream gradient before rounding. None where they were not wanted. ``state``, ``[STATE_ROWS,
    N]``, is what a backend wants back when gradients of the same rows are asked for later; None: it keeps nothing.
    """

    divergence: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    state: Tensor | None = None


def counting_rows(labels: Tensor | None, ignore_index: int, row_scale: Tensor) -> Tensor:
    """Indices of the rows that are neither ignored nor without weight; waits for the device."""
    counts = row_scale != 0
    return torch.nonzero(counts if labels is None else counts & (labels != ignore_index)).squeeze(-1)
