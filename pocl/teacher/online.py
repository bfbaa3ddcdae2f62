"""The protocol of a teacher, and the teacher that runs its model for every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pocl import heads
from pocl_kernels import Head


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
