"""The Triton backend: the two entry points, and ``memory="fast"``.

Fast: token chunks, the vendor's GEMMs into reused buffers, one fused row kernel between them. For N valid rows, S = 2
N V H_s and Te = 2 N V H_t flops: forward S + Te, each of dh and dW one S more, nothing is done twice. The logits of
one chunk exist at a time, in float32, student and teacher: 8 V bytes a row, bounded by ``workspace_mb``. The gradient
of a 16-bit model's logits is 2 V bytes a row more, kept for as many chunks as there is room (``layout.py``): where all
rows have room, the weight's gradient is one product, made in the backward pass (``later.py``). float64 runs the same
chunks through the eager row functions. Low: see ``low.py``.

A call waits for the device at its start: the number of valid rows shapes the chunks, the largest weight scales a
float16 gradient. float32 without labels needs neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_kernels.chunks import Chunks
from pocl_kernels.eager import rows as eager
from pocl_kernels.parallel import VocabularyGroup
from pocl_kernels.plan import RESULTS, Gradients, Inputs, Plan, Rows
from pocl_kernels.triton_backend import cross_entropy_rows, divergence_rows, launch, low, steps
from pocl_kernels.triton_backend.chunks import allocated, on_device, scaled_weights
from pocl_kernels.triton_backend.layout import ROW_ALIGNMENT
from pocl_kernels.triton_backend.projection import Grads, Projection
from pocl_kernels.triton_backend.steps import NO_GRADIENTS, Task, Tile
from pocl_kernels.triton_backend.terms import slope_sum


def linear_divergence(inputs: Inputs, plan: Plan, wanted: Gradients) -> Rows:
    """Per-row results and the gradients of ``sum row_scale * loss`` (see :class:`Rows`).

    Low without gradients returns a state; low with gradients takes it, makes no per-row results, and is then 3 S + Te.
    """
    V, dtype = inputs.vocab_size, inputs.dtype
    labels, row_scale, device = inputs.labels, inputs.row_scale, inputs.student_hidden.device
    assert inputs.student_weight is not None
    assert inputs.teacher_hidden is not None
    assert inputs.teacher_weight is not None
    with on_device(inputs.student_hidden):
        student = Projection(
            inputs.student_hidden, inputs.student_weight, inputs.student_bias, V, dtype, wanted, plan.products
        )
        teacher = Projection(
            inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, V, dtype, NO_GRADIENTS, plan.products
        )
        group = VocabularyGroup(plan.process_group, V, device) if plan.process_group else None
        chunks = Chunks(labels, row_scale, plan.ignore_index)
        plan = plan.at(chunks.index)
        task = steps.divergence_task(plan, dtype)
        if group is not None and chunks.labels is not None:
            low.check_labels(chunks.labels, V, group)
        scale = chunks.gather(row_scale)
        if plan.memory == "low":
            return _low(student, teacher, chunks, scale, task, plan.workspace_mb, group, inputs.state)
        if group is not None:
            results, gradients = low.at_once(student, teacher, chunks, scale, task, plan.workspace_mb, group)
        else:
            results, gradients = _fast(student, teacher, chunks, scale, task, plan)
        return Rows(chunks.report(results), *gradients)


def linear_cross_entropy(inputs: Inputs, plan: Plan, wanted: Gradients) -> Rows:
    """Per-row results of the cross-entropy alone, and the gradients of ``sum row_scale * loss``; the state as above."""
    V, dtype, hidden = inputs.vocab_size, inputs.dtype, inputs.student_hidden
    assert inputs.student_weight is not None
    with on_device(hidden):
        group = VocabularyGroup(plan.process_group, V, hidden.device) if plan.process_group else None
        task = steps.cross_entropy_task(plan, V if group is None else group.total)
        student = Projection(hidden, inputs.student_weight, inputs.student_bias, V, dtype, wanted, plan.products)
        chunks = Chunks(inputs.labels, inputs.row_scale, plan.ignore_index)
        if group is not None and chunks.labels is not None:
            low.check_labels(chunks.labels, V, group)
        row_scale = chunks.gather(inputs.row_scale)
        if plan.memory == "low":
            return _low(student, None, chunks, row_scale, task, plan.workspace_mb, group, inputs.state)
        if group is not None:
            results, gradients = low.at_once(student, None, chunks, row_scale, task, plan.workspace_mb, group)
        else:
            results, gradients = _fast(student, None, chunks, row_scale, task, plan)
        return Rows(chunks.report(results), *gradients)


def _low(
    student: Projection,
    teacher: Projection | None,
    chunks: Chunks,
    row_scale: Tensor,
    task: Task,
    workspace_mb: float,
    group: VocabularyGroup | None,
    state: Tensor | None,
) -> Rows:
    results = torch.zeros(RESULTS, chunks.count, dtype=student.dtype, device=student.hidden.device)
    if state is None:
        results, states = low.forward(student, teacher, chunks, task, workspace_mb, group)
    else:
        states = chunks.gather(state, 1)
    results = chunks.report(results)
    if not any(student.wanted):
        return Rows(results, None, None, None, chunks.scatter(states, 1))
    return Rows(results, *low.backward(student, teacher, chunks, row_scale, states, task, workspace_mb, group))


def _fast(
    student: Projection, teacher: Projection | None, chunks: Chunks, row_scale: Tensor, task: Task, plan: Plan
) -> tuple[Tensor, Grads]:
    """Per-row results ``[RESULTS, n]`` of the rows that count, and the gradients."""
    both = [student] if teacher is None else [student, teacher]
    weights = scaled_weights(student, row_scale, task.largest)
    results = torch.zeros(chunks.count, RESULTS, dtype=student.dtype, device=student.hidden.device)
    layout = allocated(both, chunks.count, plan.workspace_mb, later=plan.later)
    for group, among in chunks.of(layout.group):
        student.begin(group)
        for rows, part in chunks.of(layout.chunk, among):
            for projection in both:
                projection.take(rows)
            (tile,) = steps.tiles(student, teacher, student.V)
            gradient = student.gradient_tile(tile.student)
            labels = None if chunks.labels is None else chunks.labels[part]
            _rows(tile, gradient, labels, weights[part], task.at(part), plan.at(part), results[part])
            if gradient is not None:
                student.accumulate(tile.columns, gradient)
                student.store(rows)
        student.end()
    return results.T.contiguous(), student.gradients()


def _rows(
    tile: Tile,
    gradient: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor,
    task: Task,
    plan: Plan,
    results: Tensor,  # [n, RESULTS]
) -> None:
    """The row kernel of the task; eager in float64."""
    if tile.student.dtype == torch.float32:
        if task.divergence is not None:
            _divergence(tile, gradient, labels, row_scale, task, results)
        else:
            assert labels is not None
            _cross_entropy(tile, gradient, labels, row_scale, task, results)
        return
    V, want_grad = tile.student.shape[1], gradient is not None
    bias_s, bias_t = (None if b is None else b[:V] for b in (tile.bias_s, tile.bias_t))
    if tile.teacher is not None:
        eager.divergence_rows(tile.student, tile.teacher, bias_s, bias_t, labels, row_scale, plan, want_grad, results)
        return
    assert labels is not None
    eager.cross_entropy_rows(tile.student, bias_s, labels, row_scale, plan, want_grad, results)


def _divergence(
    tile: Tile, gradient: Tensor | None, labels: Tensor | None, row_scale: Tensor, task: Task, results: Tensor
) -> None:
    assert task.divergence is not None
    n, V = tile.student.shape
    divergence_rows.divergence_rows[(n,)](
        tile.student, tile.teacher, gradient, tile.bias_s, tile.bias_t, labels, row_scale, results, V,
        tile.student.stride(0) // ROW_ALIGNMENT, *task.transforms, task.slope_coefficient, task.ce_weight,
        task.uniforms, term=task.term, SLOPE_SUM=slope_sum(task.divergence), BY_TOKEN=task.by_token,
        BLOCK=divergence_rows.BLOCK, **launch.on(tile.student.device),
    )  # fmt: skip


def _cross_entropy(
    tile: Tile, gradient: Tensor | None, labels: Tensor, row_scale: Tensor, task: Task, results: Tensor
) -> None:
    n, V = tile.student.shape
    scale, softcap = task.transforms[:2]
    cross_entropy_rows.cross_entropy_rows[(n,)](
        tile.student, gradient, tile.bias_s, labels, row_scale, results, V, tile.student.stride(0) // ROW_ALIGNMENT,
        scale, softcap, task.smoothing, task.z_loss, BLOCK=cross_entropy_rows.BLOCK, **launch.on(tile.student.device),
    )  # fmt: skip
