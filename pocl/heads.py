"""From a Hugging Face causal language model to the two things a fused loss needs: hidden states and a `Head`.

    logits = head(hidden_states(model, ids))        # exactly the model's own logits

The functions here ask the model's view (`pocl.models`), which is made once. A loss that takes hidden states must forget
nothing that lies between the backbone and the logits, so `verify_head` compares both paths on a few tokens.

Shapes: B sequences, L positions, H hidden size, V vocabulary, N valid (response) tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pocl.models import (
    backbone_of,
    check_vocabularies,
    head_of,
    project,
    separates_packed_rows,
    unwrapped,
    verify_head,
    view_of,
)

__all__ = [
    "IGNORE_INDEX",
    "MODEL_INPUTS",
    "at_positions",
    "backbone_of",
    "check_vocabularies",
    "head_of",
    "hidden_states",
    "label_positions",
    "project",
    "separates_packed_rows",
    "shifted_labels",
    "unwrapped",
    "verify_head",
]

IGNORE_INDEX = -100

# The entries of a batch that a backbone takes.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,  # [B, L] int64
    attention_mask: Tensor | None = None,  # [B, L]
    position_ids: Tensor | None = None,  # [B, L]
    **kwargs: Any,
) -> Tensor:  # [B, L, H]
    """The hidden states that enter the output embedding, in the model's dtype; the head is not run.

    Further keyword arguments go to the model. Inside DDP or FSDP call this from within the wrapper's forward.
    """
    return view_of(model).hidden_states(input_ids, attention_mask, position_ids=position_ids, **kwargs)


def shifted_labels(labels: Tensor) -> Tensor:
    """Labels aligned with the logits: position i of the result is `labels[i + 1]`, the last one is ignored.

    Args:
        labels: [..., L] int64 in the Hugging Face convention (`labels[i]` is `input_ids[i]` or -100).
    """
    aligned = torch.full_like(labels, IGNORE_INDEX)
    aligned[..., :-1] = labels[..., 1:]
    return aligned


def label_positions(batch: Mapping[str, Tensor]) -> Tensor:  # [N] int64
    """Places, in the flattened batch, of the positions that predict a label: row-major, on the device of the labels.

    A loader may have found them before (`label_positions`): finding them on a GPU makes the host wait for it.
    """
    known = batch.get("label_positions")
    if known is not None:
        return known.to(batch["labels"].device)
    return (shifted_labels(batch["labels"]).flatten() != IGNORE_INDEX).nonzero().flatten()


def at_positions(states: Tensor, positions: Tensor) -> Tensor:
    """Rows [N, H] of hidden states [B, L, H] at flattened positions [N]."""
    return states.flatten(0, 1).index_select(0, positions)
