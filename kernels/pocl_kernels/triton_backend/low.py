"""The Triton backend, ``low``: tiles of rows and vocabulary; scratch depends on neither the rows nor the vocabulary.

The forward pass makes per-row results and a state of six numbers a row; the backward pass takes that state and any
upstream gradient of the rows, makes the logits anew tile by tile, and the gradient from them. With S = 2 N V H_s and
Te = 2 N V H_t flops (valid rows): forward S + Te where the divergence is a weighted KL, else 2 S + 2 Te; backward 3 S
+ Te. Deterministic.

Each step is a function of its own between which a vocabulary-parallel caller may reduce the sums over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pocl_kernels.plan import Gradients, Plan, Rows
from pocl_kernels.triton_backend import state as st
from pocl_kernels.triton_backend import tile_gradient, tile_statistics, tile_values, tiles_eager
from pocl_kernels.triton_backend.chunks import Chunks, on_device, scaled_weights, tile_shape
from pocl_kernels.triton_backend.projection import ROW_ALIGNMENT, Projection
from pocl_kernels.triton_backend.terms import term_of

NO_GRADIENTS = Gradients(False, False, False)


class Setting(NamedTuple):
    """The heads' transforms and the temperature, as the kernels take them."""

    scale_s: float
    softcap_s: float | None
    scale_t: float
    softcap_t: float | None
    rate: float  # 1 / T


class Tile(NamedTuple):
    """Projections of the present rows to one range of the vocabulary."""

    columns: slice
    student: Tensor  # [n, width], rows padded
    teacher: Tensor | None
    bias_s: Tensor | None  # from the first column on
    bias_t: Tensor | None


def divergence_forward(
    student_hidden: Tensor,  # [N, H_s]
    student_weight: Tensor,  # [V_s, H_s]
    student_bias: Tensor | None,
    teacher_hidden: Tensor,  # [N, H_t]
    teacher_weight: Tensor,  # [V_t, H_t]
    teacher_bias: Tensor | None,
    labels: Tensor | None,  # [N]
    plan: Plan,
) -> tuple[Rows, Tensor]:
    """Per-row divergence, cross-entropy and entropy, and the state ``[STATES, N]`` that the backward pass wants."""
    student, teacher = _projections(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, NO_GRADIENTS
    )
    dtype, device, setting = student.dtype, student_hidden.device, _setting(plan)
    weights = plan.divergence.kl_weights
    with on_device(student_hidden):
        chunks = Chunks(labels, student_hidden.shape[0], plan.ignore_index)
        height, width = tile_shape(chunks.count, [student, teacher], plan.workspace_mb)
        results = torch.zeros(3, chunks.count, dtype=dtype, device=device)
        states = torch.zeros(st.STATES, chunks.count, dtype=dtype, device=device)
        for rows, part in chunks.of(height):
            label = None if chunks.labels is None else chunks.labels[part]
            student.take(rows)
            teacher.take(rows)
            sums = st.empty_sums(part.stop - part.start, dtype, device)
            for tile in _tiles(student, teacher, width):
                _statistics(tile, label, setting, weights is not None, sums)
            state = st.state_of(sums)
            if weights is not None:
                D, state[st.SLOPE_SUM.value] = st.weighted_kl(sums, weights)
            else:
                second = torch.zeros(2, sums.shape[1], dtype=dtype, device=device)
                for tile in _tiles(student, teacher, width):
                    _values(tile, state, setting, plan, second)
                D, state[st.SLOPE_SUM.value] = second
            results[0, part], results[2, part] = D, st.entropy(sums)
            if label is not None:
                results[1, part] = st.cross_entropy(sums)
            states[:, part] = state
        D, ce, entropy = chunks.scatter(results, 1)
        return Rows(D, ce, entropy, None, None, None), chunks.scatter(states, 1)


