"""The memory for a chunk of rows, and their weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pocl_kernels.triton_backend.layout import MIB, Layout, fast_layout
from pocl_kernels.triton_backend.projection import Projection

LEAST_WORKSPACE = 16 * MIB  # below, memory is too short for anything


def scaled_weights(student: Projection, row_scale: Tensor, coefficient: Any) -> Tensor:
    """``row_scale`` as the kernels take it: times the power of two that suits a float16 gradient tile.

    ``coefficient`` is about the largest entry of a gradient for a weight of 1. Waits for the device if the tile is
    float16.
    """
    if student.gradient_dtype == torch.float16 and any(student.wanted) and row_scale.numel():
        student.scale_tile(float((coefficient * row_scale.abs()).max()))
    return (row_scale * student.tile_scale).to(student.dtype).contiguous()


def allocated(projections: Sequence[Projection], rows: int, workspace_mb: float, *, later: bool) -> Layout:
    """The memory of ``memory="fast"``, made; with a warning less of it, if so much is not free."""
    workspace = int(workspace_mb * MIB)
    while True:
        layout = fast_layout(rows, [p.demand for p in projections], workspace, later=later)
        try:
            for projection in projections:
                projection.allocate(layout, rows, later=later)
        except torch.OutOfMemoryError:
            if workspace <= LEAST_WORKSPACE:
                raise
            for projection in projections:
                projection.release()
            workspace //= 2
            continue
        if workspace < int(workspace_mb * MIB):
            warnings.warn(
                f"a workspace of {workspace_mb:,.0f} MiB is more than is free on {projections[0].hidden.device}: "
                f"{workspace / MIB:,.0f} MiB serve, in chunks of {layout.chunk} rows. Pass a smaller workspace_mb",
                RuntimeWarning,
                stacklevel=2,
            )
        return layout


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return nullcontext() if tensor.device.type == "cpu" else torch.cuda.device(tensor.device)
