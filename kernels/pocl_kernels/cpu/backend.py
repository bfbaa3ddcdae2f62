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
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pocl_kernels import parallel
from pocl_kernels.chunks import Chunks, taken, within
from pocl_kernels.chunks import Rows as Taken
from pocl_kernels.cpu import compiler, memory
from pocl_kernels.divergences import Divergence
from pocl_kernels.eager import rows as eager
from pocl_kernels.plan import RESULTS, Gradients, Inputs, Plan, Rows
from pocl_kernels.scalar import Program, trace

MAX_CHUNK_ROWS = 512  # GEMMs no longer gain beyond this, and a shorter chunk stays nearer to the caches
LOGITS_SHARE = 0.97  # of the workspace; the rest is for slices in the making, rows of threads, the library's packing
SCRATCH_BLOCK = 1024  # entries a block in prelude.h
PROJECTION_ROWS = 2048  # vocabulary rows of a slice: with 128 rows of hidden states 1 MB, in the L2 cache
SLICE_ROWS = 4096  # vocabulary rows of a head that are upcast at a time
NONE = Gradients(False, False, False)
INTEGER, POINTER, FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


def linear_divergence(inputs: Inputs, plan: Plan, wanted: Gradients) -> Rows:
    """Per-row divergence, cross-entropy and entropy, and the gradients of ``sum row_scale * loss`` (see
    :class:`Rows`). Keeps no state: chunks of whole rows serve both memory modes.
    """
    V, dtype = inputs.vocab_size, inputs.dtype
    assert inputs.student_weight is not None
    assert inputs.teacher_hidden is not None
    assert inputs.teacher_weight is not None
    labels, row_scale = inputs.labels, inputs.row_scale
    chunks = Chunks(labels, row_scale, plan.ignore_index, by_weight=True)
    student = Projection(
        inputs.student_hidden, inputs.student_weight, inputs.student_bias, V, dtype, wanted, whole=chunks.all
    )
    teacher = Projection(inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, V, dtype, NONE)
    group = parallel.VocabularyGroup(plan.process_group, V, row_scale.device) if plan.process_group else None
    kernel = divergence_kernel(plan, dtype) if group is None else partial(eager.divergence_rows, group=group)
    share, want_grad = V if group is None else group.largest, any(wanted)
    student_rows, teacher_rows = chunk_rows(chunks.count, share * dtype.itemsize, plan.workspace_mb)
    results = torch.empty(chunks.count, RESULTS, dtype=dtype)
    scale, plan = chunks.gather(row_scale).to(dtype), plan.at(chunks.index)
    for rows, among in chunks.of(student_rows):
        zs = student.project(rows)
        for piece, part in chunks.of(teacher_rows, among):
            own = None if chunks.labels is None else within(chunks.labels, part)
            kernel(
                within(zs, slice(part.start - among.start, part.stop - among.start)), teacher.project(piece),
                student.bias, teacher.bias, own, within(scale, part), plan.at(part), want_grad, within(results, part),
            )  # fmt: skip
        if want_grad:
            student.accumulate(rows, zs)
    if group is not None and student.grad_hidden is not None:
        group.sum(student.grad_hidden)
    return Rows(chunks.report(results.T), *student.gradients())


def linear_cross_entropy(inputs: Inputs, plan: Plan, wanted: Gradients) -> Rows:
    """Per-row results of the cross-entropy alone, and the gradients of ``sum row_scale * loss``."""
    V, dtype, labels, row_scale = inputs.vocab_size, inputs.dtype, inputs.labels, inputs.row_scale
    assert inputs.student_weight is not None
    assert labels is not None
    chunks = Chunks(labels, row_scale, plan.ignore_index, by_weight=True)
    student = Projection(
        inputs.student_hidden, inputs.student_weight, inputs.student_bias, V, dtype, wanted, whole=chunks.all
    )
    assert chunks.labels is not None
    results = torch.zeros(chunks.count, RESULTS, dtype=dtype)
    group = parallel.VocabularyGroup(plan.process_group, V, row_scale.device) if plan.process_group else None
    kernel = _cross_entropy_kernel(dtype) if group is None else partial(eager.cross_entropy_rows, group=group)
    share = V if group is None else group.largest
    scale = chunks.gather(row_scale).to(dtype)
    size = evened(chunks.count, rows_within(plan.workspace_mb, share * dtype.itemsize))
    for rows, part in chunks.of(size):
        z = student.project(rows)
        kernel(z, student.bias, chunks.labels[part], scale[part], plan, any(wanted), results[part])
        if any(wanted):
            student.accumulate(rows, z)
    if group is not None and student.grad_hidden is not None:
        group.sum(student.grad_hidden)
    return Rows(chunks.report(results.T), *student.gradients())


