"""The protocol of a teacher, and the teacher that runs its model for every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pocl import heads
from pocl_kernels import Head, SparseTeacher


@runtime_checkable
class Teacher(Protocol):
    """What a trainer needs of a teacher.

    Attributes:
        head: the teacher's projection to the vocabulary.
    """

    head: Head

    def hidden_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [N, H_t] of the N positions that predict a label, in row-major order, without gradients.

        Args:
            batch: `input_ids`, `attention_mask` (optional where nothing is padded), `labels` [B, L] in the Hugging Face
                convention, `sample_id` [B], and `position_ids` where rows are packed.
        """
        ...


@runtime_checkable
class LikelyTokens(Protocol):
    """What a trainer needs of a teacher that is known by its likeliest tokens, and has no head.

    Attributes:
        vocabulary: number of the teacher's logits.
    """

    vocabulary: int

    def sparse(self, batch: Mapping[str, Tensor]) -> SparseTeacher:
        """The likeliest tokens of the N positions that predict a label, [N, K], in row-major order.

        Args:
            batch: as for `Teacher.hidden_states`.
        """
        ...


def signal_of(
    teacher: Teacher | LikelyTokens, batch: Mapping[str, Tensor]
) -> tuple[Tensor | SparseTeacher, Head | None]:
    """What `fused_linear_divergence` takes of a teacher at the label positions: states and head, or likely tokens."""
    if isinstance(teacher, LikelyTokens):
        return teacher.sparse(batch), None
    return teacher.hidden_states(batch), teacher.head


def vocabulary_of(teacher: Teacher | LikelyTokens) -> int:
    """Number of the teacher's logits."""
    return teacher.vocabulary if isinstance(teacher, LikelyTokens) else teacher.head.vocab_size


class OnlineTeacher:
    """Runs the teacher's backbone on every batch, in evaluation mode and without gradients.

    Args:
        model: a Hugging Face causal language model, already on its device and in its dtype. It is frozen.

    Raises:
        ValueError: the model's logits are not its head applied to its last hidden states (see `heads.verify_head`).
    """

    def __init__(self, model: nn.Module) -> None:
        heads.verify_head(model)
        self.model: Any = model.eval().requires_grad_(False)
        self.head = heads.head_of(model)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def to(self, device: torch.device | str) -> OnlineTeacher:
        """Move the model, in place; one that is there already, or spread over devices, is left alone."""
        if self.device.type != torch.device(device).type:
            self.model.to(device)
            self.head = heads.head_of(self.model)
        return self

    @torch.no_grad()
    def hidden_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """See `Teacher.hidden_states`; the result lies where the batch lies."""
        source = batch["input_ids"].device
        inputs = {name: batch[name].to(self.device) for name in heads.MODEL_INPUTS if batch.get(name) is not None}
        hidden = heads.hidden_states(self.model, **inputs)
        return heads.at_positions(hidden, heads.label_positions(batch).to(self.device)).to(source)
