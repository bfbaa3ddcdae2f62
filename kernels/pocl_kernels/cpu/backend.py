"""The CPU backend: token chunks, GEMMs into reused buffers, one fused row kernel between them.

For N valid rows: S = 2 N V H_s, Te = 2 N V H_t flops; forward S + Te, each of dh and dW one S more: nothing is done
twice. The logits of one chunk of rows exist at a time, in float32, student and teacher: 8 V bytes a row, bounded by
``workspace_mb``. Heads in other dtypes are upcast in vocabulary slices; float64 inputs run in float64.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from pocl_kernels import parallel
from pocl_kernels.cpu import compiler, memory
from pocl_kernels.divergences import Divergence
from pocl_kernels.eager import rows as eager
from pocl_kernels.eager.sparse import sparse_rows
from pocl_kernels.plan import RESULTS, Gradients, Inputs, Plan, Rows, counting_rows
from pocl_kernels.scalar import Program, trace
from pocl_kernels.targets import targets_of

MAX_CHUNK_ROWS = 512  # GEMMs no longer gain beyond this, and a shorter chunk stays nearer to the caches
LOGITS_SHARE = 0.97  # of the workspace; the rest is for slices in the making, rows of threads, the library's packing
SCRATCH_BLOCK = 1024  # entries a block in prelude.h
PROJECTION_ROWS = 2048  # vocabulary rows of a slice: with 128 rows of hidden states 1 MB, in the L2 cache
SLICE_ROWS = 4096  # vocabulary rows of a head that are upcast at a time


def linear_divergence(inputs: Inputs, plan: Plan, wanted: Gradients) -> Rows:
    """Per-row divergence, cross-entropy and entropy, and the gradients of ``sum row_scale * loss`` (see
    :class:`Rows`). Keeps no state: chunks of whole rows serve both memory modes.
    """
    V, dtype = inputs.vocab_size, inputs.dtype
    assert inputs.student_weight is not None
    assert inputs.teacher_hidden is not None
    assert inputs.teacher_weight is not None
    none = Gradients(False, False, False)
    student = _Projection(inputs.student_hidden, inputs.student_weight, inputs.student_bias, V, dtype, wanted)
    teacher = _Projection(inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, V, dtype, none)
    labels, row_scale = inputs.labels, inputs.row_scale
    rows = counting_rows(labels, plan.ignore_index, row_scale)
    results = torch.zeros(len(row_scale), RESULTS, dtype=dtype)
    group = parallel.VocabularyGroup(plan.process_group, V, row_scale.device) if plan.process_group else None
    kernel = divergence_kernel(plan, dtype) if group is None else partial(eager.divergence_rows, group=group)
    share = V if group is None else group.largest
    student_rows, teacher_rows = chunk_rows(len(rows), share * dtype.itemsize, plan.workspace_mb)
    for index in _split(rows, student_rows):
        zs = student.project(index)
        out = torch.empty(len(index), RESULTS, dtype=dtype)
        scale = row_scale.index_select(0, index).to(dtype)
        for first in range(0, len(index), teacher_rows):
            part = slice(first, first + teacher_rows)
            chunk_labels = None if labels is None else labels.index_select(0, index[part])
            zt = teacher.project(index[part])
            own = plan.at(index[part])
            kernel(zs[part], zt, student.bias, teacher.bias, chunk_labels, scale[part], own, any(wanted), out[part])
        results.index_copy_(0, index, out)
        if any(wanted):
            student.accumulate(index, zs)
    if group is not None and student.grad_hidden is not None:
        group.sum(student.grad_hidden)
    return Rows(results.T.contiguous(), *student.gradients())


def linear_cross_entropy(inputs: Inputs, plan: Plan, wanted: Gradients) -> Rows:
    """Per-row results of the cross-entropy alone, and the gradients of ``sum row_scale * loss``."""
    V, dtype, labels, row_scale = inputs.vocab_size, inputs.dtype, inputs.labels, inputs.row_scale
    assert inputs.student_weight is not None
    assert labels is not None
    student = _Projection(inputs.student_hidden, inputs.student_weight, inputs.student_bias, V, dtype, wanted)
    results = torch.zeros(len(row_scale), RESULTS, dtype=dtype)
    group = parallel.VocabularyGroup(plan.process_group, V, row_scale.device) if plan.process_group else None
    kernel = _cross_entropy_kernel(dtype) if group is None else partial(eager.cross_entropy_rows, group=group)
    rows = counting_rows(labels, plan.ignore_index, row_scale)
    share = V if group is None else group.largest
    size = evened(len(rows), int(LOGITS_SHARE * plan.workspace_mb * 2**20 / (share * dtype.itemsize)))
    for index in _split(rows, size):
        z = student.project(index)
        out = torch.zeros(len(index), RESULTS, dtype=dtype)
        chunk_scale = row_scale.index_select(0, index).to(dtype)
        picked = labels.index_select(0, index)
        kernel(z, student.bias, picked, chunk_scale, plan, any(wanted), out)
        results.index_copy_(0, index, out)
        if any(wanted):
            student.accumulate(index, z)
    if group is not None and student.grad_hidden is not None:
        group.sum(student.grad_hidden)
    return Rows(results.T.contiguous(), *student.gradients())


def linear_sparse(inputs: Inputs, plan: Plan, wanted: Gradients) -> Rows:
    """As :func:`linear_divergence`, of a sparse teacher: a cross-entropy's three products and its memory."""
    V, dtype, labels, row_scale = plan.vocab_size or inputs.vocab_size, inputs.dtype, inputs.labels, inputs.row_scale
    assert inputs.student_weight is not None
    student = _Projection(inputs.student_hidden, inputs.student_weight, inputs.student_bias, V, dtype, wanted)
    results = torch.zeros(len(row_scale), RESULTS, dtype=dtype)
    group = parallel.VocabularyGroup(plan.process_group, V, row_scale.device) if plan.process_group else None
    rows = counting_rows(labels, plan.ignore_index, row_scale)
    targets = targets_of(inputs, plan.at(rows), rows, V if group is None else group.total)
    share = V if group is None else group.largest
    size = evened(len(rows), int(LOGITS_SHARE * plan.workspace_mb * 2**20 / (share * dtype.itemsize)))
    done = 0
    for index in _split(rows, size):
        z = student.project(index)
        out = torch.empty(len(index), RESULTS, dtype=dtype)
        scale = row_scale.index_select(0, index).to(dtype)
        picked = None if labels is None else labels.index_select(0, index)
        chosen = targets.at(slice(done, done + len(index)))
        sparse_rows(z, student.bias, chosen, picked, scale, plan.at(index), any(wanted), out, group)
        results.index_copy_(0, index, out)
        if any(wanted):
            student.accumulate(index, z)
        done += len(index)
    if group is not None and student.grad_hidden is not None:
        group.sum(student.grad_hidden)
    return Rows(results.T.contiguous(), *student.gradients())


