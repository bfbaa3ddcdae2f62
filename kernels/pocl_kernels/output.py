"""What a fused loss returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DivergenceOutput(NamedTuple):
    """Result of :func:`pocl_kernels.fused_linear_divergence`; all but ``loss`` are detached. A named tuple.

    Under ``reduction="mean"`` every entry is in nats per valid token, under ``"none"`` it has the shape of the tokens
    with 0 where the label is ignored. Token weights and the normaliser apply to all entries alike.
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
