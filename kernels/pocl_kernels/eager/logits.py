"""Rows of logits that lie where a trainer left them: found, copied out in small chunks, and put back as gradients.

For row kernels that want compact rows in the dtype of the computation: the eager ones, and the compiled one where the
logits have 16 bits. A chunk is about 4 MB of each model, so that nothing of the size of the logits is made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pocl_kernels.eager import rows as eager
from pocl_kernels.parallel import VocabularyGroup
from pocl_kernels.plan import RESULTS, Inputs, Plan, counting_rows

CHUNK_ELEMENTS = 1 << 20


def row_starts(x: Tensor) -> Tensor:
    """Where each row of ``[..., V]`` begins, in entries from the first one: ``[N]`` int64 on the device."""
    starts = torch.zeros((), dtype=torch.int64, device=x.device)
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        starts = starts.unsqueeze(-1) + torch.arange(size, device=x.device) * stride
    return starts.reshape(-1)


def gradient_of(student: Tensor, V: int, plan: Plan, without: Tensor | None) -> Tensor:
    """Where the gradient is written: over the logits, or in memory of its own, ``[..., V_s]``.

    Padding of the vocabulary and the rows ``without`` a loss (indices) are 0 already; the rest is not yet written.
    """
    gradient = student.detach() if plan.inplace else torch.empty_like(student, memory_format=torch.contiguous_format)
    if gradient.shape[-1] > V:
        gradient[..., V:] = 0
    if without is not None and len(without):
        gradient[torch.unravel_index(without, gradient.shape[:-1])] = 0
    return gradient


def ignored_rows(rows: Tensor, count: int) -> Tensor:
    """Those of ``count`` rows that are not among ``rows``."""
    others = torch.ones(count, dtype=torch.bool, device=rows.device)
    others[rows] = False
    return torch.nonzero(others).squeeze(-1)


def divergence(
    inputs: Inputs,
    plan: Plan,
    want_grad: bool,
    group: VocabularyGroup | None,
    kernel: Callable[..., None] = eager.divergence_rows,
) -> tuple[Tensor, Tensor | None]:
    """Per-row results ``[RESULTS, N]`` and the gradient of ``sum row_scale * loss`` in the logits' dtype."""
    student, teacher, row_scale, labels = inputs.student_hidden, inputs.teacher_hidden, inputs.row_scale, inputs.labels
    assert teacher is not None
    V, dtype = inputs.vocab_size, inputs.dtype
    rows = counting_rows(labels, plan.ignore_index, row_scale)
    results = torch.zeros(RESULTS, len(row_scale), dtype=dtype, device=student.device)
    gradient = gradient_of(student, V, plan, ignored_rows(rows, len(row_scale))) if want_grad else None
    # Processes wait for each other at every chunk: they must chunk alike even if their shares differ.
    size = max(1, CHUNK_ELEMENTS // (V if group is None else group.largest))
    more = {} if group is None else {"group": group}
    for index in rows.split(size) if len(rows) else ():
        at = torch.unravel_index(index, student.shape[:-1])
        zs, zt = student[..., :V][at].to(dtype), teacher[..., :V][at].to(dtype)
        out = torch.empty(len(index), RESULTS, dtype=dtype, device=student.device)
        own = None if labels is None else labels.index_select(0, index)
        scale = row_scale.index_select(0, index).to(dtype)
        kernel(zs, zt, None, None, own, scale, plan.at(index), want_grad, out, **more)
        results.index_copy_(1, index, out.T)
        if gradient is not None:
            gradient[..., :V][at] = zs.to(gradient.dtype)
    return results, gradient
