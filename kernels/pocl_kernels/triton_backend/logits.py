"""The divergence of logits at hand on a GPU: the tile kernels on rows where they lie, each row one tile.

Forward: normalisers, results and a state of seven numbers a row, one pass over both models' logits where the divergence
is a weighted KL, else two. Backward: the gradient, one pass more, with the upstream gradient in it and rounded once; in
memory of its own or over the student's logits. Of an entry of 16-bit logits 10 (14) bytes in all; 6 are the floor.
Nothing else of the size of the logits is made. float64 goes through the eager rows in chunks.

Rows that all begin at multiples of 16 entries, with V one too, are read 128 bits at a time, others entry by entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_kernels.chunks import Chunks
from pocl_kernels.eager import logits as eager
from pocl_kernels.parallel import VocabularyGroup
from pocl_kernels.plan import RESULTS, STATE_ROWS, Gradients, Inputs, Plan, Rows
from pocl_kernels.triton_backend import low, steps
from pocl_kernels.triton_backend.chunks import on_device
from pocl_kernels.triton_backend.layout import ROW_ALIGNMENT
from pocl_kernels.triton_backend.steps import Places, Tile


def divergence(inputs: Inputs, plan: Plan, wanted: Gradients) -> Rows:
    """Per-row results and a state; with gradients wanted, that state and the gradient of ``sum row_scale * loss`` in
    the dtype of the student's logits.
    """
    student, V, row_scale = inputs.student_hidden, inputs.vocab_size, inputs.row_scale
    with on_device(student):
        group = VocabularyGroup(plan.process_group, V, student.device) if plan.process_group else None
        if inputs.dtype == torch.float64:
            results, gradient = eager.divergence(inputs, plan, wanted.hidden, group)
            return Rows(results, gradient, None, None, results.new_zeros(STATE_ROWS, len(row_scale)))
        chunks = Chunks(inputs.labels, row_scale, plan.ignore_index)
        if group is not None and chunks.labels is not None:
            low.check_labels(chunks.labels, V, group)
        task = steps.divergence_task(plan.at(chunks.index), inputs.dtype)
        results = torch.zeros(RESULTS, chunks.count, device=student.device)
        gradient = _gradient(inputs, plan, chunks) if wanted.hidden else None
        tile = _tile(inputs, chunks, student if gradient is None else gradient)
        if inputs.state is not None:
            state = chunks.gather(inputs.state, 1).contiguous()
        elif chunks.count:
            state = low.of_rows(lambda: [tile], chunks.labels, task, group, results)
        else:
            state = results.new_zeros(STATE_ROWS, 0)
        if gradient is not None and chunks.count:
            offset = 0 if group is None else group.offset
            weights = chunks.gather(row_scale).float().contiguous()
            steps.gradient(tile, gradient, chunks.labels, offset, weights, state, task)
        return Rows(chunks.report(results), gradient, None, None, chunks.scatter(state, 1))


def _gradient(inputs: Inputs, plan: Plan, chunks: Chunks) -> Tensor:
    rows, without = len(inputs.row_scale), None
    if chunks.count < rows:
        assert isinstance(chunks.index, Tensor)
        without = eager.ignored_rows(chunks.index, rows)
    return eager.gradient_of(inputs.student_hidden, inputs.vocab_size, plan, without)


def _tile(inputs: Inputs, chunks: Chunks, gradient: Tensor) -> Tile:
    assert inputs.teacher_hidden is not None
    V, tensors = inputs.vocab_size, (inputs.student_hidden, inputs.teacher_hidden, gradient)
    unit = ROW_ALIGNMENT if V % ROW_ALIGNMENT == 0 and all(map(aligned, tensors)) else 1
    starts = torch.stack([chunks.gather(eager.row_starts(x)) for x in tensors]) // unit
    return Tile(slice(0, V), tensors[0], tensors[1], None, None, Places(starts, unit))


def aligned(x: Tensor) -> bool:
    """Whether all rows begin 16 bytes and 16 entries aligned."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return x.data_ptr() % 16 == 0 and all(stride % ROW_ALIGNMENT == 0 for stride in strides)
