"""What a fused loss returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pocl_kernels.plan import ACCURACY, CROSS_ENTROPY, DIVERGENCE, ENTROPY, TEACHER_ENTROPY


class DivergenceOutput(NamedTuple):
    """Result of :func:`pocl_kernels.fused_linear_divergence`; all but ``loss`` are detached. A named tuple.

    Under ``reduction="mean"`` losses and entropies are in nats per valid token, under ``"none"`` they have the shape
    of the tokens, with 0 where the label is ignored. Token weights and the normaliser apply to all entries alike.
    """

    loss: Tensor
    """``(1 - ce_weight) * T^2 * divergence + ce_weight * cross_entropy`` (without T^2 if
    ``scale_by_temperature=False``).
    """
    divergence: Tensor
    """D at the given temperature, without the T^2 factor."""
    cross_entropy: Tensor | None
    """Student's cross-entropy on the labels at temperature 1; None without labels."""
    student_entropy: Tensor
    """Entropy of the student's distribution at the given temperature."""
    num_tokens: Tensor
    """Number of tokens whose label is not ignored, int64 scalar."""
    teacher_entropy: Tensor
    """Entropy of the teacher's distribution at the given temperature, which is the divergence's, as the student's."""
    accuracy: Tensor | None
    """Whether the student gives no token more probability than the label, 1 or 0; None without labels."""


def divergence_output(
    loss: Tensor,
    parts: Tensor,  # [RESULTS], or [RESULTS, N]
    count: Tensor,
    tokens: torch.Size | None,  # their shape under reduction="none", else None
    labelled: bool,
) -> DivergenceOutput:
    """What a divergence returns, of what :class:`pocl_kernels.autograd.FusedLoss` does."""
    of = list(parts.unbind())
    if tokens is not None:
        loss, *of = (x.reshape(tokens) for x in (loss, *of))
    ce, accuracy = (of[CROSS_ENTROPY], of[ACCURACY]) if labelled else (None, None)
    return DivergenceOutput(loss, of[DIVERGENCE], ce, of[ENTROPY], count, of[TEACHER_ENTROPY], accuracy)


class CrossEntropyOutput(NamedTuple):
    """Result of :func:`pocl_kernels.fused_linear_cross_entropy` with ``parts=True``; all but ``loss`` are detached.

    Reductions, token weights and the normaliser apply as in :class:`DivergenceOutput`.
    """

    loss: Tensor
    """Cross-entropy with the labels smoothed, and ``z_loss * log_sum_exp**2``: what is differentiated."""
    cross_entropy: Tensor
    """Plain, on the labels as they are: what perplexity is made of."""
    log_sum_exp: Tensor
    """``logsumexp`` of a token's logits."""
    accuracy: Tensor
    """Whether no token has more probability than the label, 1 or 0."""
    num_tokens: Tensor
    """Number of tokens whose label is not ignored, int64 scalar."""