class _Projection:
    """One head applied to chunks of rows, and the gradients that flow back through it."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, V: int, dtype: torch.dtype, wanted: Gradients
    ) -> None:
        self.hidden, self.weight, self.dtype, self.V, self.wanted = hidden, weight, dtype, V, wanted
        self.bias = None if bias is None else bias[:V].to(dtype).contiguous()
        self._buffer: Tensor | None = None
        self._chunk_hidden: Tensor | None = None
        self.grad_hidden = torch.zeros(hidden.shape, dtype=dtype) if wanted.hidden else None
        # Rows beyond the shared vocabulary get no gradient; the rest is written by the first chunk (mm, not addmm).
        self.grad_weight = memory.empty(weight.shape, dtype) if wanted.weight else None
        self.grad_bias = torch.zeros(weight.shape[0], dtype=dtype) if wanted.bias else None
        self._first = True

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        """The head in the compute dtype: itself, or upcast a slice at a time."""
        if self.weight.dtype == self.dtype:
            yield slice(0, self.V), self.weight[: self.V]
            return
        for first in range(0, self.V, SLICE_ROWS):
            part = slice(first, min(first + SLICE_ROWS, self.V))
            yield part, self.weight[part].to(self.dtype)

    def project(self, index: Tensor) -> Tensor:
        """``hidden[index] @ weight.T`` into the reused buffer: ``[len(index), V]``."""
        if self._buffer is None:  # the first chunk is the largest
            self._buffer = memory.empty((len(index), self.V), self.dtype)
        z = self._buffer[: len(index)]
        self._chunk_hidden = self.hidden.index_select(0, index).to(self.dtype)
        # weight @ hidden.T by slices, then transposed from cache: a quarter faster than hidden @ weight.T, for which
        # the library repacks the whole weight, and no slower for short chunks (benchmarks/NOTES.md).
        hidden = self._chunk_hidden.T.contiguous()
        tile = torch.empty(PROJECTION_ROWS, len(index), dtype=self.dtype)
        for first in range(0, self.V, PROJECTION_ROWS):
            part = slice(first, min(first + PROJECTION_ROWS, self.V))
            product = torch.mm(self.weight[part].to(self.dtype), hidden, out=tile[: part.stop - first])
            z[:, part] = product.T
        return z

    def accumulate(self, index: Tensor, gradient: Tensor) -> None:
        """Add one chunk's share to the gradients; ``gradient`` is that of the projection, ``[len(index), V]``."""
        assert self._chunk_hidden is not None
        if self.grad_hidden is not None:
            dh = torch.zeros_like(self._chunk_hidden)
            for part, weight in self._slices():
                dh.addmm_(gradient[:, part], weight)
            self.grad_hidden.index_copy_(0, index, dh)
        if self.grad_weight is not None:
            target = self.grad_weight[: self.V]
            if self._first:
                torch.mm(gradient.T, self._chunk_hidden, out=target)
            else:
                target.addmm_(gradient.T, self._chunk_hidden)
        if self.grad_bias is not None:
            self.grad_bias[: self.V] += gradient.sum(0)
        self._first = False

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.grad_weight is not None:
            self.grad_weight[0 if self._first else self.V :].zero_()
        return self.grad_hidden, self.grad_weight, self.grad_bias


