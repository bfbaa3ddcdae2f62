"""The Triton backend, ``fast``: token chunks, the vendor's GEMMs into reused buffers, one fused row kernel between
them.

For N valid rows: S = 2 N V H_s, Te = 2 N V H_t flops; forward S + Te, each of dh and dW one S more: nothing is done
twice. The logits of one chunk exist at a time, in float32, student and teacher: 8 V bytes a row, and 2 V for the
gradient of a 16-bit model, bounded by ``workspace_mb``. One wait for the device a call, at its start: the number of
valid rows shapes the chunks, the largest weight scales a float16 gradient; float32 without labels needs neither.
float64 runs the same chunks through the eager row functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_kernels.cpu import eager
from pocl_kernels.plan import Gradients, Plan, Rows
from pocl_kernels.triton_backend import cross_entropy_rows, divergence_rows
from pocl_kernels.triton_backend.chunks import Chunks, chunk_rows, on_device, scaled_weights
from pocl_kernels.triton_backend.projection import ROW_ALIGNMENT, Projection
from pocl_kernels.triton_backend.terms import slope_sum, term_of

NO_GRADIENTS = Gradients(False, False, False)


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
) -> Rows:
    """Per-row divergence, cross-entropy and entropy, and the gradients of ``sum row_scale * loss`` (see
    :class:`Rows`).
    """
    V = min(student_weight.shape[0], teacher_weight.shape[0])
    dtype = torch.promote_types(torch.promote_types(student_hidden.dtype, teacher_hidden.dtype), torch.float32)
    with on_device(student_hidden):
        student = Projection(student_hidden, student_weight, student_bias, V, dtype, wanted)
        teacher = Projection(teacher_hidden, teacher_weight, teacher_bias, V, dtype, NO_GRADIENTS)
        chunks = Chunks(labels, student_hidden.shape[0], plan.ignore_index)
        largest = max(abs(plan.slope_coefficient), plan.ce_weight) * abs(plan.student_scale)
        weights = scaled_weights(student, chunks.gather(row_scale), largest)
        results = torch.empty(chunks.count, 3, dtype=dtype, device=student_hidden.device)
        size = chunk_rows(chunks.count, [student, teacher], plan.workspace_mb)
        for rows, part in chunks.of(size):
            student.take(rows)
            teacher.take(rows)
            zs, zt = student.project(slice(0, V)), teacher.project(slice(0, V))
            gradient = student.gradient_tile(zs)
            label = None if chunks.labels is None else chunks.labels[part]
            run = _run_divergence if dtype == torch.float32 else _run_divergence_eagerly
            run(zs, zt, gradient, student.bias, teacher.bias, label, weights[part], plan, results[part])
            if gradient is not None:
                student.accumulate(slice(0, V), gradient)
                student.store(rows)
        results = chunks.scatter(results)
        return Rows(results[:, 0], results[:, 1], results[:, 2], *student.gradients())


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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Per-row cross-entropy ``[N]`` and the gradients of ``sum row_scale * cross_entropy``."""
    V = weight.shape[0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with on_device(hidden):
        student = Projection(hidden, weight, bias, V, dtype, wanted)
        chunks = Chunks(labels, hidden.shape[0], ignore_index)
        weights = scaled_weights(student, chunks.gather(row_scale), abs(scale))
        assert chunks.labels is not None
        results = torch.empty(chunks.count, dtype=dtype, device=hidden.device)
        for rows, part in chunks.of(chunk_rows(chunks.count, [student], workspace_mb)):
            student.take(rows)
            z = student.project(slice(0, V))
            gradient = student.gradient_tile(z)
            label, w = chunks.labels[part], weights[part]
            if dtype == torch.float32:
                cross_entropy_rows.cross_entropy_rows[(z.shape[0],)](
                    z, gradient, student.bias, label, w, results[part], V, z.stride(0) // ROW_ALIGNMENT, float(scale),
                    softcap, BLOCK=cross_entropy_rows.BLOCK, num_warps=cross_entropy_rows.WARPS,
                )  # fmt: skip
            else:
                b = None if student.bias is None else student.bias[:V]
                eager.cross_entropy_rows(z, b, scale, softcap, label, w, gradient is not None, results[part])
            if gradient is not None:
                student.accumulate(slice(0, V), gradient)
                student.store(rows)
        return chunks.scatter(results), *student.gradients()


def _run_divergence(
    zs: Tensor,
    zt: Tensor,
    gradient: Tensor | None,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor,
    plan: Plan,
    results: Tensor,
) -> None:
    term = term_of(plan.divergence)
    divergence_rows.divergence_rows[(zs.shape[0],)](
        zs, zt, gradient, bias_s, bias_t, labels, row_scale, results, zs.shape[1], zs.stride(0) // ROW_ALIGNMENT,
        float(plan.student_scale), plan.student_softcap, float(plan.teacher_scale), plan.teacher_softcap,
        1.0 / plan.temperature, float(plan.slope_coefficient), float(plan.ce_weight), term.uniforms,
        term=term.function, SLOPE_SUM=slope_sum(plan.divergence), BLOCK=divergence_rows.BLOCK,
        num_warps=divergence_rows.WARPS,
    )  # fmt: skip


def _run_divergence_eagerly(
    zs: Tensor,
    zt: Tensor,
    gradient: Tensor | None,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor,
    plan: Plan,
    results: Tensor,
) -> None:
    bias_s, bias_t = (None if b is None else b[: zs.shape[1]] for b in (bias_s, bias_t))
    eager.divergence_rows(zs, zt, bias_s, bias_t, labels, row_scale, plan, gradient is not None, results)
