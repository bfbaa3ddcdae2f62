"""Kept gradient tiles: any chunks, groups and slices give the same gradients, and the upstream gradient enters once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import pocl_kernels
from pocl_kernels.triton_backend import chunks, layout, projection
from pocl_kernels.triton_backend.layout import Layout
from tests.kernels.cases import Case, Solution, assert_close, make_case, oracle, solve

VOCAB = 603


def triton(*tensors: Any, **arguments: Any) -> Any:
    return pocl_kernels.fused_linear_divergence(*tensors, backend="triton", **({"memory": "fast"} | arguments))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("divergence_rows", "cross_entropy_rows", "tile_gradient"):
        monkeypatch.setattr(f"pocl_kernels.triton_backend.{kernel}.BLOCK", 512)


@pytest.fixture(scope="module")
def case() -> Case:
    case = make_case(9, VOCAB, bias=True, teacher_vocab=VOCAB - 40, dtype=torch.bfloat16)
    return case.replace(labels=torch.randint(0, VOCAB - 40, (9,), generator=torch.Generator().manual_seed(1)))


LAYOUTS = [Layout(9, 9, True, 9), Layout(2, 9, False, 9), Layout(2, 4, True, 4), Layout(3, 3, False, 3)]


@pytest.mark.parametrize("chosen", LAYOUTS, ids=str)
def test_gradients_do_not_depend_on_chunks_and_groups(
    case: Case, chosen: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "fast_layout", lambda *_, **__: chosen)
    monkeypatch.setattr(layout, "SLICE_BYTES", 1)  # slices of 128 rows
    call = dict(divergence="jsd", temperature=2.0, ce_weight=0.3)
    assert_close(solve(triton, case, **call), oracle(case, **call), 3e-3)  # of bf16


@pytest.mark.parametrize("upstream", [1.0, 0.3, 65536.0])
def test_the_upstream_gradient_enters_before_the_rounding(case: Case, upstream: float) -> None:
    whole, parts = (solve(triton, case, upstream=upstream) for _ in range(2))
    assert_close(whole, oracle(case, upstream=upstream), 3e-3)
    assert_close(whole, parts, 1e-9)


def test_a_second_backward_pass_computes_the_same(case: Case) -> None:
    weight = case.student_head.weight.clone().requires_grad_()
    loss = triton(case.student_hidden, weight, case.teacher_hidden, case.teacher_head, labels=case.labels).loss
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert float(first[VOCAB - 40 :].abs().max()) == 0.0  # padding


@pytest.mark.parametrize("masked", [-65504.0, -1e9])
@pytest.mark.parametrize("divergence", ["rkl", "jeffreys"])
def test_masked_teacher_logits_leave_gradients_finite(divergence: str, masked: float) -> None:
    case = make_case(6, VOCAB, bias=True, dtype=torch.float16)
    bias = case.teacher_head.bias
    assert bias is not None
    bias = bias.float().masked_fill(torch.arange(VOCAB) % 7 == 0, masked)
    head = pocl_kernels.Head(case.teacher_head.weight, bias)
    result: Solution = solve(triton, case.replace(teacher_head=head), divergence=divergence, wanted=("hidden",))
    assert torch.isfinite(result.loss)
    assert result.hidden is not None
    assert not result.hidden.isnan().any()
    if masked > -1e6:
        assert torch.isfinite(result.hidden).all()


def test_a_workspace_that_is_not_free_is_halved_with_a_warning(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, refused = projection.Projection.allocate, []

    def short(self: Any, *arguments: Any, **rest: Any) -> None:
        if len(refused) < 2:
            refused.append(arguments)
            raise torch.OutOfMemoryError("none left")
        allocate(self, *arguments, **rest)

    monkeypatch.setattr(projection.Projection, "allocate", short)
    with warnings.catch_warnings(record=True) as said:  # the interpreter's own too
        warnings.simplefilter("always")
        result = solve(triton, case)
    message = "workspace of 256 MiB is more than is free on cpu: 64 MiB serve"
    assert [message in str(warning.message) for warning in said if "workspace" in str(warning.message)] == [True]
    assert_close(result, solve(triton, case), 1e-9)


def test_a_frozen_head_keeps_no_tiles_and_makes_no_gradient(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "WeightGradient", None)  # to call it would fail
    result = solve(triton, case, wanted=("hidden",))
    assert result.weight is None
    assert_close(result, oracle(case, wanted=("hidden",)), 3e-3)
