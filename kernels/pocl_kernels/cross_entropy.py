"""The language-modelling loss from hidden states, without logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pocl_kernels import operators
from pocl_kernels.arguments import (
    check_choices,
    check_hidden,
    flattened_labels,
    row_factors,
    run_time_numbers,
)
from pocl_kernels.autograd import FusedLoss, Result
from pocl_kernels.head import Head, as_head, gathered
from pocl_kernels.modes import autocast_products, check_backend, mode_and_workspace
from pocl_kernels.operators import Choices
from pocl_kernels.plan import CROSS_ENTROPY, Inputs


def fused_linear_cross_entropy(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    memory: str = "auto",
    workspace_mb: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of a language model from hidden states, without its logits: scoring and supervised fine-tuning.

    Equals ``torch.nn.functional.cross_entropy(logits, labels)`` over the valid tokens; arguments, reductions and
    errors as in :func:`fused_linear_divergence`. Returns nats: a scalar, or ``[...]`` (0 at ignored positions) for
    ``reduction="none"``.
    """
    head = gathered(as_head(head))
    check_hidden("", hidden, head)
    shape = hidden.shape[:-1]
    check_choices(reduction, memory, workspace_mb)
    check_backend(backend, hidden.device)
    mode, workspace_mb = mode_and_workspace(reduction, memory, workspace_mb, hidden, head, None)
    if labels is None:
        raise ValueError("labels=None: a cross-entropy needs the labels, a tensor of token ids")
    flat_labels = flattened_labels(labels, hidden, ignore_index, head.vocab_size)
    row_scale, _ = row_factors(hidden, flat_labels, ignore_index, token_weight, reduction, normalizer)
    choices = Choices("", backend, mode, "", autocast_products(hidden.device))
    numbers, scales = run_time_numbers([1.0, 0.0, 1.0]), [head.scale, head.softcap or 0.0, 1.0, 0.0]

    def run(
        h: Tensor, w: Tensor, b: Tensor | None, scale: Tensor, wanted: list[bool], state: Tensor | None,
        constants: Sequence[Any],
    ) -> Result:  # fmt: skip
        labels, numbers = constants
        results, dh, dw, db, state = operators.linear_loss(
            Inputs(h, w, b, None, None, None, labels, scale, state), numbers, scales, workspace_mb, ignore_index,
            wanted, choices,
        )  # fmt: skip
        return Result(results[CROSS_ENTROPY], results, (dh, dw, db), state)

    now = mode == "fast" and torch.is_grad_enabled()
    flat = hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        loss, _ = FusedLoss.apply(
            flat, head.weight, head.bias, row_scale, run, now, reduction != "none", flat_labels, numbers
        )
    return loss.reshape(shape) if reduction == "none" else loss