def divergence_backward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor,  # [N]: upstream gradient of each row's loss, token weight and normaliser included
    state: Tensor,  # [STATES, N]
    plan: Plan,
    wanted: Gradients,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``sum row_scale * loss`` for hidden states, weight and bias, in the compute dtype."""
    student, teacher = _projections(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, wanted
    )
    largest = max(abs(plan.slope_coefficient), plan.ce_weight) * abs(plan.student_scale)
    with on_device(student_hidden):
        chunks = Chunks(labels, student_hidden.shape[0], plan.ignore_index)
        return _backward(student, teacher, chunks, row_scale, state, _setting(plan), plan, largest, plan.workspace_mb)


def cross_entropy_forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,
    labels: Tensor,  # [N]
    ignore_index: int,
    scale: float,
    softcap: float | None,
    workspace_mb: float,
) -> tuple[Tensor, Tensor]:
    """Per-row cross-entropy ``[N]`` and the state ``[STATES, N]`` that the backward pass wants."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    student = Projection(hidden, weight, bias, weight.shape[0], dtype, NO_GRADIENTS)
    setting = Setting(float(scale), softcap, 1.0, None, 1.0)
    with on_device(hidden):
        chunks = Chunks(labels, hidden.shape[0], ignore_index)
        height, width = tile_shape(chunks.count, [student], workspace_mb)
        result = torch.zeros(chunks.count, dtype=dtype, device=hidden.device)
        states = torch.zeros(st.STATES, chunks.count, dtype=dtype, device=hidden.device)
        for rows, part in chunks.of(height):
            assert chunks.labels is not None
            student.take(rows)
            sums = st.empty_sums(part.stop - part.start, dtype, hidden.device)
            for tile in _tiles(student, None, width):
                _statistics(tile, chunks.labels[part], setting, False, sums)
            result[part], states[:, part] = st.cross_entropy(sums), st.state_of(sums)
        return chunks.scatter(result), chunks.scatter(states, 1)


def cross_entropy_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_scale: Tensor,
    state: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    workspace_mb: float,
    wanted: Gradients,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``sum row_scale * cross_entropy``."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    student = Projection(hidden, weight, bias, weight.shape[0], dtype, wanted)
    setting = Setting(float(scale), softcap, 1.0, None, 1.0)
    with on_device(hidden):
        chunks = Chunks(labels, hidden.shape[0], ignore_index)
        return _backward(student, None, chunks, row_scale, state, setting, None, abs(scale), workspace_mb)


