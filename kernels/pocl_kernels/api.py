"""The distillation loss: validation, the reductions, and the choice of memory mode and backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pocl_kernels import operators
from pocl_kernels.arguments import (
    by_token,
    check_choices,
    check_models,
    check_numbers,
    flat_vectors,
    flattened_labels,
    row_factors,
    run_time_numbers,
)
from pocl_kernels.autograd import FusedLoss, Result
from pocl_kernels.divergences import Divergence, get_divergence
from pocl_kernels.head import Head, as_head, gathered
from pocl_kernels.modes import autocast_products, check_backend, mode_and_workspace, without_autocast
from pocl_kernels.operators import Choices
from pocl_kernels.output import DivergenceOutput, divergence_output
from pocl_kernels.plan import Inputs
from pocl_kernels.sparse import SparseTeacher, check_sparse, check_tail


def fused_linear_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor | SparseTeacher,
    teacher_head: Head | Tensor | None = None,
    *,
    divergence: str | Divergence = "fkl",
    temperature: float | Tensor = 1.0,
    scale_by_temperature: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    ce_weight: float = 0.0,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    memory: str = "auto",
    workspace_mb: float | None = None,
    backend: str = "auto",
    process_group: ProcessGroup | None = None,
) -> DivergenceOutput:
    """Divergence of a student's next-token distribution from a teacher's, from hidden states: full logits never exist.

    In plain PyTorch, with p and q the softmaxes of the teacher's and the student's ``logits / temperature``::

        loss = (1 - ce_weight) * temperature**2 * D(p, q) + ce_weight * cross_entropy(student_logits, labels)

    Args:
        student_hidden: ``[..., H_s]`` last hidden states of the student.
        student_head: :class:`Head`, or a bare ``[V, H_s]`` weight.
        teacher_hidden: ``[..., H_t]``, same leading shape; computed without gradient. Or a :class:`SparseTeacher`, its
            K likeliest tokens a position, which has no head: three matrix products in place of four.
        teacher_head: :class:`Head`, or a bare ``[V, H_t]`` weight; parameters that require grad get none, like the
            hidden states a head with a graph behind it is refused. Vocabularies may differ by padding rows at the end:
            the surplus rows take no probability and get a zero gradient.
        divergence: a name (fkl, rkl, skew_fkl, skew_rkl, jsd, tvd, jeffreys, alpha) or a :class:`Divergence` instance.
        temperature: of both softmaxes, > 0: a number, or ``[...]`` of one a token; so are the divergence's parameters.
        scale_by_temperature: multiply D by temperature^2 (Hinton et al. 2015), so that gradients keep their size.
        labels: ``[...]`` int64, aligned: position i predicts ``labels[i]``. Rows with ``ignore_index`` are dropped
            before any matrix product.
        ce_weight: share of the cross-entropy on the labels, in [0, 1].
        token_weight: ``[...]`` factor on each token's loss; takes no gradient. A token of weight 0 counts as valid and
            adds nothing, even if its loss is infinite.
        reduction: "mean" over valid tokens, "sum", or "none" for the shape of the tokens.
        normalizer: replaces the number of valid tokens under "mean": pass the count over the global batch, and the
            gradient does not depend on accumulation, padding or world size.
        memory: "fast" computes gradients in the forward pass, "low" recomputes the logits in the backward pass; "auto"
            is "fast", except for reduction="none", whose upstream gradients are not known in the forward pass, and on
            GPUs where the workspace holds the gradients of less than 1024 rows.
        workspace_mb: bound on scratch memory in MiB: by default 256, under "low" 96; on a GPU a tenth of its
            memory, at most 8192, under "low" a sixteenth of that.
        backend: "triton" (CUDA, ROCm), "cpu", or "auto" by the tensors' device.
        process_group: the processes that share the vocabulary, each with the same consecutive rows of both heads, in
            rank order; hidden states and labels (global token ids) are the same on all of them. Gradients of hidden
            states are summed over the group, those of the weights belong to each process's rows.

    Returns:
        :class:`DivergenceOutput`, nats per valid token; gradients flow from ``loss`` to the student's hidden states,
        weight and bias, whichever require them, never to the teacher. To differentiate them again raises.
        Under autocast the products run in its dtype on a GPU; on a CPU, where 16-bit products are no faster, autocast
        changes nothing.

    Raises:
        ValueError: for shapes, dtypes, devices or settings that do not fit, and for labels outside the vocabulary.
    """
    student_head, divergence = gathered(as_head(student_head)), get_divergence(divergence)
    sparse = teacher_hidden if isinstance(teacher_hidden, SparseTeacher) else None
    pair: tuple[Tensor, Head] | None = None
    if isinstance(teacher_hidden, SparseTeacher):
        vocab_size = check_sparse(student_hidden, student_head, teacher_hidden, teacher_head, process_group is None)
    else:
        if teacher_head is None:
            raise ValueError("teacher_head is missing: hidden states need their head; a SparseTeacher needs none")
        pair = teacher_hidden, as_head(teacher_head)
        vocab_size = check_models(student_hidden, student_head, *pair, process_group)
        pair = teacher_hidden, gathered(pair[1])
    check_numbers(temperature, ce_weight, labels)
    if sparse is not None:
        check_tail(sparse, divergence, temperature, vocab_size)
    temperature, parameters = by_token(student_hidden, temperature, divergence)
    check_choices(reduction, memory, workspace_mb)
    check_backend(backend, student_hidden.device)
    mode, workspace_mb = mode_and_workspace(reduction, memory, workspace_mb, student_hidden, student_head, pair)
    shape, group_name = student_hidden.shape[:-1], "" if process_group is None else process_group.group_name
    flat_labels, valid = flattened_labels(labels, student_hidden, ignore_index, vocab_size)
    row_scale, count = row_factors(student_hidden, valid, token_weight, reduction, normalizer)

    hidden = flat_vectors(student_hidden)
    of_teacher, teacher_scales = _constants_of(pair, sparse)
    factor = (1.0 - ce_weight) * (temperature**2 if scale_by_temperature else 1.0)
    scales = [student_head.scale, student_head.softcap or 0.0, *teacher_scales]
    products = autocast_products(hidden.device)
    choices = Choices(divergence.token, backend, mode, group_name, products)
    if sparse is not None:
        choices = choices._replace(tail=sparse.tail, vocab_size=str(vocab_size or ""))
    numbers, changing = run_time_numbers([temperature, factor, ce_weight, *parameters])
    by_row = changing is not None and changing.dim() == 2
    if by_row:
        scales.append(ce_weight)

    def run(
        h: Tensor, w: Tensor, b: Tensor | None, scale: Tensor, wanted: list[bool], state: Tensor | None,
        constants: Sequence[Any],
    ) -> Result:  # fmt: skip
        teacher, weight, bias, ids, log_probs, labels, changing = constants
        results, dh, dw, db, state = operators.linear_loss(
            Inputs(h, w, b, teacher, weight, bias, labels, scale, state, ids, log_probs),
            numbers if changing is None else changing,
            scales,
            workspace_mb,
            ignore_index,
            wanted,
            choices,
        )
        own = changing[1].to(results.dtype) if by_row else factor
        return Result(results, own, ce_weight, (dh, dw, db), state)

    now = mode == "fast" and torch.is_grad_enabled()
    with without_autocast(hidden.device):
        loss, parts = FusedLoss.apply(
            hidden, student_head.weight, student_head.bias, row_scale, run, now, reduction != "none",
            *of_teacher, flat_labels, changing,
        )  # fmt: skip
    return divergence_output(loss, parts, count, shape if reduction == "none" else None, labels is not None)


def _constants_of(
    pair: tuple[Tensor, Head] | None, sparse: SparseTeacher | None
) -> tuple[tuple[Tensor | None, ...], list[float]]:
    """What a loss reads of its teacher: hidden states, weight, bias, ids, log-probabilities; and scale and softcap."""
    if sparse is not None:
        K = sparse.token_ids.shape[-1]
        return (None, None, None, sparse.token_ids.reshape(-1, K), sparse.log_probs.detach().reshape(-1, K)), [1.0, 0.0]
    assert pair is not None
    hidden, head = pair
    bias = None if head.bias is None else head.bias.detach()
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    return (flat, head.weight.detach(), bias, None, None), [head.scale, head.softcap or 0.0]
