"""One kernel on one tile of projections: Triton's, or in float64 PyTorch's; and what a tile and a task are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocl_kernels.divergences import Divergence
from pocl_kernels.plan import Gradients, Plan
from pocl_kernels.scalar import weighted
from pocl_kernels.triton_backend import launch, tile_gradient, tile_statistics, tile_values, tiles_eager
from pocl_kernels.triton_backend.layout import ROW_ALIGNMENT
from pocl_kernels.triton_backend.projection import Projection
from pocl_kernels.triton_backend.terms import function_of, term_of

LIKELY_LOG_SUM = 32.0  # of logits: by its square the z-loss grows, and by twice it a gradient
NO_GRADIENTS = Gradients(False, False, False)


class Transforms(NamedTuple):
    """What turns projections into u = z_s / T and v = z_t / T, as the kernels take it."""

    scale_s: float
    softcap_s: float | None
    scale_t: float
    softcap_t: float | None
    rate: Any  # 1 / T: a number, or [n] of one a row


class Task(NamedTuple):
    """A loss of a row: ``A D + B CE``. Without a divergence the cross-entropy alone."""

    transforms: Transforms
    divergence: Divergence | None
    slope_coefficient: Any  # a number, or [n] of one a row
    ce_weight: float
    uniforms: tuple[Any, ...] = ()  # of the divergence, as its term takes them
    smoothing: float = 0.0  # of the cross-entropy alone; so are the next
    z_loss: float = 0.0
    V: int = 1  # of the whole vocabulary

    @property
    def largest(self) -> Any:
        """About the largest entry that the projection's gradient may have, for a row's weight of 1."""
        A = self.slope_coefficient
        ce = self.ce_weight * (1.0 + 2.0 * self.z_loss * LIKELY_LOG_SUM)
        size = A.abs().clamp_min(ce) if isinstance(A, Tensor) else max(abs(A), ce)
        return size * abs(self.transforms.scale_s)

    @property
    def by_token(self) -> bool:
        """Whether the rows have numbers of their own."""
        return isinstance(self.transforms.rate, Tensor)

    @property
    def term(self) -> Any:
        """The divergence's Triton function; None without one."""
        return None if self.divergence is None else function_of(type(self.divergence), self.by_token)

    def at(self, part: slice) -> Task:
        """The task of some rows. Copies: where their numbers lie must not decide what is compiled."""
        rate = self.transforms.rate
        if not isinstance(rate, Tensor) or self.divergence is None:
            return self
        parameters = [x[part] for x in self.divergence.parameters()]
        return self._replace(
            transforms=self.transforms._replace(rate=rate[part].clone()),
            divergence=self.divergence.from_parameters(parameters),
            slope_coefficient=self.slope_coefficient[part].clone(),
            uniforms=tuple(x[part].clone() if isinstance(x, Tensor) else x for x in self.uniforms),
        )


class Places(NamedTuple):
    """Where the rows of a tile lie that are not rows of a buffer."""

    starts: Tensor  # [3, n] int64: of the student, the teacher and the gradient, in units from the first entry
    unit: int  # entries: 16 where all rows are aligned, so that they are read 128 bits at a time, else 1


class Tile(NamedTuple):
    """Projections of some rows to one range of the vocabulary."""

    columns: slice
    student: Tensor  # [n, width], rows padded
    teacher: Tensor | None
    bias_s: Tensor | None  # from the first column on
    bias_t: Tensor | None
    places: Places | None = None  # None: rows of a buffer, as many entries apart as the student's stride says


def divergence_task(plan: Plan, dtype: torch.dtype = torch.float32) -> Task:
    """The task of ``linear_divergence``, for the rows that the plan is of."""
    assert plan.divergence is not None

    def number(x: Any) -> Any:
        return x.to(dtype).contiguous() if isinstance(x, Tensor) and x.dim() else float(x)

    transforms = Transforms(
        float(plan.student_scale),
        plan.student_softcap,
        float(plan.teacher_scale),
        plan.teacher_softcap,
        number(1.0 / plan.temperature),
    )
    uniforms = term_of(plan.divergence).uniforms
    plan = plan.at(slice(None), dtype)
    return Task(transforms, plan.divergence, number(plan.slope_coefficient), float(plan.ce_weight), uniforms)


def cross_entropy_task(plan: Plan, V: int) -> Task:
    """The task of ``linear_cross_entropy`` over a vocabulary of V."""
    transforms = Transforms(float(plan.student_scale), plan.student_softcap, 1.0, None, 1.0)
    smoothing, z_loss = float(plan.label_smoothing), float(plan.z_loss)
    return Task(transforms, None, 0.0, 1.0, smoothing=smoothing, z_loss=z_loss, V=V)