def chunk_rows(rows: int, row_bytes: int, workspace_mb: float) -> tuple[int, int]:
    """Rows of a chunk of the student's logits, and of the teacher's within it, that together fit the workspace.

    A chunk of the student's reads its head twice and reads and writes the weight's gradient, one of the teacher's
    reads a head once: four to one, so the sum of all traffic is least where the student's chunk is twice as long.
    """
    most = int(LOGITS_SHARE * workspace_mb * 2**20 / row_bytes)
    student = evened(rows, most * 2 // 3)
    return student, evened(student, most - student)


def _split(rows: Tensor, size: int) -> Sequence[Tensor]:
    """``rows`` in chunks, none of them empty: of no rows there are no chunks."""
    return rows.split(size) if len(rows) else ()


def evened(rows: int, most: int) -> int:
    """Chunk length of at most ``most`` and at least one row, the same for all chunks but the last."""
    most = max(1, min(most, MAX_CHUNK_ROWS))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


# --- Row kernels: compiled where that is possible ---------------------------------------------------------------------


@cache
def _source(kind: type[Divergence]) -> str:
    """The C source of a class; the fields' values play no part in it."""
    return compiler.divergence_source(trace(object.__new__(kind)))


@cache
def _program(kind: type[Divergence]) -> tuple[Program, str]:
    """The traced definition of a class and its C source; the fields' values play no part in them."""
    program = trace(object.__new__(kind))
    return program, compiler.divergence_source(program)


def divergence_kernel(plan: Plan, dtype: torch.dtype) -> Callable[..., None]:
    """The row kernel of ``plan``'s divergence: compiled for float32 where that is possible, else eager.

    Compiled, it also takes ``gradient`` and ``places`` ``[3, n]``: where the rows of ``zs``, ``zt`` and ``gradient``
    begin, in entries; without them rows are contiguous and the gradient lies over ``zs``.
    """
    assert plan.divergence is not None
    program, source = _program(type(plan.divergence))
    function = compiler.load(source, "divergence_rows") if dtype == torch.float32 else None
    if function is None:
        return eager.divergence_rows
    native = function
    shared = None if plan.by_token else _numbers_of(plan, program)

    def run(
        zs: Tensor,
        zt: Tensor,
        bias_s: Tensor | None,
        bias_t: Tensor | None,
        labels: Tensor | None,
        row_scale: Tensor,
        plan: Plan,
        want_grad: bool,
        out: Tensor,
        gradient: Tensor | None = None,
        places: Tensor | None = None,
    ) -> None:
        V = min(zs.shape[-1], zt.shape[-1])
        threads = min(torch.get_num_threads(), len(out))
        scratch = torch.empty(threads, 2 * V + 2 * -(-V // SCRATCH_BLOCK))
        rate, coefficient, uniforms = _numbers_of(plan, program) if shared is None else shared
        arguments = (
            ctypes.c_int64(V),
            _first_entry(zs),
            _first_entry(zt),
            _first_entry(zs if gradient is None else gradient),
            _pointer(places),
            ctypes.c_int64(len(out)),
            _pointer(bias_s),
            _pointer(bias_t),
            ctypes.c_float(plan.student_scale),
            ctypes.c_float(plan.student_softcap or 0.0),
            ctypes.c_float(plan.teacher_scale),
            ctypes.c_float(plan.teacher_softcap or 0.0),
            _pointer(labels),
            _pointer(row_scale),
            _pointer(rate),
            _pointer(coefficient),
            ctypes.c_float(plan.ce_weight),
            _pointer(uniforms),
            ctypes.c_int64(uniforms.shape[1]),
            ctypes.c_int64(plan.by_token),
        )
        own = [(_pointer(s), _pointer(out), ctypes.c_int(want_grad)) for s in scratch]
        _parallel(native, len(out), arguments, own)

    return run


def _numbers_of(plan: Plan, program: Program) -> tuple[Tensor, Tensor, Tensor]:
    """1 / T, the slopes' coefficient and the uniforms ``[n, U]`` as the kernel takes them; n is 1: for all rows."""
    assert plan.divergence is not None
    n = len(plan.temperature) if plan.by_token else 1
    values = program.uniform_values(plan.divergence.parameters())
    numbers = (1.0 / plan.temperature, plan.slope_coefficient, *values)
    rate, coefficient, *uniforms = (torch.as_tensor(x, dtype=torch.float64).float().expand(n) for x in numbers)
    table = torch.stack(uniforms, 1) if uniforms else torch.empty(n, 0)
    return rate.contiguous(), coefficient.contiguous(), table


def _cross_entropy_kernel(dtype: torch.dtype) -> Callable[..., None]:
    function = compiler.load(compiler.cross_entropy_source(), "cross_entropy_rows") if dtype == torch.float32 else None
    if function is None:
        return eager.cross_entropy_rows
    native = function

    def run(
        z: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        row_scale: Tensor,
        plan: Plan,
        want_grad: bool,
        out: Tensor,
    ) -> None:
        arguments = (
            ctypes.c_int64(z.shape[1]),
            _pointer(z),
            _pointer(bias),
            ctypes.c_float(plan.student_scale),
            ctypes.c_float(plan.student_softcap or 0.0),
            _pointer(labels),
            _pointer(row_scale),
            ctypes.c_float(plan.label_smoothing),
            ctypes.c_float(plan.z_loss),
            _pointer(out),
            ctypes.c_int(want_grad),
        )
        _parallel(native, z.shape[0], arguments, [()] * min(torch.get_num_threads(), z.shape[0]))

    return run


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None) if tensor is None else _first_entry(tensor)


def _first_entry(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _parallel(
    function: Callable[..., None], rows: int, arguments: tuple[object, ...], own: Sequence[tuple[object, ...]]
) -> None:
    """Run the kernel over contiguous shares of the rows, one thread a share; ctypes releases the GIL.

    ``own`` holds the last arguments, one tuple a thread.
    """
    threads = len(own)
    bounds = [rows * i // threads for i in range(threads + 1)]
    calls = [
        (ctypes.c_int64(first), ctypes.c_int64(last), *arguments, *mine)
        for (first, last), mine in zip(pairwise(bounds), own, strict=True)
    ]
    waiting = [_pool(threads).submit(function, *call) for call in calls[1:]]
    function(*calls[0])
    for task in waiting:
        task.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="pocl-rows")


# A forked child inherits the pool's bookkeeping but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
