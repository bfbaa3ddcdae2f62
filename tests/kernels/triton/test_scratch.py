"""Scratch memory of both modes, planned and measured: bounded by the workspace, in "low" whatever N and V are."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from pocl_kernels import JSD
from pocl_kernels.plan import Gradients, Inputs, Plan
from pocl_kernels.triton_backend import backend, steps
from pocl_kernels.triton_backend.layout import (
    WHOLE_BLOCKS,
    WHOLE_TILES,
    Demand,
    Layout,
    demand,
    factor_dtypes,
    fast_layout,
    padded,
    slice_rows,
    tile_shape,
)

MIB = 2**20
ALL, NONE = Gradients(True, True, True), Gradients(False, False, False)


SIZES = (896, 1536)


def demands(
    vocab: int, dtype: torch.dtype, wanted: Gradients = ALL, products: torch.dtype | None = None
) -> list[Demand]:
    factors = factor_dtypes(dtype, dtype, torch.float32, products, True)
    return [
        demand(H, vocab, dtype, torch.float32, factors, w, False) for H, w in zip(SIZES, (wanted, NONE), strict=True)
    ]


def scratch(layout: Layout, vocab: int, dtype: torch.dtype, rows: int) -> int:
    """Bytes of both models' logits of a chunk, the gradients of a group, and what comes with their rows, by hand."""
    total = 2 * layout.chunk * padded(vocab) * 4 + layout.chunk * sum(SIZES) * (2 + 4 + 4)
    if dtype != torch.float32:
        total += layout.group * (padded(vocab) * 2 + SIZES[0] * 2)
        total += SIZES[0] * 2 * (vocab if layout.whole_heads else slice_rows(vocab, SIZES[0], 2))  # the head in float16
    return total


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [512, 1024, 4096, 8192])
@pytest.mark.parametrize("vocab", [32000, 50257, 151936])
def test_planned_scratch_stays_within_the_workspace(vocab: int, rows: int, dtype: torch.dtype, later: bool) -> None:
    both = demands(vocab, dtype)
    for workspace_mb in (96, 256, 1024, 4096):
        layout = fast_layout(rows, both, workspace_mb * MIB, later=later)
        assert 1 <= layout.chunk <= layout.group <= rows
        # A float32 gradient of the head that need not be made leaves its memory to the tiles.
        spare = 4 * vocab * SIZES[0] if later and dtype != torch.float32 and layout.group == rows else 0
        assert scratch(layout, vocab, dtype, rows) <= workspace_mb * MIB + spare
        height, width = tile_shape(rows, both, workspace_mb * MIB)
        tile = height * (padded(width) * (8 if dtype == torch.float32 else 10) + sum(SIZES) * 10)
        assert tile <= workspace_mb * MIB
        assert 1 <= height <= rows
        assert width == vocab or width % (WHOLE_BLOCKS if width > WHOLE_BLOCKS else WHOLE_TILES) == 0


def test_all_rows_are_one_group_where_their_tiles_have_room() -> None:
    both = demands(128_256, torch.bfloat16)
    assert fast_layout(8192, both, 4096 * MIB, later=True).group == 8192
    less = fast_layout(8192, both, 1024 * MIB, later=True)
    assert less.chunk < less.group < 8192
    assert less.held >= less.group
    # Without a gradient of the weight tiles are kept for nobody.
    frozen = fast_layout(8192, demands(128_256, torch.bfloat16, Gradients(True, False, False)), 1024 * MIB, later=True)
    assert frozen.chunk == frozen.group > less.chunk


def test_a_head_is_converted_once_where_a_quarter_of_the_workspace_holds_it() -> None:
    both = demands(32_000, torch.bfloat16)
    (head,) = (d.head for d in both if d.head)  # the student's, for the gradient; the teacher's stays as it is
    assert head == 32_000 * SIZES[0] * 2
    assert fast_layout(4096, both, 4 * head, later=True).whole_heads
    assert not fast_layout(4096, both, 4 * head - 1, later=True).whole_heads
    assert not fast_layout(4096, demands(32_000, torch.float32), 2**33, later=True).whole_heads


def test_tiles_are_as_square_as_the_workspace_allows() -> None:
    both = demands(151936, torch.bfloat16)
    height, width = tile_shape(8192, both, 512 * MIB)
    assert 0.4 <= height / width <= 2.5
    # Few rows: wide tiles instead.
    height, width = tile_shape(256, both, 512 * MIB)
    assert height == 256
    assert width > 20000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_are_whole_tiles_of_a_matrix_product_where_they_can_be(dtype: torch.dtype) -> None:
    both = demands(128_256, dtype)
    for workspace_mb in (256, 300, 1000, 4096):
        layout = fast_layout(8000, both, workspace_mb * MIB, later=False)
        assert layout.chunk % WHOLE_TILES == 0
        assert layout.group % WHOLE_TILES == 0 or layout.group == 8000
    assert fast_layout(100, both, 256 * MIB, later=False).chunk == 100
    assert fast_layout(0, both, 256 * MIB, later=False).chunk == 1
    assert fast_layout(4096, both, 1000, later=False).chunk == 1


@pytest.mark.parametrize("hidden", [576, 1280, 2304, 2560, 3072, 3584, 200_000])
def test_slices_of_a_converted_head_leave_the_gradients_tile_aligned(hidden: int) -> None:
    assert slice_rows(151_936, hidden, 2) % WHOLE_TILES == 0


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_measured_scratch_does_not_grow_with_the_rows(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is measured are the buffers and the products: the kernels allocate nothing, and would take hours here.
    for name in ("statistics", "values", "gradient"):
        monkeypatch.setattr(steps, name, lambda *_: None)
    monkeypatch.setattr(backend, "_divergence", lambda *_: None)
    vocab, workspace_mb = 151936, 96.0
    weights = [torch.randn(vocab, 4) for _ in range(2)]
    plan = Plan(JSD(), 2.0, 4.0, 0.0, -100, 1.0, None, 1.0, None, workspace_mb, memory=memory)
    used = []
    for rows in (512, 512, 1536):  # the first warms up
        hidden = [torch.randn(rows, 4) for _ in range(2)]
        inputs = Inputs(hidden[0], weights[0], None, hidden[1], weights[1], None, None, torch.ones(rows))
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        result = backend.linear_divergence(inputs, plan, Gradients(True, True, False))
        kept = sum(x.nbytes for x in result if x is not None)
        used.append((status("VmHWM") - before - kept) / MIB)
        del result
    assert max(used[1:]) <= workspace_mb + 8, used
    assert used[2] - used[1] <= 0.1 * workspace_mb, used
