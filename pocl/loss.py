"""The distillation loss as a module: for a training loop of one's own."""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_kernels import Divergence, DivergenceOutput, Head, SparseTeacher, fused_linear_divergence
from pocl_kernels.divergences import get_divergence


class DistillationLoss(torch.nn.Module):
    """``(1 - ce_weight) T^2 D(teacher, student) + ce_weight CE(labels)``, fused: no logits of either model exist.

    ``temperature``, ``ce_weight`` and ``divergence`` may be changed between calls, so that a schedule is a plain
    assignment; see :func:`pocl.fused_linear_divergence` for what they mean. The module has no parameters and no state.

    Example::

        loss_fn = DistillationLoss("skew_rkl", temperature=2.0)
        hidden = student.model(input_ids).last_hidden_state              # [B, L, H_s]
        with torch.no_grad():
            teacher_hidden = teacher.model(input_ids).last_hidden_state  # [B, L, H_t]
        out = loss_fn(hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, labels=aligned_labels)
        out.loss.backward()

    Labels are aligned: position i predicts ``labels[i]``; ``pocl.heads.shifted_labels`` makes them from Hugging Face's.
    """

    def __init__(
        self,
        divergence: str | Divergence = "fkl",
        *,
        temperature: float = 1.0,
        scale_by_temperature: bool = True,
        ce_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        memory: str = "auto",
        workspace_mb: float | None = None,
    ) -> None:
        super().__init__()
        self.divergence = get_divergence(divergence)
        self.temperature = temperature
        self.scale_by_temperature = scale_by_temperature
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.memory = memory
        self.workspace_mb = workspace_mb

    def forward(
        self,
        student_hidden: Tensor,
        student_head: Head | Tensor,
        teacher_hidden: Tensor | SparseTeacher,
        teacher_head: Head | Tensor | None = None,
        *,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> DivergenceOutput:
        """``[..., H_s]``, head, ``[..., H_t]``, head -> losses in nats per valid token. A :class:`pocl.SparseTeacher`
        stands in place of the last two.
        """
        return fused_linear_divergence(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            divergence=self.divergence,
            temperature=self.temperature,
            scale_by_temperature=self.scale_by_temperature,
            labels=labels,
            ignore_index=self.ignore_index,
            ce_weight=self.ce_weight,
            token_weight=token_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            memory=self.memory,
            workspace_mb=self.workspace_mb,
        )

    def extra_repr(self) -> str:
        return f"{self.divergence}, temperature={self.temperature:g}, ce_weight={self.ce_weight:g}"