def tiles(student: Projection, teacher: Projection | None, width: int) -> Iterator[Tile]:
    """Projections of the rows that both have taken, ``width`` columns at a time, in reused buffers."""
    for first in range(0, student.V, width):
        columns = slice(first, min(first + width, student.V))
        yield Tile(
            columns,
            student.project(columns),
            None if teacher is None else teacher.project(columns),
            None if student.bias is None else student.bias[first:],
            None if teacher is None or teacher.bias is None else teacher.bias[first:],
        )


def statistics(
    tile: Tile, labels: Tensor | None, offset: int, task: Task, kl: bool, anchored: bool, sums: Tensor
) -> None:
    """Merge a tile into the sums. ``offset``: token of the projection's first column; ``kl``: E, F and R as well;
    ``anchored``: the anchor too.
    """
    first = offset + tile.columns.start
    if sums.dtype == torch.float64:
        tiles_eager.statistics(*_transformed(tile, task), labels, first, task.transforms.rate, kl, sums)
        return
    n = sums.shape[1]
    tile_statistics.tile_statistics[(n,)](
        tile.student, tile.teacher, tile.bias_s, tile.bias_t, labels, sums, *_shape(tile), n, first, *task.transforms,
        KL=kl, TOP_TOO=anchored, BLOCK=_block(tile, tile_statistics.BLOCK), BY_TOKEN=task.by_token,
        **_places(tile), **launch.on(tile.student.device),
    )  # fmt: skip


def values(tile: Tile, state: Tensor, task: Task, sums: Tensor) -> None:
    """Add a tile's share of the divergence and of the slopes to ``sums``, ``[2, n]``."""
    assert task.divergence is not None
    if sums.dtype == torch.float64:
        zs, zt = _transformed(tile, task)
        assert zt is not None
        tiles_eager.values(zs, zt, state, task.divergence, task.transforms.rate, sums)
        return
    n = sums.shape[1]
    tile_values.tile_values[(n,)](
        tile.student, tile.teacher, tile.bias_s, tile.bias_t, state, sums, *_shape(tile), n, *task.transforms,
        task.uniforms,
        term=task.term, BLOCK=_block(tile, tile_values.BLOCK), BY_TOKEN=task.by_token,
        **_places(tile), **launch.on(tile.student.device),
    )  # fmt: skip


def gradient(
    tile: Tile, out: Tensor, labels: Tensor | None, offset: int, row_scale: Tensor, state: Tensor, task: Task
) -> None:
    """Write the gradient of a tile's projections into ``out``, which may be the tile itself."""
    first, n = offset + tile.columns.start, state.shape[1]
    if state.dtype == torch.float64:
        zs, zt = _transformed(tile, task)
        g = torch.zeros_like(zs)
        if task.divergence is not None and zt is not None:
            slopes = tiles_eager.slopes(zs, zt, state, task.divergence, task.transforms.rate)
            g += weighted(torch.as_tensor(task.slope_coefficient, dtype=torch.float64).to(g).reshape(-1, 1), slopes)
        if labels is not None:
            more = task.smoothing, task.smoothing / task.V, task.z_loss
            g += task.ce_weight * tiles_eager.cross_entropy_gradient(zs, labels, first, state, *more)
        if task.transforms.softcap_s is not None:
            g *= 1.0 - (zs / task.transforms.softcap_s) ** 2
        out.copy_(weighted(row_scale[:, None], g * task.transforms.scale_s))
        return
    tile_gradient.tile_gradient[(n,)](
        tile.student, tile.teacher, out, tile.bias_s, tile.bias_t, labels, row_scale, state, *_shape(tile), n, first,
        *task.transforms, task.slope_coefficient, task.ce_weight, task.uniforms, task.smoothing,
        task.smoothing / task.V, task.z_loss,
        term=task.term, BLOCK=_block(tile, tile_gradient.BLOCK), BY_TOKEN=task.by_token,
        **_places(tile), **launch.on(tile.student.device),
    )  # fmt: skip


def _shape(tile: Tile) -> tuple[int, int]:
    """A kernel's V, and the width of a row in units."""
    V = tile.columns.stop - tile.columns.start
    return V, tile.student.stride(0) // ROW_ALIGNMENT if tile.places is None else V // tile.places.unit


def _places(tile: Tile) -> dict[str, Any]:
    return {} if tile.places is None else {"places": tile.places.starts, "UNIT": tile.places.unit}


def _block(tile: Tile, block: int) -> int:
    if tile.places is None:
        return block
    assert tile.teacher is not None
    return launch.block(block, min(tile.student.itemsize, tile.teacher.itemsize))


def _transformed(tile: Tile, task: Task) -> tuple[Tensor, Tensor | None]:
    scale_s, softcap_s, scale_t, softcap_t, _ = task.transforms
    zs = tiles_eager.transform(tile.student, tile.bias_s, scale_s, softcap_s)
    if tile.teacher is None:
        return zs, None
    return zs, tiles_eager.transform(tile.teacher, tile.bias_t, scale_t, softcap_t)
