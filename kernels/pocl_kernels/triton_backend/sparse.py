"""The Triton backend of sparse teachers: two kernels a tile, and between them what concerns K numbers a row.

With S = 2 N V H_s flops (valid rows): ``memory="fast"`` 3 S on logits that are made once, in a cross-entropy's chunks
and groups; ``low`` S forward (2 S where every token of the tail has a slope of its own), 3 S backward, tile by tile,
from a state of some numbers a row and the K tokens' gradients. float64 goes through the eager rows in chunks.

What processes that share the vocabulary exchange: the K tokens' logits, the tail's sums, the hidden states' gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocl_kernels.chunks import Chunks
from pocl_kernels.eager import sparse as eager
from pocl_kernels.eager.rows import through_transform
from pocl_kernels.parallel import VocabularyGroup
from pocl_kernels.plan import RESULTS, SPARSE_STATES, Gradients, Inputs, Plan, Rows
from pocl_kernels.targets import PADDING, Targets, targets_of
from pocl_kernels.triton_backend import (
    launch,
    low,
    sparse_device,
    sparse_gradient,
    sparse_statistics,
    sparse_values,
    steps,
)
from pocl_kernels.triton_backend.chunks import allocated, on_device, scaled_weights
from pocl_kernels.triton_backend.layout import ROW_ALIGNMENT
from pocl_kernels.triton_backend.projection import Grads, Projection
from pocl_kernels.triton_backend.state import SLOPE, VALUE
from pocl_kernels.triton_backend.steps import Task, Tile
from pocl_kernels.triton_backend.terms import slope_sum


def linear_sparse(inputs: Inputs, plan: Plan, wanted: Gradients) -> Rows:
    """Per-row results and the gradients of ``sum row_scale * loss`` (see :class:`Rows`); low returns and takes a state,
    ``[SPARSE_STATES + K, N]``.
    """
    V, dtype, hidden = plan.vocab_size or inputs.vocab_size, inputs.dtype, inputs.student_hidden
    assert inputs.student_weight is not None
    assert inputs.token_ids is not None
    with on_device(hidden):
        group = VocabularyGroup(plan.process_group, V, hidden.device) if plan.process_group else None
        student = Projection(hidden, inputs.student_weight, inputs.student_bias, V, dtype, wanted, plan.products)
        chunks = Chunks(inputs.labels, inputs.row_scale, plan.ignore_index)
        if group is not None and chunks.labels is not None:
            low.check_labels(chunks.labels, V, group)
        plan = plan.at(chunks.index)
        targets = targets_of(inputs, plan, chunks.index, V if group is None else group.total)
        job = _Job(student, chunks, targets, plan, steps.divergence_task(plan, dtype), group)
        row_scale = chunks.gather(inputs.row_scale)
        K = inputs.token_ids.shape[1]
        if dtype == torch.float64 or plan.memory == "fast":
            results, gradients = job.at_once(row_scale)
            state = results.new_zeros(SPARSE_STATES + K, len(inputs.row_scale)) if plan.memory == "low" else None
            return Rows(chunks.report(results), *gradients, state)
        if inputs.state is not None:
            results, state = torch.zeros(RESULTS, chunks.count, device=hidden.device), chunks.gather(inputs.state, 1)
        else:
            results, state = job.forward()
        gradients = job.backward(row_scale, state) if any(wanted) else (None, None, None)
        return Rows(chunks.report(results), *gradients, chunks.scatter(state, 1))


class _Part(NamedTuple):
    """Some rows."""

    targets: Targets
    labels: Tensor | None
    plan: Plan  # numbers one a token are columns
    task: Task


@dataclasses.dataclass(frozen=True)
class _Job:
    student: Projection
    chunks: Chunks
    targets: Targets
    plan: Plan  # of the rows that count
    task: Task
    group: VocabularyGroup | None

    def part(self, part: slice) -> _Part:
        labels = None if self.chunks.labels is None else self.chunks.labels[part]
        return _Part(self.targets.at(part), labels, self.plan.at((part, None)), self.task.at(part))

    # --- Whole rows of logits, made once ------------------------------------------------------------------------------

    def at_once(self, row_scale: Tensor) -> tuple[Tensor, Grads]:
        """Results of the valid rows ``[RESULTS, n]`` and the gradients."""
        student, chunks = self.student, self.chunks
        weights = scaled_weights(student, row_scale, self.task.largest)
        results = torch.zeros(RESULTS, chunks.count, dtype=student.dtype, device=student.hidden.device)
        if self.group is None:
            layout = allocated([student], chunks.count, self.plan.workspace_mb, later=self.plan.later)
            for group, among in chunks.of(layout.group):
                student.begin(group)
                for rows, part in chunks.of(layout.chunk, among):
                    self._whole(rows, part, weights[part], results[:, part])
                student.end()
            return results, student.gradients()
        size = low.whole_rows(student, None, chunks.count, self.plan.workspace_mb)
        for rows, part in chunks.of(low.agreed(size, self.group, results.device)):
            self._whole(rows, part, weights[part], results[:, part])
        return results, low.over(student, self.group)

    def _whole(self, rows: Any, part: slice, weights: Tensor, results: Tensor) -> None:
        student, some = self.student, self.part(part)
        student.take(rows)
        (tile,) = steps.tiles(student, None, student.V)
        gradient = student.gradient_tile(tile.student)
        if student.dtype == torch.float64:
            out = torch.zeros(results.shape[1], RESULTS, dtype=student.dtype, device=results.device)
            bias = None if tile.bias_s is None else tile.bias_s[: student.V]
            plan = self.plan.at(part)
            eager.sparse_rows(
                tile.student, bias, some.targets, some.labels, weights, plan, gradient is not None, out, self.group
            )
            results.copy_(out.T)
        else:
            state, top = self._state(lambda: [tile], some, results)
            if gradient is not None:
                _gradient(tile, gradient, some, self.offset, weights, state, top)
        if gradient is not None:
            student.accumulate(tile.columns, gradient)
            student.store(rows)

    # --- Tiles, made anew ---------------------------------------------------------------------------------------------

    def forward(self) -> tuple[Tensor, Tensor]:
        """Results of the valid rows ``[RESULTS, n]``, and their state."""
        student, chunks = self.student, self.chunks
        height, width = self._shape()
        K, device = self.targets.ids.shape[1], student.hidden.device
        results = torch.zeros(RESULTS, chunks.count, dtype=student.dtype, device=device)
        states = results.new_zeros(SPARSE_STATES + K, chunks.count)
        for rows, part in chunks.of(height):
            student.take(rows)
            tiles = partial(steps.tiles, student, None, width)
            state, top = self._state(tiles, self.part(part), results[:, part])
            states[:SPARSE_STATES, part], states[SPARSE_STATES:, part] = state, top.T
        return results, states

    def backward(self, row_scale: Tensor, states: Tensor) -> Grads:
        """Gradients of ``sum row_scale * loss``."""
        student = self.student
        height, width = self._shape()
        weights = scaled_weights(student, row_scale, self.task.largest)
        for rows, part in self.chunks.of(height):
            some = self.part(part)
            student.take(rows)
            state, top = states[:SPARSE_STATES, part].contiguous(), states[SPARSE_STATES:, part].T.contiguous()
            for tile in steps.tiles(student, None, width):
                gradient = student.gradient_tile(tile.student)
                assert gradient is not None
                _gradient(tile, gradient, some, self.offset, weights[part], state, top)
                student.accumulate(tile.columns, gradient)
            student.store(rows)
        return low.over(student, self.group)

    def _shape(self) -> tuple[int, int]:
        return low.shape(self.student, None, self.chunks, self.plan.workspace_mb, self.group)

    @property
    def offset(self) -> int:
        return 0 if self.group is None else self.group.offset

    def _state(self, tiles: Callable[[], Iterable[Tile]], some: _Part, results: Tensor) -> tuple[Tensor, Tensor]:
        """Write the results of some rows, whose tiles can be had more than once; returns their state ``[STATES, n]``
        and the gradients by the projections of the K tokens ``[n, K]``, for weights of 1.
        """
        targets, plan = some.targets, some.plan
        assert plan.divergence is not None
        top, sums = torch.zeros_like(targets.ids, dtype=torch.float32), _no_sums(len(targets.ids), results.device)
        for tile in tiles():
            _statistics(tile, some, self.offset, top, sums)
        top, sums = top.double(), sums.double()
        if self.group is not None:
            _over_processes(top, sums, self.group, 1.0 / plan.temperature)
        mass = _mass_of(sums)
        z_label = None if some.labels is None else sums[sparse_device.LABEL.value]
        student = eager.student_of(torch.where(targets.ids == PADDING, -torch.inf, top), mass, targets, plan)
        state = torch.zeros(SPARSE_STATES, len(top), dtype=torch.float64, device=top.device)
        state[sparse_device.MAX.value] = mass.largest
        of_tail = None
        if targets.each:
            l0, r0 = (x.squeeze(1) for x in student.anchor)
            l, r = student.l_largest, targets.log_probs[:, -1]
            rows = (l, l.exp(), r, r.exp(), l0, r0, l0 - r0)
            state[sparse_device.L_TOP.value : sparse_device.SLOPES.value] = torch.stack(rows)
            of_tail = torch.zeros(2, len(top), device=top.device)
            of_rows = state.float()
            for tile in tiles():
                _values(tile, some, self.offset, of_rows, of_tail)
            of_tail = of_tail.double()
            if self.group is not None:
                self.group.sum(of_tail)
            of_tail = of_tail[[VALUE.value, SLOPE.value]]
        known = slope_sum(plan.divergence) if targets.each else None
        outcomes = eager.outcomes_of(student, mass, targets, plan, some.labels, z_label, of_tail, known)
        results.copy_(outcomes.results.T)
        state[sparse_device.TAIL.value] = outcomes.tail
        state[sparse_device.BY_LABEL.value] = outcomes.label
        state[sparse_device.SLOPES.value] = outcomes.slopes
        of_top = outcomes.top.clone()
        through_transform(of_top, top, plan.student_scale, plan.student_softcap)
        return state.float(), of_top.float().contiguous()


def _no_sums(rows: int, device: torch.device) -> Tensor:
    sums = torch.zeros(sparse_device.SUMS, rows, device=device)
    sums[sparse_device.MAX.value] = -torch.inf
    return sums


def _mass_of(sums: Tensor) -> eager.Mass:
    largest, total, total_1, spread = sums[: sparse_device.LABEL.value]
    return eager.Mass(largest, total, total_1, torch.where(total > 0, total.log() - spread / total, 0.0))


def _over_processes(top: Tensor, sums: Tensor, group: VocabularyGroup, rate: Any) -> None:
    """From the K logits and sums of this process's share of the vocabulary, in place, those of all of it."""
    largest, total, total_1, spread, label = sums
    new = group.maximum(largest.clone())
    fall = torch.where(largest == -torch.inf, 0.0, largest - new)
    rate = rate.squeeze(1) if isinstance(rate, Tensor) and rate.dim() else rate
    u = fall * rate
    moved = torch.stack([total * u.exp(), total_1 * fall.exp(), u.exp() * (spread + u * total), label])
    sums[sparse_device.MAX.value] = new
    sums[sparse_device.SUM.value :] = group.sum(moved)
    group.sum(top)


