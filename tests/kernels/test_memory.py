"""Scratch memory: what a loss allocates at its peak beyond inputs and gradients is bounded by ``workspace_mb``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from pocl_kernels.cpu import backend
from tests.kernels.cases import make_case

MIB = 2**20


def peak_mib(run: Callable[[], object]) -> float:
    """Peak of what torch's CPU allocator hands out during ``run``, from the profiler's record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    changes, waiting = [], list(recorded.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = peak = 0
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak / MIB


def scratch_mib(engine: Any, rows: int, workspace_mb: float | None, dtype: torch.dtype = torch.float32) -> float:
    """Peak beyond the gradients, which are float32 until the upstream gradient is known, then of the inputs' dtype."""
    vocab, size = 20_000, 8
    case = make_case(rows, vocab, hidden=(size, size), dtype=dtype)
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_head.weight.clone().requires_grad_()

    def run() -> None:
        out = engine(
            hidden, weight, case.teacher_hidden, case.teacher_head, labels=case.labels, ce_weight=0.3, divergence="jsd",
            workspace_mb=workspace_mb,
        )  # fmt: skip
        out.loss.backward()

    peak = peak_mib(run)
    return peak - (vocab + rows) * size * (4 + (dtype.itemsize if dtype != torch.float32 else 0)) / MIB


def allowed_mib(engine: Any, workspace_mb: float) -> float:
    # Two numbers a row and one row of the head's statistics are not counted; the eager path's temporaries are a dozen
    # sub-blocks of four MiB.
    return workspace_mb + 0.3 + (0 if engine.compiled else 60)


@pytest.fixture
def measured(engine: Any) -> Any:
    if engine.name.startswith("triton"):
        pytest.skip("the interpreter's own copies are counted as well")
    return engine


@pytest.mark.parametrize("workspace_mb", [2, 24])
def test_scratch_stays_within_the_workspace(measured: Any, workspace_mb: float) -> None:
    assert scratch_mib(measured, 256, workspace_mb) <= allowed_mib(measured, workspace_mb)


def test_scratch_of_sixteen_bit_inputs_stays_within_the_workspace(measured: Any) -> None:
    assert scratch_mib(measured, 128, 4, torch.bfloat16) <= allowed_mib(measured, 4)


def test_scratch_does_not_grow_with_the_number_of_tokens(measured: Any) -> None:
    few, many = (scratch_mib(measured, rows, 4) for rows in (128, 512))
    assert many <= 1.1 * few + 0.5  # chunks are evened out: few tokens may make slightly smaller ones


@pytest.mark.parametrize("workspace_mb", [1e-6, 3.0, 96.0, 256.0, 1e6])
@pytest.mark.parametrize("vocab", [67, 49152, 151936])
def test_a_chunk_of_logits_fits_the_workspace(vocab: int, workspace_mb: float) -> None:
    for buffers, itemsize in ((1, 4), (2, 4), (2, 8)):
        row = buffers * vocab * itemsize
        for rows in (1, 7, 511, 513, 8192):
            chunk = backend.chunk_rows(
                rows, buffers=buffers, vocab_size=vocab, itemsize=itemsize, workspace_mb=workspace_mb
            )
            assert 1 <= chunk <= min(rows, backend.MAX_CHUNK_ROWS)
            assert chunk == 1 or chunk * row <= workspace_mb * MIB
            # Chunks are of even size, and as few as the workspace allows.
            most = max(1, min(int(workspace_mb * MIB / row), backend.MAX_CHUNK_ROWS, rows))
            assert -(-rows // chunk) == -(-rows // most)
            assert chunk * -(-rows // chunk) - rows < -(-rows // chunk)
