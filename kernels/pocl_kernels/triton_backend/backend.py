"""The Triton backend: the two entry points, and ``memory="fast"``.

Fast: token chunks, the vendor's GEMMs into reused buffers, one fused row kernel between them. For N valid rows, S = 2
N V H_s and Te = 2 N V H_t flops: forward S + Te, each of dh and dW one S more, nothing is done twice. The logits of
one chunk exist at a time, in float32, student and teacher: 8 V bytes a row, and 2 V for the gradient of a 16-bit
model, bounded by ``workspace_mb``. float64 runs the same chunks through the eager row functions. Low: see ``low.py``.

A call waits for the device at its start: the number of valid rows shapes the chunks, the largest weight scales a
float16 gradient. float32 without labels needs neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_kernels.cpu import eager
from pocl_kernels.parallel import VocabularyGroup
from pocl_kernels.plan import Gradients, Plan, Rows
from pocl_kernels.triton_backend import cross_entropy_rows, divergence_rows, launch, low, steps
from pocl_kernels.triton_backend.chunks import Chunks, chunk_rows, on_device, scaled_weights
from pocl_kernels.triton_backend.projection import ROW_ALIGNMENT, Projection
from pocl_kernels.triton_backend.steps import NO_GRADIENTS, Task, Tile
from pocl_kernels.triton_backend.terms import slope_sum, term_of


def linear_divergence(
    student_hidden: Tensor,  # [N, H_s]
    student_weight: Tensor,  # [V_s, H_s]
    student_bias: Tensor | None,  # [V_s]
    teacher_hidden: Tensor,  # [N, H_t]
    teacher_weight: Tensor,  # [V_t, H_t]
    teacher_bias: Tensor | None,  # [V_t]
    labels: Tensor | None,  # [N]
    row_scale: Tensor,  # [N]
    plan: Plan,
    wanted: Gradients,
    state: Tensor | None = None,  # what ``plan.memory="low"`` returned for the same tensors without gradients
) -> Rows:
    """Per-row results and the gradients of ``sum row_scale * loss`` (see :class:`Rows`).

    Low without gradients returns a state; low with gradients takes it, makes no per-row results, and is then 3 S + Te.
    """
    V = min(student_weight.shape[0], teacher_weight.shape[0])
    dtype = torch.promote_types(torch.promote_types(student_hidden.dtype, teacher_hidden.dtype), torch.float32)
    device, task = student_hidden.device, steps.divergence_task(plan)
    with on_device(student_hidden):
        student = Projection(student_hidden, student_weight, student_bias, V, dtype, wanted, plan.products)
        teacher = Projection(teacher_hidden, teacher_weight, teacher_bias, V, dtype, NO_GRADIENTS, plan.products)
        group = VocabularyGroup(plan.process_group, V, device) if plan.process_group else None
        chunks = Chunks(labels, row_scale, plan.ignore_index)
        if group is not None and chunks.labels is not None:
            low.check_labels(chunks.labels, V, group)
        scale = chunks.gather(row_scale)
        size = chunk_rows(chunks.count, [student, teacher], plan.workspace_mb)
        if plan.memory == "low":
            return _low(student, teacher, chunks, scale, task, plan.workspace_mb, group, state)
        if group is not None:
            results, gradients = low.at_once(student, teacher, chunks, scale, task, size, group)
        else:
            results, gradients = _fast(student, teacher, chunks, scale, task, size, plan)
        D, ce, entropy = chunks.scatter(results, 1)
        return Rows(D, ce, entropy, *gradients)


def linear_cross_entropy(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,
    labels: Tensor,  # [N]
    row_scale: Tensor,  # [N]
    ignore_index: int,
    scale: float,
    softcap: float | None,
    workspace_mb: float,
    wanted: Gradients,
    memory: str = "fast",
    state: Tensor | None = None,
    products: torch.dtype | None = None,
) -> Rows:
    """Per-row cross-entropy and the gradients of ``sum row_scale * cross_entropy``; ``state`` as above."""
    V = weight.shape[0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    task = steps.cross_entropy_task(scale, softcap)
    with on_device(hidden):
        student = Projection(hidden, weight, bias, V, dtype, wanted, products)
        chunks = Chunks(labels, row_scale, ignore_index)
        row_scale = chunks.gather(row_scale)
        if memory == "low":
            return _low(student, None, chunks, row_scale, task, workspace_mb, None, state)
        weights = scaled_weights(student, row_scale, task.largest)
        results = torch.zeros(3, chunks.count, dtype=dtype, device=hidden.device)
        for rows, part in chunks.of(chunk_rows(chunks.count, [student], workspace_mb)):
            assert chunks.labels is not None
            student.take(rows)
            (tile,) = steps.tiles(student, None, V)
            gradient = student.gradient_tile(tile.student)
            _cross_entropy(tile, gradient, chunks.labels[part], weights[part], task, results[1, part])
            if gradient is not None:
                student.accumulate(tile.columns, gradient)
                student.store(rows)
        D, ce, entropy = chunks.scatter(results, 1)
        return Rows(D, ce, entropy, *student.gradients())


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
    results = torch.zeros(3, chunks.count, dtype=student.dtype, device=student.hidden.device)
    if state is None:
        results, states = low.forward(student, teacher, chunks, task, workspace_mb, group)
    else:
        states = chunks.gather(state, 1)
    D, ce, entropy = chunks.scatter(results, 1)
    if not any(student.wanted):
        return Rows(D, ce, entropy, None, None, None, chunks.scatter(states, 1))
    return Rows(D, ce, entropy, *low.backward(student, teacher, chunks, row_scale, states, task, workspace_mb, group))


def _fast(
    student: Projection, teacher: Projection, chunks: Chunks, row_scale: Tensor, task: Task, size: int, plan: Plan
) -> tuple[Tensor, low.Grads]:
    weights = scaled_weights(student, row_scale, task.largest)
    results = torch.zeros(chunks.count, 3, dtype=student.dtype, device=student.hidden.device)
    for rows, part in chunks.of(size):
        student.take(rows)
        teacher.take(rows)
        (tile,) = steps.tiles(student, teacher, student.V)
        gradient = student.gradient_tile(tile.student)
        labels = None if chunks.labels is None else chunks.labels[part]
        if student.dtype == torch.float32:
            _divergence(tile, gradient, labels, weights[part], task, results[part])
        else:
            assert tile.teacher is not None
            bias_s, bias_t = (None if b is None else b[: student.V] for b in (tile.bias_s, tile.bias_t))
            w, want_grad = weights[part], gradient is not None
            eager.divergence_rows(tile.student, tile.teacher, bias_s, bias_t, labels, w, plan, want_grad, results[part])
        if gradient is not None:
            student.accumulate(tile.columns, gradient)
            student.store(rows)
    return results.T.contiguous(), student.gradients()


def _divergence(
    tile: Tile, gradient: Tensor | None, labels: Tensor | None, row_scale: Tensor, task: Task, results: Tensor
) -> None:
    assert task.divergence is not None
    n, V = tile.student.shape
    term = term_of(task.divergence)
    divergence_rows.divergence_rows[(n,)](
        tile.student, tile.teacher, gradient, tile.bias_s, tile.bias_t, labels, row_scale, results, V,
        tile.student.stride(0) // ROW_ALIGNMENT, *task.transforms, task.slope_coefficient, task.ce_weight,
        term.uniforms, term=term.function, SLOPE_SUM=slope_sum(task.divergence), BLOCK=divergence_rows.BLOCK,
        **launch.on(tile.student.device),
    )  # fmt: skip


def _cross_entropy(
    tile: Tile, gradient: Tensor | None, labels: Tensor, row_scale: Tensor, task: Task, results: Tensor
) -> None:
    n, V = tile.student.shape
    scale, softcap = task.transforms[:2]
    if tile.student.dtype == torch.float64:
        bias = None if tile.bias_s is None else tile.bias_s[:V]
        eager.cross_entropy_rows(tile.student, bias, scale, softcap, labels, row_scale, gradient is not None, results)
        return
    cross_entropy_rows.cross_entropy_rows[(n,)](
        tile.student, gradient, tile.bias_s, labels, row_scale, results, V, tile.student.stride(0) // ROW_ALIGNMENT,
        scale, softcap, BLOCK=cross_entropy_rows.BLOCK, **launch.on(tile.student.device),
    )  # fmt: skip
