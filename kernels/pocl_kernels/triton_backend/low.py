"""Tiles of rows and vocabulary: ``memory="low"``, and any mode where processes share the vocabulary.

``forward`` makes per-row results and a state of six numbers a row; ``backward`` takes that state and any upstream
gradient of the rows, makes the logits anew tile by tile, and the gradient from them. With S = 2 N V H_s and Te = 2 N
V H_t flops (valid rows): forward S + Te where the divergence is a weighted KL, else 2 S + 2 Te; backward 3 S + Te.
Scratch depends on neither N nor V. Deterministic: every sum has one order.

``at_once`` does both on logits that are made once, for the whole of this process's share of the vocabulary: 3 S + Te.

What processes exchange: each row's sums, then ``(D, c)``, and the hidden states' gradient; logits never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from pocl_kernels.chunks import Chunks, Rows
from pocl_kernels.parallel import VocabularyGroup
from pocl_kernels.plan import (
    ACCURACY,
    CROSS_ENTROPY,
    DIVERGENCE,
    ENTROPY,
    LOG_SUM_EXP,
    LOSS,
    RESULTS,
    TEACHER_ENTROPY,
)
from pocl_kernels.triton_backend import state as st
from pocl_kernels.triton_backend import steps
from pocl_kernels.triton_backend.chunks import scaled_weights
from pocl_kernels.triton_backend.layout import MAX_CHUNK_ROWS, MIB, evened, padded, tile_shape
from pocl_kernels.triton_backend.projection import Grads, Projection
from pocl_kernels.triton_backend.steps import Task, Tile
from pocl_kernels.triton_backend.terms import program_of


def forward(
    student: Projection,
    teacher: Projection | None,
    chunks: Chunks,
    task: Task,
    workspace_mb: float,
    group: VocabularyGroup | None,
) -> tuple[Tensor, Tensor]:
    """Results of the valid rows ``[RESULTS, n]``, and their state ``[STATES, n]``."""
    height, width = shape(student, teacher, chunks, workspace_mb, group)
    results = torch.zeros(RESULTS, chunks.count, dtype=student.dtype, device=student.hidden.device)
    states = results.new_zeros(st.STATES, chunks.count)
    whole = task
    for rows, part in chunks.of(height):
        labels = None if chunks.labels is None else chunks.labels[part]
        _take(student, teacher, rows)
        tiles = partial(steps.tiles, student, teacher, width)
        states[:, part] = of_rows(tiles, labels, whole.at(part), group, results[:, part])
    return results, states


def of_rows(
    tiles: Callable[[], Iterable[Tile]],
    labels: Tensor | None,
    task: Task,
    group: VocabularyGroup | None,
    results: Tensor,  # [RESULTS, n] zeros
) -> Tensor:
    """Write the results of some rows, whose tiles can be had more than once; returns their state ``[STATES, n]``."""
    anchored = _anchored(task)
    one_pass = task.divergence is not None and task.divergence.kl_weights is not None
    sums = st.empty_sums(results.shape[1], results.dtype, results.device)
    for tile in tiles():
        steps.statistics(tile, labels, _offset(group), task, one_pass, anchored, sums)
    if group is not None:
        st.over_processes(sums, group, task.transforms.rate)
    state = st.state_of(sums)
    if task.divergence is not None:
        if task.divergence.kl_weights is not None:
            D, c = st.weighted_kl(sums, task.divergence.kl_weights)
            if anchored:
                c -= st.slope_at_anchor(sums, task.transforms.rate, task.divergence.kl_weights)
        else:
            D, c = _second_pass(tiles(), state, task, group)
        results[DIVERGENCE], state[st.SLOPE_SUM.value] = D, c
    _report(sums, labels, task, results)
    return state


def _report(sums: Tensor, labels: Tensor | None, task: Task, results: Tensor) -> None:
    """Write what the sums over the whole vocabulary amount to, all but the divergence."""
    if task.divergence is not None:
        results[ENTROPY : TEACHER_ENTROPY + 1] = st.entropies(sums)
    else:
        results[LOSS] = st.smoothed_loss(sums, task.smoothing, task.z_loss, task.V)
        results[LOG_SUM_EXP] = st.log_sum_exp(sums)
    if labels is not None:
        results[CROSS_ENTROPY] = st.cross_entropy(sums)
        results[ACCURACY] = st.accuracy(sums)


def backward(
    student: Projection,
    teacher: Projection | None,
    chunks: Chunks,
    row_scale: Tensor,  # [n], of the valid rows
    states: Tensor,  # [STATES, n]
    task: Task,
    workspace_mb: float,
    group: VocabularyGroup | None,
) -> Grads:
    """Gradients of ``sum row_scale * loss``."""
    height, width = shape(student, teacher, chunks, workspace_mb, group)
    weights = scaled_weights(student, row_scale, task.largest)
    whole = task
    for rows, part in chunks.of(height):
        task = whole.at(part)
        labels = None if chunks.labels is None else chunks.labels[part]
        _take(student, teacher, rows)
        state = states[:, part].contiguous()
        for tile in steps.tiles(student, teacher, width):
            _accumulate(student, tile, labels, weights[part], state, task, group)
        student.store(rows)
    return over(student, group)


def at_once(
    student: Projection,
    teacher: Projection | None,
    chunks: Chunks,
    row_scale: Tensor,
    task: Task,
    workspace_mb: float,
    group: VocabularyGroup,
) -> tuple[Tensor, Grads]:
    """Results of the valid rows ``[RESULTS, n]`` and the gradients, from logits that are made once."""
    weights = scaled_weights(student, row_scale, task.largest)
    results = torch.zeros(RESULTS, chunks.count, dtype=student.dtype, device=student.hidden.device)
    whole = task
    size = agreed(whole_rows(student, teacher, chunks.count, workspace_mb), group, results.device)
    for rows, part in chunks.of(size):
        task = whole.at(part)
        labels = None if chunks.labels is None else chunks.labels[part]
        _take(student, teacher, rows)
        (tile,) = steps.tiles(student, teacher, student.V)
        sums = st.empty_sums(part.stop - part.start, student.dtype, results.device)
        steps.statistics(tile, labels, group.offset, task, False, _anchored(task), sums)
        st.over_processes(sums, group, task.transforms.rate)
        state = st.state_of(sums)
        if task.divergence is not None:
            results[DIVERGENCE, part], state[st.SLOPE_SUM.value] = _second_pass([tile], state, task, group)
        _report(sums, labels, task, results[:, part])
        if any(student.wanted):
            _accumulate(student, tile, labels, weights[part], state, task, group)
            student.store(rows)
    return results, over(student, group)


def check_labels(labels: Tensor, V: int, group: VocabularyGroup) -> None:
    """Every label must lie in the share of one process, or the device raises."""
    inside = (labels >= group.offset) & (labels < group.offset + V)
    owners = group.sum(inside.to(torch.int32))
    torch._assert_async((owners == 1).all(), "labels contain one that no process's share of the vocabulary holds")


def _second_pass(
    tiles: Iterable[Tile], state: Tensor, task: Task, group: VocabularyGroup | None
) -> tuple[Tensor, Tensor]:
    """D and the sum of the slopes of each row, once both normalisers are known."""
    sums = torch.zeros(2, state.shape[1], dtype=state.dtype, device=state.device)
    for tile in tiles:
        steps.values(tile, state, task, sums)
    if group is not None:
        group.sum(sums)
    return sums[st.VALUE.value], sums[st.SLOPE.value]


def _accumulate(
    student: Projection,
    tile: Tile,
    labels: Tensor | None,
    row_scale: Tensor,
    state: Tensor,
    task: Task,
    group: VocabularyGroup | None,
) -> None:
    gradient = student.gradient_tile(tile.student)
    assert gradient is not None
    steps.gradient(tile, gradient, labels, _offset(group), row_scale, state, task)
    student.accumulate(tile.columns, gradient)


def over(student: Projection, group: VocabularyGroup | None) -> Grads:
    """The gradients; that of the hidden states is a sum over the processes."""
    if group is not None and student.grad_hidden is not None:
        group.sum(student.grad_hidden)
    return student.gradients()


def _take(student: Projection, teacher: Projection | None, rows: Rows) -> None:
    student.take(rows)
    if teacher is not None:
        teacher.take(rows)


def _anchored(task: Task) -> bool:
    return task.divergence is not None and program_of(type(task.divergence)).anchored


def _offset(group: VocabularyGroup | None) -> int:
    return 0 if group is None else group.offset


def shape(
    student: Projection,
    teacher: Projection | None,
    chunks: Chunks,
    workspace_mb: float,
    group: VocabularyGroup | None,
) -> tuple[int, int]:
    projections = [student] if teacher is None else [student, teacher]
    height, width = tile_shape(chunks.count, [p.demand for p in projections], int(workspace_mb * MIB))
    return agreed(height, group, student.hidden.device), width


def whole_rows(student: Projection, teacher: Projection | None, rows: int, workspace_mb: float) -> int:
    """Rows of a chunk with this process's whole share of the vocabulary, gradients beside it."""
    demands = [p.demand for p in (student, teacher) if p is not None]
    free = int(workspace_mb * MIB) - sum(d.fixed for d in demands)
    most = free // sum(padded(d.V) * (d.entry + d.kept) + d.row + d.kept_row for d in demands)
    return evened(rows, max(1, min(most, 4 * MAX_CHUNK_ROWS)))


def agreed(rows: int, group: VocabularyGroup | None, device: torch.device) -> int:
    """Processes wait for each other at every chunk of rows: they must chunk alike even if their shares differ."""
    return rows if group is None else -int(group.maximum(torch.tensor([-rows], device=device)))
