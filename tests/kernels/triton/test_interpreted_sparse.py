"""Sparse teachers on Triton, in the interpreter, against float64: tails, divergences, memory modes, forms of head."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import pocl_kernels
from pocl_kernels import JSD, SparseTeacher
from pocl_kernels.triton_backend import layout
from tests.kernels.cases import INSTANCES, Case, assert_close, make_case, solve
from tests.kernels.sparse_cases import double, one_by_one, oracle, sparse, taught_by

FLOAT32 = 2e-6
VOCAB = 203


def triton(memory: str) -> Any:
    def loss(*tensors: Any, **arguments: Any) -> Any:
        return pocl_kernels.fused_linear_divergence(*tensors, backend="triton", **({"memory": memory} | arguments))

    return loss


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, also of the K tokens, several chunks of rows and vocabulary tiles, none of them even."""
    for kernel in ("sparse_statistics", "sparse_values", "sparse_gradient"):
        monkeypatch.setattr(f"pocl_kernels.triton_backend.{kernel}.BLOCK", 128)
    monkeypatch.setattr("pocl_kernels.triton_backend.sparse_device.K_BLOCK", 4)
    monkeypatch.setattr(layout, "MAX_CHUNK_ROWS", 2)
    monkeypatch.setattr("pocl_kernels.triton_backend.low.tile_shape", lambda rows, *_: (min(rows, 3), 128))


def case_of(tail: str, **of_case: Any) -> Case:
    return sparse(make_case(5, VOCAB, **of_case), 7, tail)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize(
    ("tail", "name"),
    [("bucket", name) for name in ("fkl", "rkl", "jsd")]
    + [("uniform", name) for name in ("fkl", "skew_rkl", "alpha")]
    + [("renormalise", "jsd"), ("renormalise", "alpha_beta"), ("zero", "fkl")],
)
def test_tails_and_divergences(tail: str, name: str, memory: str) -> None:
    case = case_of(tail, bias=True)
    call = dict(divergence=INSTANCES[name], temperature=1.0 if tail == "zero" else 2.0, ce_weight=0.3)
    assert_close(solve(triton(memory), case, **call), oracle(case, **call), FLOAT32)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_softcap_scale_and_bias(tail: str, memory: str) -> None:
    case = case_of(tail, bias=True, scale=-2.0, softcap=8.0)
    call = dict(divergence="jsd", ce_weight=0.3)
    assert_close(solve(triton(memory), case, **call), oracle(case, **call), 3e-6)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_numbers_of_one_a_token(tail: str, memory: str) -> None:
    case, x, T = case_of(tail), torch.linspace(0.1, 0.9, 5), torch.linspace(0.7, 3.0, 5)
    truth = one_by_one(case, JSD, x.tolist(), T.tolist())
    assert_close(solve(triton(memory), case, divergence=JSD(x), temperature=T, reduction="sum"), truth, 3e-6)


def test_upstream_gradients_of_single_tokens() -> None:
    case, upstream = case_of("bucket"), torch.linspace(-1.0, 1.0, 5)
    call = dict(divergence="skew_rkl", reduction="none")
    truth = oracle.__wrapped__(case, upstream=upstream, **call)
    assert_close(solve(triton("low"), case, upstream=upstream, **call), truth, FLOAT32)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_all_tokens_named_leave_no_tail(memory: str) -> None:
    case = sparse(make_case(3, 150), 150, ragged=False)
    assert_close(solve(triton(memory), case, divergence="jsd"), oracle(case, divergence="jsd"), FLOAT32)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_double_precision_and_rows_of_padding(memory: str) -> None:
    case = case_of("uniform")
    case = taught_by(case, dataclasses.replace(case.teacher_hidden, vocab_size=VOCAB))
    head = torch.cat([case.student_head.weight, torch.ones(9, case.student_head.weight.shape[1])])
    case = case.replace(student_head=dataclasses.replace(case.student_head, weight=head))
    assert_close(solve(triton(memory), case, divergence="rkl"), oracle(case, divergence="rkl"), FLOAT32)
    assert_close(solve(triton(memory), double(case), divergence="rkl"), oracle(case, divergence="rkl"), 1e-11)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_rows_without_weight_may_say_anything(memory: str) -> None:
    """Without labels a GPU keeps them, so as not to wait for their number."""
    case = case_of("bucket")
    ids, log_probs = case.teacher_hidden.token_ids.clone(), case.teacher_hidden.log_probs.clone()
    ids[case.labels == -100], log_probs[case.labels == -100] = -1, float("nan")
    weight = (case.labels != -100).float()
    result = solve(
        triton(memory),
        taught_by(case, SparseTeacher(ids, log_probs)),
        labels=False,
        token_weight=weight,
        reduction="sum",
    )
    truth = oracle(case, reduction="sum")
    for field in ("loss", "hidden", "weight"):
        assert pocl_kernels.reference.relative_error(getattr(result, field), getattr(truth, field)) < FLOAT32


def test_16_bit_models() -> None:
    """Logits are float32, the gradient's tile is float16."""
    case = case_of("bucket")
    half = case.replace(
        student_hidden=case.student_hidden.bfloat16(),
        student_head=dataclasses.replace(case.student_head, weight=case.student_head.weight.bfloat16()),
    )
    truth = oracle(half, divergence="jsd")
    for memory in ("fast", "low"):
        result = solve(triton(memory), half, divergence="jsd")
        errors = result.errors(truth)
        assert errors["loss"] < FLOAT32
        assert max(errors["hidden"], errors["weight"]) < 4e-3  # the rounding of the result to bfloat16