# --- Launches ---------------------------------------------------------------------------------------------------------


def _shape_of(tile: Tile, rows: int, first: int, K: int) -> tuple[int, int, int, int, int]:
    """A kernel's V, the width of a row in units, rows, the first token and K."""
    V = tile.columns.stop - tile.columns.start
    return V, tile.student.stride(0) // ROW_ALIGNMENT, rows, first + tile.columns.start, K


def _statistics(tile: Tile, some: _Part, first: int, top: Tensor, sums: Tensor) -> None:
    (n, K), task = top.shape, some.task
    scale, softcap, *_, rate = task.transforms
    sparse_statistics.sparse_statistics[(n,)](
        tile.student, tile.bias_s, some.targets.ids, top, some.labels, sums, *_shape_of(tile, n, first, K), scale,
        softcap, rate, BLOCK=sparse_statistics.BLOCK, K_BLOCK=sparse_device.K_BLOCK, BY_TOKEN=task.by_token,
        **launch.on(tile.student.device),
    )  # fmt: skip


def _values(tile: Tile, some: _Part, first: int, state: Tensor, sums: Tensor) -> None:
    (n, K), task = some.targets.ids.shape, some.task
    scale, softcap, *_, rate = task.transforms
    sparse_values.sparse_values[(n,)](
        tile.student, tile.bias_s, some.targets.ids, state, sums, *_shape_of(tile, n, first, K), scale, softcap, rate,
        task.uniforms, term=task.term, BLOCK=sparse_values.BLOCK, K_BLOCK=sparse_device.K_BLOCK,
        BY_TOKEN=task.by_token, **launch.on(tile.student.device),
    )  # fmt: skip


def _gradient(tile: Tile, out: Tensor, some: _Part, first: int, row_scale: Tensor, state: Tensor, top: Tensor) -> None:
    """Write the gradient of a tile's projections into ``out``, which may be the tile itself."""
    (n, K), task, each = top.shape, some.task, some.targets.each
    scale, softcap, *_, rate = task.transforms
    sparse_gradient.sparse_gradient[(n,)](
        tile.student, out, tile.bias_s, some.targets.ids, top, some.labels, row_scale, state,
        *_shape_of(tile, n, first, K), scale, softcap, rate, task.slope_coefficient, task.ce_weight,
        task.uniforms if each else (), term=task.term if each else None, BLOCK=sparse_gradient.BLOCK,
        K_BLOCK=sparse_device.K_BLOCK, BY_TOKEN=task.by_token, **launch.on(tile.student.device),
    )  # fmt: skip
