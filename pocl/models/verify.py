"""Trials of a model on a few tokens: whether it is what the loss, packing and generation take it for.

All run without gradients and in evaluation mode, before anything is trained or stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocl.models.adapters import check_adapters, check_head_dropout
from pocl.models.head import head_of, project
from pocl.models.hidden import check_is_decoder, output_embedding_of
from pocl.models.view import LanguageModel, view_of
from pocl.models.wrappers import in_evaluation_mode

_TOLERANCE = 1e-3


def tolerance_of(dtype: torch.dtype, least: float = _TOLERANCE) -> float:
    """How far two ways of the same arithmetic may lie apart, relative to the largest value, in this number format.

    Another order of sums moves a value in its last place, in every layer anew. In bfloat16 the 30 layers of
    SmolLM2-135M added up to 1.3 units (0.010), where a wrong mask moved 0.25 and a wrong position 0.17: 6 units it is.
    """
    return max(least, 6 * torch.finfo(dtype).eps)


def is_out_of_order(error: RuntimeError) -> bool:
    """Whether a trial failed for the device's sake, which says nothing about the model and must not be swallowed."""
    of_device = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
    words = str(error).lower()
    return isinstance(error, of_device) or any(
        word in words for word in ("cuda", "hip error", "out of memory", "cublas")
    )


def verify_head(model: nn.Module, tolerance: float = _TOLERANCE, length: int = 8, *, trained: bool = False) -> None:
    """Compare `head_of` and `hidden_states` with the model's own logits on a few tokens, without gradients.

    Args:
        tolerance: largest allowed difference relative to the largest logit; more in 16-bit formats.
        length: number of tokens tried.
        trained: whether the model is to be trained: an adapter on its head must then have no dropout.

    Raises:
        ValueError: an encoder-decoder, a prompt-tuned model, a model without a head or one whose logits are not its
            head applied to its hidden states, or one that reads the tokens it is to predict.
    """
    view = view_of(model)
    check_is_decoder(view.model)
    check_adapters(model)
    embedding = output_embedding_of(view.model)
    if trained:
        check_head_dropout(embedding)
    input_ids = _some_tokens(view, length)
    mask = torch.ones_like(input_ids)
    with in_evaluation_mode(view.model), torch.no_grad():
        own = type(view.model).forward(view.model, input_ids=input_ids, attention_mask=mask).logits
        hidden = view.hidden_states(input_ids, mask)
        if hidden.shape[:-1] != input_ids.shape:
            raise ValueError(
                f"model: the output embedding of {view.name} gets hidden states of shape {tuple(hidden.shape)} for one "
                f"row of {length} tokens; only models that predict one token at a position can be distilled"
            )
        ours = project(head_of(view.model), hidden)
        if trained and view.router_coefficient:
            view.states_and_router_loss(input_ids, mask)
        shorter = view.hidden_states(input_ids[:, :-2], mask[:, :-2])
    tolerance = tolerance_of(hidden.dtype, tolerance)
    error = _difference(own, ours)
    if not error <= tolerance * max(1.0, _largest(own)):
        raise ValueError(
            f"model: the logits of {view.name} are not its head applied to its last hidden states (largest difference "
            f"{error:.3g}); pocl does not know this family's logit transform. Add its config field to "
            "pocl/models/head.py"
        )
    moved = _difference(shorter, hidden[:, :-2])
    if not moved <= tolerance * _largest(hidden):
        raise ValueError(
            f"model: {view.name} sees the tokens that it is to predict: its hidden states change with what comes later."
            " Load it as a decoder (is_decoder=True in its config; XLM: causal=True), or choose a causal language model"
        )


def separates_packed_rows(model: nn.Module, tolerance: float = _TOLERANCE) -> bool:
    """Whether two rows behind one another, with positions that start anew, have the hidden states they have alone.

    Raises:
        RuntimeError: the device failed, or its memory is full.
    """
    view = view_of(model)
    rows = [_some_tokens(view, length, start) for start, length in ((0, 5), (2, 4))]
    positions = torch.cat([torch.arange(row.shape[1], device=view.device) for row in rows]).unsqueeze(0)
    try:
        with in_evaluation_mode(view.model), torch.no_grad():
            alone = torch.cat([view.hidden_states(row) for row in rows], 1).float()
            packed = view.hidden_states(torch.cat(rows, 1), position_ids=positions)
    except (TypeError, ValueError):  # a backbone without positions, or one that wants a mask
        return False
    except RuntimeError as error:
        if is_out_of_order(error):
            raise
        return False
    return _difference(alone, packed) <= tolerance_of(packed.dtype, tolerance) * _largest(alone)


def _some_tokens(view: LanguageModel, length: int, start: int = 0) -> Tensor:  # [1, length]
    ids = torch.arange(start, start + length, device=view.device) + 1
    return ids.remainder(view.vocabulary).unsqueeze(0)


def _largest(x: Tensor) -> float:
    """Of the finite entries: whoever uses a model that gives others says for which sample."""
    return x.float().abs().nan_to_num(0.0, 0.0, 0.0).max().item()


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest one; infinite where the shapes differ, or one is finite and the other not."""
    if a.shape != b.shape or bool((a.isfinite() != b.isfinite()).any()):
        return float("inf")
    return _largest(a.float() - b.float())
