"""The Triton backend, ``fast``: token chunks, the vendor's GEMMs into reused buffers, one fused row kernel between them.

For N valid rows: S = 2 N V H_s, Te = 2 N V H_t flops; forward S + Te, each of dh and dW one S more: nothing is done twice.
The logits of one chunk exist at a time, in float32, student and teacher: 8 V bytes a row and 2 V for a bf16 gradient,
bounded by ``workspace_mb``. One wait for the device a call: the number of valid rows shapes the chunks; without labels none.
float64 runs the same chunks through the eager row functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pocl_kernels.cpu import eager
from pocl_kernels.plan import Gradients, Plan, Rows
from pocl_kernels.triton_backend import cross_entropy_rows, divergence_rows
from pocl_kernels.triton_backend.projection import ROW_ALIGNMENT, Projection
from pocl_kernels.triton_backend.terms import slope_sum, term_of

NO_GRADIENTS = Gradients(False, False, False)
MAX_CHUNK_ROWS = 8192
WHOLE_TILES = 128  # rows of a GEMM's tile: a chunk of more holds a multiple


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
    """Per-row divergence, cross-entropy and entropy, and the gradients of ``sum row_scale * loss`` (see :class:`Rows`)."""
    V = min(student_weight.shape[0], teacher_weight.shape[0])
    dtype = torch.promote_types(torch.promote_types(student_hidden.dtype, teacher_hidden.dtype), torch.float32)
    with on_device(student_hidden):
        student = Projection(student_hidden, student_weight, student_bias, V, dtype, wanted)
        teacher = Projection(teacher_hidden, teacher_weight, teacher_bias, V, dtype, NO_GRADIENTS)
        chunks = Chunks(labels, row_scale, plan.ignore_index, dtype)
        results = torch.empty(chunks.count, 3, dtype=dtype, device=student_hidden.device)
        for rows, part in chunks.of(chunk_rows(chunks.count, [student, teacher], plan.workspace_mb)):
            zs, zt = student.project(rows), teacher.project(rows)
            gradient = student.gradient_tile(zs)
            label = None if chunks.labels is None else chunks.labels[part]
            run = _run_divergence if dtype == torch.float32 else _run_divergence_eagerly
            run(zs, zt, gradient, student.bias, teacher.bias, label, chunks.row_scale[part], plan, V, results[part])
            if gradient is not None:
                student.accumulate(rows, gradient)
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
        chunks = Chunks(labels, row_scale, ignore_index, dtype)
        assert chunks.labels is not None
        results = torch.empty(chunks.count, dtype=dtype, device=hidden.device)
        for rows, part in chunks.of(chunk_rows(chunks.count, [student], workspace_mb)):
            z = student.project(rows)
            gradient = student.gradient_tile(z)
            label, w = chunks.labels[part], chunks.row_scale[part]
            if dtype == torch.float32:
                cross_entropy_rows.cross_entropy_rows[(z.shape[0],)](
                    z, gradient, student.bias, label, w, results[part], V, z.stride(0) // ROW_ALIGNMENT, float(scale),
                    softcap, BLOCK=cross_entropy_rows.BLOCK, num_warps=cross_entropy_rows.WARPS,
                )  # fmt: skip
            else:
                b = None if student.bias is None else student.bias[:V]
                eager.cross_entropy_rows(z[:, :V], b, scale, softcap, label, w, gradient is not None, results[part])
            if gradient is not None:
                student.accumulate(rows, gradient)
        return chunks.scatter(results), *student.gradients()


class Chunks:
    """The rows that count, compacted, a chunk at a time."""

    def __init__(self, labels: Tensor | None, row_scale: Tensor, ignore_index: int, dtype: torch.dtype) -> None:
        self._rows = row_scale.shape[0]
        self.index: Tensor | None = None  # None: all rows
        if labels is not None:
            index = torch.nonzero(labels != ignore_index).squeeze(-1)  # waits for the device
            if len(index) < self._rows:
                self.index, labels, row_scale = index, labels.index_select(0, index), row_scale.index_select(0, index)
        self.labels, self.row_scale = labels, row_scale.to(dtype)
        self.count = self.row_scale.shape[0]

    def of(self, size: int) -> Iterator[tuple[Tensor | slice, slice]]:
        """Chunks of at most ``size`` rows: where they lie among all rows, and where among the compacted ones."""
        for first in range(0, self.count, size):
            part = slice(first, min(first + size, self.count))
            yield (part if self.index is None else self.index[part]), part

    def scatter(self, compact: Tensor) -> Tensor:
        """Results of the compacted rows among all rows, 0 elsewhere."""
        if self.index is None:
            return compact
        return compact.new_zeros(self._rows, *compact.shape[1:]).index_copy_(0, self.index, compact)


def chunk_rows(rows: int, projections: list[Projection], workspace_mb: float) -> int:
    """Rows of one chunk: as many as the workspace holds, evened out over the chunks, in whole tiles of a GEMM."""
    free = int(workspace_mb * 2**20) - sum(p.bytes_fixed for p in projections)
    most = max(1, min(free // sum(p.bytes_per_row for p in projections), MAX_CHUNK_ROWS))
    if most >= rows:
        return max(1, rows)
    size = -(-rows // -(-rows // most))
    return min(-(-size // WHOLE_TILES) * WHOLE_TILES, most) if most >= WHOLE_TILES else size


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors'."""
    return nullcontext() if tensor.device.type == "cpu" else torch.cuda.device(tensor.device)


def _run_divergence(
    zs: Tensor,
    zt: Tensor,
    gradient: Tensor | None,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor,
    plan: Plan,
    V: int,
    results: Tensor,
) -> None:
    term = term_of(plan.divergence)
    divergence_rows.divergence_rows[(zs.shape[0],)](
        zs, zt, gradient, bias_s, bias_t, labels, row_scale, results, V, zs.stride(0) // ROW_ALIGNMENT,
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
    V: int,
    results: Tensor,
) -> None:
    bias_s, bias_t = (None if b is None else b[:V] for b in (bias_s, bias_t))
    wanted = gradient is not None
    eager.divergence_rows(zs[:, :V], zt[:, :V], bias_s, bias_t, labels, row_scale, plan, wanted, results)
