"""What one fused call asks of a backend: tensors, run-time numbers and choices; and what a backend answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocl_kernels.divergences import Divergence

STATE_ROWS = 7
SPARSE_STATES = 11  # of a sparse teacher, beside one a token that it names


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a backend needs besides the tensors; see :func:`pocl_kernels.fused_linear_divergence` for the
    meaning.
    """

    divergence: Divergence | None  # None: the cross-entropy alone
    temperature: Any  # a number, or float64 [N] of one a token; so are the next and the divergence's parameters
    divergence_factor: Any  # (1 - ce_weight) * T^2, or without the T^2
    ce_weight: float
    ignore_index: int
    student_scale: float
    student_softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    workspace_mb: float
    process_group: str = ""  # name of the group whose processes share the vocabulary; empty: the heads are whole
    memory: str = "fast"  # or "low"
    later: bool = False  # the weight's gradient may be a function of the upstream gradient
    inplace: bool = False  # the gradient of logits at hand may be written over them
    label_smoothing: float = 0.0  # of the cross-entropy alone; so is the next
    z_loss: float = 0.0
    products: torch.dtype | None = None  # 16-bit dtype for the factors of all matrix products; None: that of the inputs
    tail: str = ""  # of a sparse teacher; empty: there is none
    vocab_size: int = 0  # of a sparse teacher, who has no head to tell; 0: every row of the student's is a token

    @property
    def slope_coefficient(self) -> Any:
        """Factor of ``slope - q c`` in the gradient with respect to the student's transformed logits."""
        return self.divergence_factor / self.temperature

    @property
    def by_token(self) -> bool:
        """Whether temperature and parameters are one a token."""
        return isinstance(self.temperature, Tensor)

    def at(self, rows: Any, dtype: torch.dtype | None = None) -> Plan:
        """The plan of some of the rows: an index, a slice, or ``(slice(None), None)`` for columns; in ``dtype``."""
        if not self.by_token or self.divergence is None:
            return self

        def pick(x: Tensor) -> Tensor:
            return x[rows] if dtype is None else x[rows].to(dtype)

        parameters = [pick(x) for x in self.divergence.parameters()]
        return dataclasses.replace(
            self,
            divergence=self.divergence.from_parameters(parameters),
            temperature=pick(self.temperature),
            divergence_factor=pick(self.divergence_factor),
        )


class Gradients(NamedTuple):
    """Which gradients a call wants."""

    hidden: bool
    weight: bool
    bias: bool


class Inputs(NamedTuple):
    """The tensors that a call reads. A cross-entropy has labels and no teacher; a sparse teacher has the last two.
    Without weights the hidden states are logits: ``[..., V_s]`` and ``[..., V_t]`` of any strides but the last.
    """

    student_hidden: Tensor  # [N, H_s]
    student_weight: Tensor | None  # [V_s, H_s]
    student_bias: Tensor | None  # [V_s]
    teacher_hidden: Tensor | None  # [N, H_t]
    teacher_weight: Tensor | None  # [V_t, H_t]
    teacher_bias: Tensor | None  # [V_t]
    labels: Tensor | None  # [N]
    row_scale: Tensor  # [N]
    state: Tensor | None = None  # of a call without gradients on the same tensors, under memory="low"
    token_ids: Tensor | None = None  # [N, K]
    log_probs: Tensor | None = None  # [N, K]

    @property
    def vocab_size(self) -> int:
        """Of both models: rows of a head beyond it are padding."""
        if self.student_weight is None:
            assert self.teacher_hidden is not None
            return min(self.student_hidden.shape[-1], self.teacher_hidden.shape[-1])
        V = self.student_weight.shape[0]
        return V if self.teacher_weight is None else min(V, self.teacher_weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation: float32, or float64 if any hidden states have it."""
        return compute_dtype(self.student_hidden, self.teacher_hidden)


# Rows of :attr:`Rows.results`.
DIVERGENCE, CROSS_ENTROPY, ENTROPY, TEACHER_ENTROPY, ACCURACY = range(5)
LOSS, LOG_SUM_EXP = DIVERGENCE, ENTROPY  # where there is no divergence
RESULTS = 5


class Rows(NamedTuple):
    """A backend's answer: per-row results ``[RESULTS, N]``, 0 for rows that are ignored or have no weight, and the
    gradients of ``sum row_scale * loss``.

    Gradients have the compute dtype (float32, or float64 for float64 inputs), not the dtype of the inputs: the caller
    multiplies by the upstream gradient before rounding. None where they were not wanted. Under ``Plan.later`` that of
    the weight may be a function of the upstream gradient, for the gradient in the weight's dtype. ``state``,
    ``[STATE_ROWS, N]``, is what a backend wants back when gradients of the same rows are asked for later; None: it
    keeps nothing.
    """

    results: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | Callable[[Tensor | None], Tensor] | None
    grad_bias: Tensor | None
    state: Tensor | None = None


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 if any of the tensors has it."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def counting_rows(labels: Tensor | None, ignore_index: int, row_scale: Tensor) -> Tensor:
    """Indices of the rows that are neither ignored nor without weight; waits for the device."""
    # By the labels too: on the way back the weights are times an upstream gradient, which may be NaN.
    counts = row_scale if labels is None else (labels != ignore_index).logical_and_(row_scale)
    return torch.nonzero(counts).squeeze(-1)