class Projection:
    """One head applied to chunks of rows, and the gradients that flow back through it."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        V: int,
        dtype: torch.dtype,
        wanted: Gradients,
        *,
        whole: bool = False,  # every row will be taken
    ) -> None:
        self.hidden, self.weight, self.dtype, self.V, self.wanted = hidden, weight, dtype, V, wanted
        self.bias = None if bias is None else bias[:V].to(dtype).contiguous()
        self._buffer: Tensor | None = None
        self._chunk_hidden = hidden
        self.grad_hidden: Tensor | None = None
        if wanted.hidden:
            self.grad_hidden = (torch.empty if whole else torch.zeros)(hidden.shape, dtype=dtype)
        # Rows beyond the shared vocabulary get no gradient; the rest is written by the first chunk (mm, not addmm).
        self.grad_weight = memory.empty(weight.shape, dtype) if wanted.weight else None
        self.grad_bias = torch.zeros(weight.shape[0], dtype=dtype) if wanted.bias else None
        self._first = True

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        """The head in the compute dtype: itself, or upcast a slice at a time."""
        if self.weight.dtype == self.dtype:
            part = slice(0, self.V)
            yield part, within(self.weight, part)
            return
        for first in range(0, self.V, SLICE_ROWS):
            part = slice(first, min(first + SLICE_ROWS, self.V))
            yield part, self.weight[part].to(self.dtype)

    def project(self, rows: Taken) -> Tensor:
        """``hidden[rows] @ weight.T`` into the reused buffer: ``[n, V]``."""
        self._chunk_hidden = taken(self.hidden, rows).to(self.dtype)
        n = self._chunk_hidden.shape[0]
        if self._buffer is None:  # the first chunk is the largest
            self._buffer = memory.empty((n, self.V), self.dtype)
        z = within(self._buffer, slice(0, n))
        _multiply(self._chunk_hidden, self.weight, z)
        return z

    def accumulate(self, rows: Taken, gradient: Tensor) -> None:
        """Add one chunk's share to the gradients; ``gradient`` is that of the projection, ``[n, V]``."""
        if self.grad_hidden is not None:
            dh = within(self.grad_hidden, rows) if isinstance(rows, slice) else torch.empty_like(self._chunk_hidden)
            for part, weight in self._slices():
                if part.stop - part.start == self.V:
                    torch.mm(gradient, weight, out=dh)
                elif part.start == 0:
                    torch.mm(gradient[:, part], weight, out=dh)
                else:
                    dh.addmm_(gradient[:, part], weight)
            if not isinstance(rows, slice):
                self.grad_hidden.index_copy_(0, rows, dh)
        if self.grad_weight is not None:
            target = within(self.grad_weight, slice(0, self.V))
            if self._first:
                torch.mm(gradient.T, self._chunk_hidden, out=target)
            else:
                target.addmm_(gradient.T, self._chunk_hidden)
        if self.grad_bias is not None:
            self.grad_bias[: self.V] += gradient.sum(0)
        self._first = False

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.grad_weight is not None and (self._first or self.grad_weight.shape[0] > self.V):
            self.grad_weight[0 if self._first else self.V :].zero_()
        return self.grad_hidden, self.grad_weight, self.grad_bias


