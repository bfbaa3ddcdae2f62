"""The language-modelling loss from hidden states, without logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pocl_kernels import operators
from pocl_kernels.arguments import (
    check_choices,
    check_hidden,
    flat_vectors,
    flattened_labels,
    row_factors,
    run_time_numbers,
)
from pocl_kernels.autograd import FusedLoss, Result
from pocl_kernels.head import Head, as_head, gathered
from pocl_kernels.modes import autocast_products, check_backend, mode_and_workspace, without_autocast
from pocl_kernels.operators import Choices
from pocl_kernels.output import CrossEntropyOutput
from pocl_kernels.plan import ACCURACY, CROSS_ENTROPY, LOG_SUM_EXP, Inputs


def fused_linear_cross_entropy(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    memory: str = "auto",
    workspace_mb: float | None = None,
    backend: str = "auto",
    process_group: ProcessGroup | None = None,
    parts: bool = False,
) -> Any:
    """Cross-entropy of a language model from hidden states, without its logits: scoring and supervised fine-tuning.

    Equals ``torch.nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)`` over the valid tokens,
    plus ``z_loss`` times the square of the logits' log-sum-exp.

    Args:
        hidden: ``[..., H]`` last hidden states.
        head: :class:`Head`, or a bare ``[V, H]`` weight.
        labels: ``[...]`` int64, aligned: position i predicts ``labels[i]``; ``ignore_index`` drops a row before any
            matrix product.
        label_smoothing: share of the label's probability that all V tokens get alike, in [0, 1] (Szegedy et al. 2016).
            Padding rows of the head are tokens here, as in PyTorch.
        z_loss: factor of ``logsumexp(logits)**2``, at least 0, about 1e-4: keeps logits from drifting (PaLM, Chowdhery
            et al. 2022).
        parts: return a :class:`CrossEntropyOutput` in place of the loss alone; costs nothing.

    All other arguments, reductions and errors are those of :func:`pocl_kernels.fused_linear_divergence`.

    Returns:
        The loss in nats, a tensor: a scalar, or ``[...]`` (0 at ignored positions) for ``reduction="none"``; with
        ``parts`` a :class:`CrossEntropyOutput`.

    Raises:
        ValueError: for shapes, dtypes, devices or settings that do not fit, and for labels outside the vocabulary.
    """
    head = gathered(as_head(head))
    check_hidden("", hidden, head)
    shape = hidden.shape[:-1]
    check_choices(reduction, memory, workspace_mb)
    _check_numbers(label_smoothing, z_loss)
    check_backend(backend, hidden.device)
    mode, workspace_mb = mode_and_workspace(reduction, memory, workspace_mb, hidden, head, None)
    if labels is None:
        raise ValueError("labels=None: a cross-entropy needs the labels, a tensor of token ids")
    # No process alone knows a vocabulary that several share.
    vocab_size = head.vocab_size if process_group is None else None
    flat_labels, valid = flattened_labels(labels, hidden, ignore_index, vocab_size)
    row_scale, count = row_factors(hidden, valid, token_weight, reduction, normalizer)
    group_name = "" if process_group is None else process_group.group_name
    choices = Choices("", backend, mode, group_name, autocast_products(hidden.device))
    numbers, changing = run_time_numbers([1.0, 0.0, 1.0, label_smoothing, z_loss])
    scales = [head.scale, head.softcap or 0.0, 1.0, 0.0]

    def run(
        h: Tensor, w: Tensor | None, b: Tensor | None, scale: Tensor, wanted: list[bool], state: Tensor | None,
        constants: Sequence[Any],
    ) -> Result:  # fmt: skip
        labels, changing = constants
        results, dh, dw, db, state = operators.linear_loss(
            Inputs(h, w, b, None, None, None, labels, scale, state),
            numbers if changing is None else changing, scales, workspace_mb, ignore_index,
            wanted, choices,
        )  # fmt: skip
        return Result(results, 1.0, 0.0, (dh, dw, db), state)

    now = mode == "fast" and torch.is_grad_enabled()
    flat = flat_vectors(hidden)
    with without_autocast(hidden.device):
        loss, figures = FusedLoss.apply(
            flat,
            head.weight,
            head.bias,
            row_scale,
            run,
            now,
            reduction != "none",
            flat_labels,
            changing,
        )
    of = figures.unbind()
    if reduction == "none":
        loss, *of = (x.reshape(shape) for x in (loss, *of))
    return CrossEntropyOutput(loss, of[CROSS_ENTROPY], of[LOG_SUM_EXP], of[ACCURACY], count) if parts else loss


def _check_numbers(label_smoothing: float, z_loss: float) -> None:
    if not (isinstance(label_smoothing, (int, float)) and 0.0 <= label_smoothing <= 1.0):
        raise ValueError(f"label_smoothing={label_smoothing!r} must be in [0, 1]; 0 is the plain cross-entropy")
    if not (isinstance(z_loss, (int, float)) and 0.0 <= z_loss < math.inf):
        raise ValueError(f"z_loss={z_loss!r} must be a number, at least 0 and finite: a factor such as 1e-4")
