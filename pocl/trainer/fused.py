"""The loss inside the student's forward, so that the hooks of DDP, FSDP, DeepSpeed and PEFT fire as for any forward."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pocl import heads
from pocl.models import view_of
from pocl_kernels import Divergence, Head, SparseTeacher, fused_linear_cross_entropy, fused_linear_divergence


@dataclass(frozen=True, eq=False)
class DistillationLossCall:
    """What the forward of the student needs to end in a loss.

    Attributes:
        labels: [B, L] in the Hugging Face convention.
        positions: [N] places of the positions that predict a label, in the flattened batch.
        teacher: hidden states [N, H_t] of the N positions that predict a label, or the likely tokens there; None trains
            on the labels alone.
        teacher_head: the teacher's projection; None without hidden states.
        divergence, temperature, scale_by_temperature, kd_ratio: of the stage.
        normalizer: number of label tokens that the sum is divided by.
    """

    labels: Tensor
    positions: Tensor
    teacher: Tensor | SparseTeacher | None
    teacher_head: Head | None
    divergence: Divergence
    temperature: float
    scale_by_temperature: bool
    kd_ratio: float
    normalizer: Tensor

    def __call__(self, hidden: Tensor, head: Head, router_loss: Tensor | None = None) -> dict[str, Tensor]:
        """Loss and figures of hidden states [B, L, H]; all divided by the normaliser, all but `loss` detached.

        Args:
            hidden, head: the student's.
            router_loss: what its experts add to the loss of a batch. This part takes part with its share of the label
                tokens, so that the parts of a batch, over accumulation and processes, add their mean.
        """
        figures = self._distillation(hidden, head)
        if router_loss is not None:
            share = router_loss * len(self.positions) / self.normalizer.to(router_loss.device)
            figures["loss"] = figures["loss"] + share.squeeze()
            figures["router_loss"] = share.detach().squeeze()
        return figures

    def _distillation(self, hidden: Tensor, head: Head) -> dict[str, Tensor]:
        hidden = heads.at_positions(hidden, self.positions)
        labels = heads.shifted_labels(self.labels).flatten().index_select(0, self.positions)
        if self.teacher is None:
            found = fused_linear_cross_entropy(
                hidden, head, labels, reduction="mean", normalizer=self.normalizer, parts=True
            )
            return {"loss": found.loss, "cross_entropy": found.cross_entropy, "mean_token_accuracy": found.accuracy}
        given = len(self.teacher.token_ids if isinstance(self.teacher, SparseTeacher) else self.teacher)
        if len(hidden) != given:
            raise ValueError(
                f"teacher: it spoke of {given} positions of a batch with {len(hidden)} label tokens; a cache must be "
                "built from the tokenised samples that are trained on"
            )
        output = fused_linear_divergence(
            hidden,
            head,
            self.teacher,
            self.teacher_head,
            divergence=self.divergence,
            temperature=self.temperature,
            scale_by_temperature=self.scale_by_temperature,
            labels=labels,
            ce_weight=1.0 - self.kd_ratio,
            normalizer=self.normalizer,
        )
        assert output.cross_entropy is not None
        assert output.accuracy is not None
        return {
            "loss": output.loss,
            "divergence": output.divergence,
            "cross_entropy": output.cross_entropy,
            "student_entropy": output.student_entropy,
            "teacher_entropy": output.teacher_entropy,
            "mean_token_accuracy": output.accuracy,
        }


def install_fused_forward(model: nn.Module) -> None:
    """Give the model's forward a keyword `distillation`: with it a dict of losses comes back, else all is as before.

    The model inside PEFT's wrapper is changed, so adapters act as always. Installing again does nothing.
    """
    inner: Any = heads.unwrapped(model)
    if hasattr(inner, "_forward_without_distillation"):
        return
    inner._forward_without_distillation = inner.forward

    def forward(self: Any, *args: Any, distillation: DistillationLossCall | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            return self._forward_without_distillation(*args, **kwargs)
        inputs = {name: kwargs[name] for name in heads.MODEL_INPUTS if kwargs.get(name) is not None}
        view = view_of(self)
        if self.training and (coefficient := view.router_coefficient):
            hidden, router_loss = view.states_and_router_loss(**inputs)
            return distillation(hidden, view.head(), coefficient * router_loss)
        return distillation(view.hidden_states(**inputs), view.head())

    forward.__signature__ = inspect.signature(type(inner).forward)  # type: ignore[attr-defined]  # generate() reads it
    inner.forward = types.MethodType(forward, inner)


def remove_fused_forward(model: nn.Module) -> None:
    """Undo `install_fused_forward`."""
    inner: Any = heads.unwrapped(model)
    if "_forward_without_distillation" in vars(inner):
        del inner.forward, inner._forward_without_distillation
