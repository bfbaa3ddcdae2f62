"""The divergence of logits at hand on a CPU: the row kernel without a projection.

Float32 logits are read where they lie and the gradient is written once: 12 bytes an entry of the vocabulary, two read
and one written, which is the floor. Scratch is two rows a thread. 16-bit logits are copied out and converted in chunks
that stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_kernels.cpu.backend import divergence_kernel
from pocl_kernels.eager import logits as eager
from pocl_kernels.eager.rows import divergence_rows
from pocl_kernels.parallel import VocabularyGroup
from pocl_kernels.plan import RESULTS, Gradients, Inputs, Plan, Rows, counting_rows


def divergence(inputs: Inputs, plan: Plan, wanted: Gradients) -> Rows:
    """Per-row results, and the gradient of ``sum row_scale * loss`` in the dtype of the student's logits."""
    student, teacher = inputs.student_hidden, inputs.teacher_hidden
    assert teacher is not None
    group = None
    if plan.process_group:
        group = VocabularyGroup(plan.process_group, inputs.vocab_size, student.device)
    kernel = divergence_rows if group is not None else divergence_kernel(plan, inputs.dtype)
    if kernel is divergence_rows or {student.dtype, teacher.dtype} != {torch.float32}:
        results, gradient = eager.divergence(inputs, plan, wanted.hidden, group, kernel)
    else:
        results, gradient = _where_they_lie(inputs, plan, wanted.hidden, kernel)
    return Rows(results, gradient, None, None)


def _where_they_lie(inputs: Inputs, plan: Plan, want_grad: bool, kernel: object) -> tuple[Tensor, Tensor | None]:
    student, teacher, labels, row_scale = inputs.student_hidden, inputs.teacher_hidden, inputs.labels, inputs.row_scale
    assert teacher is not None
    assert callable(kernel)
    rows = counting_rows(labels, plan.ignore_index, row_scale)
    results = torch.zeros(len(row_scale), RESULTS)
    gradient = None
    if want_grad:
        gradient = eager.gradient_of(student, inputs.vocab_size, plan, eager.ignored_rows(rows, len(row_scale)))
    if len(rows):
        written = student if gradient is None else gradient
        places = torch.stack([eager.row_starts(x).index_select(0, rows) for x in (student, teacher, written)])
        out = torch.empty(len(rows), RESULTS)
        own = None if labels is None else labels.index_select(0, rows)
        scale, numbers = row_scale.index_select(0, rows), plan.at(rows)
        kernel(student, teacher, None, None, own, scale, numbers, want_grad, out, gradient, places)
        results.index_copy_(0, rows, out)
    return results.T.contiguous(), gradient
