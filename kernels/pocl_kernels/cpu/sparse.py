"""The CPU backend of sparse teachers: the chunks of a cross-entropy, with a row kernel of its own.

For N valid rows and S = 2 N V H_s flops: forward S, each of dh and dW one S more. The logits of one chunk of rows exist
at a time, 4 V bytes a row.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from pocl_kernels.chunks import Chunks
from pocl_kernels.cpu import compiler
from pocl_kernels.cpu.backend import (
    FLOAT,
    INTEGER,
    POINTER,
    SCRATCH_BLOCK,
    Projection,
    as_table,
    evened,
    in_parallel,
    pointer,
    rows_within,
)
from pocl_kernels.divergences import Divergence
from pocl_kernels.eager import sparse as eager
from pocl_kernels.parallel import VocabularyGroup
from pocl_kernels.plan import RESULTS, Gradients, Inputs, Plan, Rows
from pocl_kernels.scalar import Program, slope_sum, trace
from pocl_kernels.targets import Targets, targets_of


def linear_sparse(inputs: Inputs, plan: Plan, wanted: Gradients) -> Rows:
    """As :func:`linear_divergence`, of a sparse teacher: a cross-entropy's three products and its memory."""
    V, dtype, labels, row_scale = plan.vocab_size or inputs.vocab_size, inputs.dtype, inputs.labels, inputs.row_scale
    assert inputs.student_weight is not None
    chunks = Chunks(labels, row_scale, plan.ignore_index, by_weight=True)
    student = Projection(
        inputs.student_hidden, inputs.student_weight, inputs.student_bias, V, dtype, wanted, whole=chunks.all
    )
    group = VocabularyGroup(plan.process_group, V, row_scale.device) if plan.process_group else None
    plan, scale = plan.at(chunks.index), chunks.gather(row_scale).to(dtype)
    targets = targets_of(inputs, plan, chunks.index, V if group is None else group.total)
    kernel = sparse_kernel(plan, dtype) if group is None else partial(eager.sparse_rows, group=group)
    share = V if group is None else group.largest
    results = torch.empty(chunks.count, RESULTS, dtype=dtype)
    for rows, part in chunks.of(evened(chunks.count, rows_within(plan.workspace_mb, share * dtype.itemsize))):
        z = student.project(rows)
        own = None if chunks.labels is None else chunks.labels[part]
        kernel(z, student.bias, targets.at(part), own, scale[part], plan.at(part), any(wanted), results[part])
        if any(wanted):
            student.accumulate(rows, z)
    if group is not None and student.grad_hidden is not None:
        group.sum(student.grad_hidden)
    return Rows(chunks.report(results.T), *student.gradients())


@cache
def _program(kind: type[Divergence]) -> tuple[Program, str]:
    """The traced definition of a class and its C source; the fields' values play no part in them."""
    program = trace(object.__new__(kind))
    return program, compiler.sparse_source(program)


def sparse_kernel(plan: Plan, dtype: torch.dtype) -> Callable[..., None]:
    """The row kernel of ``plan``'s divergence: compiled for float32 where that is possible, else eager."""
    assert plan.divergence is not None
    program, source = _program(type(plan.divergence))
    native: Any = compiler.load(source, "sparse_rows") if dtype == torch.float32 else None
    if native is None:
        return eager.sparse_rows
    native.argtypes = [*[INTEGER] * 3, *[POINTER] * 2, *[FLOAT] * 2, POINTER, INTEGER, *[POINTER] * 2, ctypes.c_int,
                       *[POINTER] * 4, *[ctypes.c_double] * 2, POINTER, *[INTEGER] * 2, POINTER, ctypes.c_int,
                       *[POINTER] * 2]  # fmt: skip
    return partial(_sparse_rows, native, program)


def _sparse_rows(
    native: Any,
    program: Program,
    z: Tensor,
    bias: Tensor | None,
    targets: Targets,
    labels: Tensor | None,
    row_scale: Tensor,
    plan: Plan,
    want_grad: bool,
    out: Tensor,
) -> None:
    (n, V), K = z.shape, targets.ids.shape[1]
    threads = min(torch.get_num_threads(), n)
    scratch = torch.empty(threads, 2 * V + -(-V // SCRATCH_BLOCK))
    doubles = torch.empty(threads, 3 * (K + 1), dtype=torch.float64)
    rate, coefficient, uniforms = _numbers_of(plan, program)
    known = slope_sum(plan.divergence, program)
    arguments = (
        V, z.data_ptr(), pointer(bias), plan.student_scale, plan.student_softcap or 0.0, pointer(targets.ids), K,
        pointer(targets.log_probs), pointer(targets.tail), targets.each, pointer(labels), pointer(row_scale),
        pointer(rate), pointer(coefficient), plan.ce_weight, math.nan if known is None else known, pointer(uniforms),
        uniforms.shape[1], plan.by_token, pointer(out), want_grad,
    )  # fmt: skip
    in_parallel(native, n, arguments, [(pointer(s), pointer(d)) for s, d in zip(scratch, doubles, strict=True)])


def _numbers_of(plan: Plan, program: Program) -> tuple[Tensor, Tensor, Tensor]:
    """1 / T, the slopes' coefficient and the uniforms ``[n, U]``, in float64; n is 1: for all rows."""
    assert plan.divergence is not None
    n = len(plan.temperature) if plan.by_token else 1
    values = program.uniform_values(plan.divergence.parameters())
    return as_table((1.0 / plan.temperature, plan.slope_coefficient, *values), n, torch.float64)