def _multiply(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """``hidden @ weight[:V].T`` into ``out``, ``[n, V]``.

    weight @ hidden.T by slices, then transposed from cache: a quarter faster than hidden @ weight.T, for which the
    library repacks the whole weight, and no slower for short chunks (benchmarks/NOTES.md).
    """
    n, V = out.shape
    factor = hidden.T.contiguous()
    tile = torch.empty(min(PROJECTION_ROWS, V), n, dtype=out.dtype)
    for first in range(0, V, PROJECTION_ROWS):
        part = slice(first, min(first + PROJECTION_ROWS, V))
        product = torch.mm(weight[part].to(out.dtype), factor, out=tile[: part.stop - first])
        out[:, part] = product.T


def chunk_rows(rows: int, row_bytes: int, workspace_mb: float) -> tuple[int, int]:
    """Rows of a chunk of the student's logits, and of the teacher's within it, that together fit the workspace.

    A chunk of the student's reads its head twice and reads and writes the weight's gradient, one of the teacher's
    reads a head once: four to one, so the sum of all traffic is least where the student's chunk is twice as long.
    """
    most = rows_within(workspace_mb, row_bytes)
    student = evened(rows, most * 2 // 3)
    return student, evened(student, most - student)


def rows_within(workspace_mb: float, row_bytes: int) -> int:
    """Rows of logits that the workspace holds."""
    return int(LOGITS_SHARE * workspace_mb * 2**20 / row_bytes)


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
    native: Any = compiler.load(source, "divergence_rows") if dtype == torch.float32 else None
    if native is None:
        return eager.divergence_rows
    native.argtypes = [*[INTEGER] * 3, *[POINTER] * 4, INTEGER, *[POINTER] * 2, *[FLOAT] * 4, *[POINTER] * 4, FLOAT,
                       POINTER, *[INTEGER] * 2, *[POINTER] * 2, ctypes.c_int]  # fmt: skip
    return partial(_divergence_rows, native, program)


def _divergence_rows(
    native: Any,
    program: Program,
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
    V, n = min(zs.shape[-1], zt.shape[-1]), out.shape[0]
    threads = min(torch.get_num_threads(), n)
    row = 2 * V + 2 * -(-V // SCRATCH_BLOCK)
    scratch = torch.empty(threads * row)
    rate, coefficient, uniforms = _numbers_of(plan, program)
    arguments = (
        V, zs.data_ptr(), zt.data_ptr(), (zs if gradient is None else gradient).data_ptr(), pointer(places), n,
        pointer(bias_s), pointer(bias_t), plan.student_scale, plan.student_softcap or 0.0, plan.teacher_scale,
        plan.teacher_softcap or 0.0, pointer(labels), pointer(row_scale), pointer(rate), pointer(coefficient),
        plan.ce_weight, pointer(uniforms), uniforms.shape[1], plan.by_token,
    )  # fmt: skip
    first = scratch.data_ptr()
    own = [(first + 4 * row * thread, out.data_ptr(), want_grad) for thread in range(threads)]
    in_parallel(native, n, arguments, own)


def _numbers_of(plan: Plan, program: Program) -> tuple[Tensor, Tensor, Tensor]:
    """1 / T, the slopes' coefficient and the uniforms ``[n, U]`` as the kernel takes them; n is 1: for all rows."""
    assert plan.divergence is not None
    parameters = plan.divergence.parameters()
    if not plan.by_token:
        return _shared_numbers(type(plan.divergence), plan.temperature, plan.divergence_factor, *parameters)
    values = program.uniform_values(parameters)
    return as_table((1.0 / plan.temperature, plan.slope_coefficient, *values), len(plan.temperature))


@lru_cache(maxsize=256)  # every chunk asks, and a schedule has many numbers
def _shared_numbers(kind: type[Divergence], temperature: float, factor: float, *parameters: float) -> Any:
    values = _program(kind)[0].uniform_values(parameters)
    return as_table((1.0 / temperature, factor / temperature, *values), 1)


def as_table(numbers: Sequence[Any], n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Two numbers ``[n]`` and the others ``[n, U]``, each of them one, or one a row."""
    rate, coefficient, *uniforms = (torch.as_tensor(x, dtype=torch.float64).to(dtype).expand(n) for x in numbers)
    table = torch.stack(uniforms, 1) if uniforms else torch.empty(n, 0, dtype=dtype)
    return rate.contiguous(), coefficient.contiguous(), table


def _cross_entropy_kernel(dtype: torch.dtype) -> Callable[..., None]:
    native: Any = None
    if dtype == torch.float32:
        native = compiler.load(compiler.cross_entropy_source(), "cross_entropy_rows")
    if native is None:
        return eager.cross_entropy_rows
    native.argtypes = [*[INTEGER] * 3, *[POINTER] * 2, *[FLOAT] * 2, *[POINTER] * 2, *[FLOAT] * 2, POINTER,
                       ctypes.c_int]  # fmt: skip

    def run(
        z: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        row_scale: Tensor,
        plan: Plan,
        want_grad: bool,
        out: Tensor,
    ) -> None:
        n, V = z.shape
        arguments = (
            V, z.data_ptr(), pointer(bias), plan.student_scale, plan.student_softcap or 0.0, pointer(labels),
            pointer(row_scale), plan.label_smoothing, plan.z_loss, pointer(out), want_grad,
        )  # fmt: skip
        in_parallel(native, n, arguments, [()] * min(torch.get_num_threads(), n))

    return run


def pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def in_parallel(
    function: Callable[..., None], rows: int, arguments: tuple[object, ...], own: Sequence[tuple[object, ...]]
) -> None:
    """Run the kernel over contiguous shares of the rows, one thread a share; ctypes releases the GIL.

    ``own`` holds the last arguments, one tuple a thread.
    """
    threads = len(own)
    if threads == 1:
        function(0, rows, *arguments, *own[0])
        return
    bounds = [rows * i // threads for i in range(threads + 1)]
    calls = [(*share, *arguments, *mine) for share, mine in zip(pairwise(bounds), own, strict=True)]
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
