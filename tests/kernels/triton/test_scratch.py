"""Scratch memory of both modes, planned and measured: bounded by the workspace, in "low" whatever N and V are."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from pocl_kernels import JSD
from pocl_kernels.plan import Gradients, Inputs, Plan
from pocl_kernels.triton_backend import backend, gemm, steps
from pocl_kernels.triton_backend.chunks import WHOLE_TILES, chunk_rows, tile_shape
from pocl_kernels.triton_backend.projection import Projection, padded

MIB = 2**20
ALL, NONE = Gradients(True, True, True), Gradients(False, False, False)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "takes_16_bit", lambda *_: True)


def projections(
    rows: int, vocab: int, sizes: tuple[int, int], dtype: torch.dtype, wanted: Gradients
) -> list[Projection]:
    """Without memory of their own: only shapes and dtypes are asked for."""
    return [
        Projection(
            torch.empty(rows, size, dtype=dtype, device="meta"), torch.empty(vocab, size, dtype=dtype, device="meta"),
            None, vocab, torch.float32, want,
        )
        for size, want in zip(sizes, (wanted, NONE), strict=True)
    ]  # fmt: skip


def scratch(pair: list[Projection], height: int, width: int) -> int:
    """Bytes of a tile of both models, its gradient, and what comes with its rows, by hand."""
    total = 0
    for p in pair:
        total += p.bytes_fixed + height * padded(width) * 4
        if any(p.wanted) and p.gradient_dtype == torch.float16:
            total += height * padded(width) * 2
        total += height * p.hidden.shape[1] * (2 + 4 + 4)  # hidden states in two dtypes and their gradient
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [512, 1024, 4096, 8192])
@pytest.mark.parametrize("vocab", [32000, 50257, 151936])
def test_planned_scratch_stays_within_the_workspace(vocab: int, rows: int, dtype: torch.dtype) -> None:
    pair = projections(rows, vocab, (896, 1536), dtype, ALL)
    for workspace_mb in (96.0, 256.0, 1024.0):
        chunk = chunk_rows(rows, pair, workspace_mb)
        assert 1 <= chunk <= rows
        assert scratch(pair, chunk, vocab) <= workspace_mb * MIB
        height, width = tile_shape(rows, pair, workspace_mb)
        assert scratch(pair, height, width) <= workspace_mb * MIB
        assert 1 <= height <= rows
        assert width == vocab or width % WHOLE_TILES == 0


def test_tiles_are_as_square_as_the_workspace_allows() -> None:
    pair = projections(8192, 151936, (896, 1536), torch.bfloat16, ALL)
    height, width = tile_shape(8192, pair, 512.0)
    assert 0.4 <= height / width <= 2.5
    # Few rows: wide tiles instead.
    height, width = tile_shape(256, pair, 512.0)
    assert height == 256
    assert width > 20000


def test_chunks_are_whole_tiles_of_a_matrix_product_where_they_can_be() -> None:
    pair = projections(4096, 32000, (896, 1536), torch.float32, ALL)
    assert chunk_rows(4096, pair, 256.0) % WHOLE_TILES == 0
    assert chunk_rows(100, pair, 256.0) == 100
    assert chunk_rows(0, pair, 256.0) == 1
    assert chunk_rows(4096, pair, 0.001) == 1


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
    assert abs(used[2] - used[1]) <= 0.1 * workspace_mb, used
