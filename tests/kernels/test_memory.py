"""Scratch memory: what a loss allocates at its peak beyond inputs and gradients is bounded by ``workspace_mb``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from tests.kernels.cases import make_case

MIB = 2**20


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes that torch's CPU allocator hands out (and, negative, takes back) during ``run``, in order, from the
    profiler's record of every allocation.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    changes, waiting = [], list(recorded.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [change for _, change in sorted(changes)]


def peak_mib(run: Callable[[], object]) -> float:
    """Peak of what torch's CPU allocator has handed out during ``run``."""
    now = peak = 0
    for change in allocations(run):
        now += change
        peak = max(peak, now)
    return peak / MIB


def scratch_mib(
    engine: Any, rows: int, workspace_mb: float, *, dtype: torch.dtype = torch.float32, vocab: int = 20_000
) -> float:
    """Peak beyond the gradients, which are float32 until the upstream gradient is known, then of the inputs' dtype."""
    size = 8
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
    if engine.name == "eager-low":
        pytest.skip("the eager rows are the same in both modes, and the slowest to record")
    return engine


@pytest.mark.parametrize("workspace_mb", [2, 24])
def test_scratch_stays_within_the_workspace(measured: Any, workspace_mb: float) -> None:
    assert scratch_mib(measured, 256, workspace_mb) <= allowed_mib(measured, workspace_mb)


def test_scratch_of_sixteen_bit_inputs_stays_within_the_workspace(measured: Any) -> None:
    assert scratch_mib(measured, 128, 4, dtype=torch.bfloat16) <= allowed_mib(measured, 4)


def test_scratch_does_not_grow_with_the_number_of_tokens(measured: Any) -> None:
    few, many = (scratch_mib(measured, rows, 4) for rows in (128, 512))
    assert many <= 1.1 * few + 0.5  # chunks are evened out: few tokens may make slightly smaller ones


@pytest.mark.parametrize("workspace_mb", [0.001, 4, 12])
def test_scratch_at_the_vocabulary_of_a_large_model(measured: Any, workspace_mb: float) -> None:
    # No chunk is shorter than one row of both models, and each thread has two rows of its own: 0.58 MiB a row.
    row = 4 * 151_936 / MIB
    scratch = scratch_mib(measured, 24, workspace_mb, vocab=151_936)
    assert scratch <= max(2 * row, workspace_mb) + allowed_mib(measured, 2 * row * torch.get_num_threads())