def _backward(
    student: Projection,
    teacher: Projection | None,
    chunks: Chunks,
    row_scale: Tensor,
    state: Tensor,
    setting: Setting,
    plan: Plan | None,
    largest: float,
    workspace_mb: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    projections = [p for p in (student, teacher) if p is not None]
    height, width = tile_shape(chunks.count, projections, workspace_mb)
    row_scale = scaled_weights(student, chunks.gather(row_scale), largest)
    state = chunks.gather(state, 1)
    for rows, part in chunks.of(height):
        label = None if chunks.labels is None else chunks.labels[part]
        for p in projections:
            p.take(rows)
        here = state[:, part].contiguous()
        for tile in _tiles(student, teacher, width):
            gradient = student.gradient_tile(tile.student)
            assert gradient is not None
            _gradient(tile, gradient, label, row_scale[part], here, setting, plan)
            student.accumulate(tile.columns, gradient)
        student.store(rows)
    return student.gradients()


def _projections(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    wanted: Gradients,
) -> tuple[Projection, Projection]:
    V = min(student_weight.shape[0], teacher_weight.shape[0])
    dtype = torch.promote_types(torch.promote_types(student_hidden.dtype, teacher_hidden.dtype), torch.float32)
    student = Projection(student_hidden, student_weight, student_bias, V, dtype, wanted)
    return student, Projection(teacher_hidden, teacher_weight, teacher_bias, V, dtype, NO_GRADIENTS)


def _setting(plan: Plan) -> Setting:
    return Setting(
        float(plan.student_scale),
        plan.student_softcap,
        float(plan.teacher_scale),
        plan.teacher_softcap,
        1.0 / plan.temperature,
    )


def _tiles(student: Projection, teacher: Projection | None, width: int) -> Iterator[Tile]:
    for first in range(0, student.V, width):
        columns = slice(first, min(first + width, student.V))
        yield Tile(
            columns,
            student.project(columns),
            None if teacher is None else teacher.project(columns),
            None if student.bias is None else student.bias[first:],
            None if teacher is None or teacher.bias is None else teacher.bias[first:],
        )


# --- One kernel on one tile: Triton's, or in float64 PyTorch's ---


def _transformed(tile: Tile, setting: Setting) -> tuple[Tensor, Tensor | None]:
    zs = tiles_eager.transform(tile.student, tile.bias_s, setting.scale_s, setting.softcap_s)
    if tile.teacher is None:
        return zs, None
    return zs, tiles_eager.transform(tile.teacher, tile.bias_t, setting.scale_t, setting.softcap_t)


def _shape(tile: Tile) -> tuple[int, int]:
    """A kernel's V and stride16."""
    return tile.student.shape[1], tile.student.stride(0) // ROW_ALIGNMENT


def _statistics(tile: Tile, labels: Tensor | None, setting: Setting, kl: bool, sums: Tensor) -> None:
    first = tile.columns.start
    if sums.dtype == torch.float64:
        tiles_eager.statistics(*_transformed(tile, setting), labels, first, setting.rate, kl, sums)
        return
    n = sums.shape[1]
    tile_statistics.tile_statistics[(n,)](
        tile.student, tile.teacher, tile.bias_s, tile.bias_t, labels, sums, *_shape(tile), n, first, *setting,
        KL=kl, BLOCK=tile_statistics.BLOCK, num_warps=tile_statistics.WARPS,
    )  # fmt: skip


def _values(tile: Tile, state: Tensor, setting: Setting, plan: Plan, sums: Tensor) -> None:
    if sums.dtype == torch.float64:
        zs, zt = _transformed(tile, setting)
        assert zt is not None
        tiles_eager.values(zs, zt, state, plan.divergence, setting.rate, sums)
        return
    term, n = term_of(plan.divergence), sums.shape[1]
    tile_values.tile_values[(n,)](
        tile.student, tile.teacher, tile.bias_s, tile.bias_t, state, sums, *_shape(tile), n, *setting, term.uniforms,
        term=term.function, BLOCK=tile_values.BLOCK, num_warps=tile_values.WARPS,
    )  # fmt: skip


def _gradient(
    tile: Tile,
    gradient: Tensor,
    labels: Tensor | None,
    row_scale: Tensor,
    state: Tensor,
    setting: Setting,
    plan: Plan | None,  # None: cross-entropy alone
) -> None:
    first, n = tile.columns.start, state.shape[1]
    slope_coefficient, ce_weight = (0.0, 1.0) if plan is None else (plan.slope_coefficient, plan.ce_weight)
    if state.dtype == torch.float64:
        zs, zt = _transformed(tile, setting)
        g = torch.zeros_like(zs)
        if plan is not None and zt is not None:
            g += slope_coefficient * tiles_eager.slopes(zs, zt, state, plan.divergence, setting.rate)
        if labels is not None:
            g += ce_weight * tiles_eager.cross_entropy_gradient(zs, labels, first, state)
        if setting.softcap_s is not None:
            g *= 1.0 - (zs / setting.softcap_s) ** 2
        gradient.copy_(g * (row_scale * setting.scale_s)[:, None])
        return
    function, uniforms = (None, ()) if plan is None else term_of(plan.divergence)
    tile_gradient.tile_gradient[(n,)](
        tile.student, tile.teacher, gradient, tile.bias_s, tile.bias_t, labels, row_scale, state, *_shape(tile), n,
        first, *setting, float(slope_coefficient), float(ce_weight), uniforms,
        term=function, BLOCK=tile_gradient.BLOCK, num_warps=tile_gradient.WARPS,
    )  # fmt: skip
