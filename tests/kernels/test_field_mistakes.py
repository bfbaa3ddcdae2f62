"""Mistakes that other implementations of these losses shipped, one test each, by name; some are laws elsewhere too."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pocl_kernels
from pocl_kernels import JSD, Head
from pocl_kernels.cpu import compiler
from tests.kernels.cases import NAMES, Case, Solution, assert_close, make_case, oracle, pytorch, solve


def test_a_softmax_rounded_to_bfloat16(engine: Any) -> None:
    """Seen: a JSD of -0.0102 where float64 says 0.0026, and 16 % error in dW."""
    case = make_case(24, 2053, near=1e-2, dtype=torch.bfloat16)
    truth = oracle(case, divergence="jsd")
    wrong = pytorch(case, divergence="jsd", dtype=torch.bfloat16).errors(truth)
    assert wrong["loss"] > 0.5
    assert wrong["weight"] > 0.1
    errors = solve(engine, case, divergence="jsd").errors(truth)
    assert errors["loss"] <= 1e-4
    assert errors["weight"] <= 3e-3  # half a unit of bfloat16's last place


def test_a_second_backward_through_saved_gradients_that_scales_them_again(engine: Any) -> None:
    case = make_case(12, 257)
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_head.weight.clone().requires_grad_()
    loss = 3 * engine(hidden, weight, case.teacher_hidden, case.teacher_head).loss
    gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0].clone() for _ in range(3)]
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_a_returned_part_with_a_silent_zero_gradient(engine: Any) -> None:
    case = make_case(12, 257)
    hidden = case.student_hidden.clone().requires_grad_()
    out = engine(hidden, case.student_head, case.teacher_hidden, case.teacher_head, labels=case.labels, ce_weight=0.5)
    for part in (out.divergence, out.cross_entropy, out.student_entropy):
        with pytest.raises(RuntimeError, match="does not require grad"):
            part.backward()
    out.loss.backward()
    assert float(hidden.grad.norm()) > 1e-2


def test_wrong_gradients_under_reduction_none(engine: Any) -> None:
    case = make_case(12, 257)
    upstream = torch.linspace(-2, 3, 12)
    for name in ("fkl", "jsd"):
        call = dict(divergence=name, reduction="none", upstream=upstream, temperature=2.0, ce_weight=0.3)
        assert_close(solve(engine, case, **call), oracle(case, **call), 5e-6)


def test_a_backward_that_ignores_the_upstream_gradient(engine: Any) -> None:
    case = make_case(12, 257)
    once, scaled = solve(engine, case), solve(engine, case, upstream=-0.125)
    for name in ("hidden", "weight"):
        assert torch.equal(-0.125 * getattr(once, name), getattr(scaled, name))


def test_nan_or_a_division_by_zero_when_every_label_is_ignored(engine: Any) -> None:
    case = make_case(12, 257, bias=True)
    case = case.replace(labels=torch.full((12,), -100))
    for name in NAMES:
        result = solve(engine, case, divergence=name, ce_weight=0.5)
        assert all(float(x.abs().max()) == 0.0 for x in vars(result).values())


def test_nan_when_both_probabilities_underflow(engine: Any) -> None:
    case = make_case(8, 257)
    heads = [Head(torch.cat([h.weight, torch.zeros(1, h.hidden_size)]), bias_of(-400.0)) for h in heads_of(case)]
    both = case.replace(student_head=heads[0], teacher_head=heads[1])
    for name in NAMES:
        result = solve(engine, both, divergence=name)
        assert float(result.loss) == pytest.approx(float(solve(engine, case, divergence=name).loss), rel=2e-6)
        assert torch.isfinite(result.weight).all()


def heads_of(case: Case) -> tuple[Head, Head]:
    return case.student_head, case.teacher_head


def bias_of(last: float) -> Tensor:
    return torch.cat([torch.zeros(257), torch.tensor([last])])


def test_means_of_chunks_averaged_or_normalised_twice(engine: Any) -> None:
    # Valid tokens lie unevenly over the chunks; one row a chunk, and all rows in one.
    case = make_case(30, 257)
    labels = case.labels.clone()
    labels[2:23] = -100
    case = case.replace(labels=labels)
    for workspace_mb in (1e-9, 256):
        result = solve(engine, case, ce_weight=0.3, workspace_mb=workspace_mb)
        assert_close(result, oracle(case, ce_weight=0.3), 2e-6)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_gradients_that_depend_on_packing_accumulation_or_world_size(engine: Any, parts: int) -> None:
    case = make_case(30, 257)
    count = int((case.labels >= 0).sum())
    weight = case.student_head.weight.clone().requires_grad_()
    loss = 0.0
    for share in torch.arange(30).tensor_split(parts):  # micro-batches, or the batches of as many processes
        part = case.rows(share)
        out = engine(
            part.student_hidden, weight, part.teacher_hidden, part.teacher_head, labels=part.labels, normalizer=count
        )
        out.loss.backward()
        loss += float(out.loss.detach())
    truth = oracle(case)
    assert loss == pytest.approx(float(truth.loss), rel=2e-6)
    assert pocl_kernels.reference.relative_error(weight.grad, truth.weight) <= 2e-6


def test_labels_shifted_by_one_against_the_logits(engine: Any) -> None:
    # A student that is certain of token i at position i: only aligned labels give it a small cross-entropy.
    head, hidden = 30 * torch.eye(12), torch.eye(12)
    aligned = torch.arange(12)
    out = engine(hidden, head, hidden, head, labels=aligned, ce_weight=1.0)
    shifted = engine(hidden, head, hidden, head, labels=aligned.roll(1), ce_weight=1.0)
    assert float(out.loss) < 1e-10
    assert float(shifted.loss) == pytest.approx(30.0, rel=1e-6)


@pytest.mark.parametrize("change", [{"softcap": 4.0}, {"scale": 0.25}, {"bias": True}])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_softcap_scale_or_bias_silently_ignored(engine: Any, side: str, change: dict[str, Any]) -> None:
    case = make_case(12, 257)
    bias = torch.randn(257)
    changed = {name: (bias if name == "bias" else value) for name, value in change.items()}
    head = dataclasses.replace(getattr(case, f"{side}_head"), **changed)
    other = case.replace(**{f"{side}_head": head})
    result, plain = solve(engine, other, ce_weight=0.3), solve(engine, case, ce_weight=0.3)
    assert abs(float(result.loss) / float(plain.loss) - 1) > 0.02
    assert_close(result, oracle(other, ce_weight=0.3), 2e-6)


def test_a_temperature_that_does_not_reach_the_loss(engine: Any) -> None:
    case = make_case(12, 257)
    values = [float(solve(engine, case, temperature=t, wanted=()).divergence) for t in (1.0, 1.5, 2.0, 4.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 3 * values[-1]
    # The student is trained at T, judged at 1: its cross-entropy does not move.
    assert len({float(solve(engine, case, temperature=t, wanted=()).cross_entropy) for t in (1.0, 2.0, 4.0)}) == 1


def test_cross_entropy_trained_by_accident_from_a_default_weight(engine: Any) -> None:
    case = make_case(12, 257)
    case = case.replace(labels=case.labels.clamp_min(0))
    with_labels, without = solve(engine, case), solve(engine, case, labels=False)
    for name in ("loss", "hidden", "weight"):
        assert torch.equal(getattr(with_labels, name), getattr(without, name))


def test_beta_as_a_compile_time_constant(engine: Any) -> None:
    """Seen: one recompilation for each value, so that a schedule recompiles at every stage."""
    if not engine.compiled:
        pytest.skip("nothing is compiled")
    compiled = set()
    for stage in range(4):
        case = make_case(6 + stage, 67 + stage)
        call = dict(divergence=JSD(0.2 + 0.1 * stage), temperature=1 + 0.2 * stage, ce_weight=0.3 - 0.05 * stage)
        assert_close(solve(engine, case, **call), oracle(case, **call), 2e-6)
        compiled.add(compiler.load.cache_info().misses)
    assert len(compiled) == 1, "a kernel was compiled after the first stage"


def test_tolerances_larger_than_the_gradient_itself() -> None:
    truth = oracle(make_case(12, 257), ce_weight=0.3)
    assert float(truth.weight.abs().max()) < 0.5
    nothing = dataclasses.replace(truth, weight=torch.zeros_like(truth.weight))
    with pytest.raises(AssertionError, match=r"weight.*1.00e"):
        assert_close(nothing, truth, 0.5)
    with pytest.raises(AssertionError, match="no weight"):
        assert_close(dataclasses.replace(truth, weight=None), truth, 0.5)
    with pytest.raises(AssertionError, match="weight"):
        assert_close(dataclasses.replace(truth, weight=truth.weight * math.nan), truth, 0.5)


def test_logits_no_language_model_has() -> None:
    """Seen: accuracy and speed reported on uniform random numbers, whose softmax is flat."""
    case = make_case(64, 4099)
    for logits in (case.teacher_hidden @ case.teacher_head.weight.T, case.student_hidden @ case.student_head.weight.T):
        p = torch.softmax(logits, -1)
        entropy = float(-(p * p.log()).sum(-1).mean())
        assert 2.0 < entropy < 6.0
        assert entropy < 0.75 * math.log(4099)
        assert 0.1 < float(p.max(-1).values.mean()) < 0.9
        assert float(logits.max() - logits.min()) > 10
    assert isinstance(solve(pocl_kernels.fused_linear_divergence, case, wanted=()), Solution)
