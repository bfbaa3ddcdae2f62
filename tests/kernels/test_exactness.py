"""Every loss against float64: unrelated and nearly equal models, every precision of the inputs, every form of head.

Bounds are relative norms. Where an exact answer is out of reach of the input's precision, the bound is the error that
plain PyTorch makes on the same inputs, pooled over seeds so that luck decides nothing.
"""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import pocl_kernels
from pocl_kernels import JSD, Alpha, Divergence, Head, SkewForwardKL, SkewReverseKL, reference
from tests.kernels.cases import INSTANCES, NAMES, Solution, assert_close, make_case, oracle, pytorch, solve

FLOAT32 = 2e-6
SEEDS = range(4)


def pooled(errors: list[dict[str, float]], name: str) -> float:
    return math.sqrt(sum(e[name] ** 2 for e in errors) / len(errors))


@pytest.mark.parametrize("name", INSTANCES)
def test_unrelated_models_in_float32(engine: Any, name: str) -> None:
    case = make_case(24, 4099, bias=True)
    call = dict(divergence=INSTANCES[name], temperature=2.0, ce_weight=0.3)
    assert_close(solve(engine, case, **call), oracle(case, **call), FLOAT32)


@pytest.mark.parametrize("name", INSTANCES)
def test_unrelated_models_in_float64(name: str) -> None:
    case = make_case(12, 1031, bias=True, dtype=torch.float64)
    call = dict(divergence=INSTANCES[name], temperature=2.0, ce_weight=0.3)
    assert_close(solve(pocl_kernels.fused_linear_divergence, case, **call), oracle(case, **call), 1e-13)


@pytest.mark.parametrize("name", INSTANCES)
def test_nearly_equal_models_in_float64(name: str) -> None:
    case = make_case(12, 1031, near=1e-4, dtype=torch.float64)
    call = dict(divergence=INSTANCES[name], temperature=2.0)
    # The oracle's textbook sums cancel: eps / sqrt(D) for the gradients, eps / D for the value.
    errors = solve(pocl_kernels.fused_linear_divergence, case, **call).errors(oracle(case, **call))
    assert errors["loss"] <= 1e-9
    assert errors["hidden"] <= 2e-11
    assert errors["weight"] <= 2e-11


@pytest.mark.parametrize("name", NAMES)
def test_nearly_equal_models_in_float32(engine: Any, name: str) -> None:
    # At T = 2 a KL of 4e-4 between the plain distributions is one of 1e-4.
    for temperature, near in ((1.0, 1e-4), (2.0, 4e-4)):
        cases = [make_case(32, 2053, near=near, seed=seed) for seed in SEEDS]
        call = dict(divergence=name, temperature=temperature)
        truth = [oracle(case, **call) for case in cases]
        ours, plain, logits = (
            [f(case).errors(t) for case, t in zip(cases, truth, strict=True)]
            for f in (
                functools.partial(solve, engine, **call),
                functools.partial(pytorch, **call),
                functools.partial(pytorch, after=torch.float64, **call),
            )
        )
        # Float32 logits alone, with all that follows exact, put the loss off by up to 1.4e-5 here: nothing is added.
        assert pooled(ours, "loss") <= max(1.2 * pooled(logits, "loss"), 1e-5 if temperature == 1.0 else 5e-6)
        assert pooled(ours, "loss") <= 2e-5
        # The gradient of tvd has jumps: the rounded sign of a few entries outweighs all other rounding.
        floor = 3e-4 if name == "tvd" else 0.0
        for gradient in ("hidden", "weight"):
            assert pooled(ours, gradient) <= max(1.2 * pooled(plain, gradient), floor), gradient
        # Autograd's own form lets an error of the normalisers into the gradient of the hidden states in first order.
        if name in ("fkl", "rkl", "skew_fkl", "alpha") and temperature == 2.0:
            assert pooled(ours, "hidden") <= 0.85 * pooled(plain, "hidden")


@pytest.mark.parametrize("near", [None, 1e-4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bit_inputs(engine: Any, name: str, dtype: torch.dtype, near: float | None) -> None:
    cases = [make_case(16, 2053, near=near, dtype=dtype, seed=seed) for seed in SEEDS]
    truth = [oracle(case, divergence=name) for case in cases]
    ours = [solve(engine, case, divergence=name) for case in cases]
    plain = [pytorch(case, divergence=name) for case in cases]
    assert ours[0].loss.dtype == torch.float32
    assert ours[0].hidden.dtype == ours[0].weight.dtype == dtype
    errors, bound = ([x.errors(t) for x, t in zip(xs, truth, strict=True)] for xs in (ours, plain))
    # A float32 loss cannot be asked for more than a few units in its last place.
    assert pooled(errors, "loss") <= max(1.2 * pooled(bound, "loss"), 3e-7)
    for gradient in ("hidden", "weight"):
        assert pooled(errors, gradient) <= 1.2 * pooled(bound, gradient), gradient
    # Rounding to 16 bits hides most of the error above; how often it went the wrong way shows the rest.
    wrong, allowed = (sum(wrongly_rounded(x, t) for x, t in zip(xs, truth, strict=True)) for xs in (ours, plain))
    assert wrong <= 1.2 * allowed + 0.002 * len(cases)


def wrongly_rounded(result: Solution, truth: Solution) -> float:
    """Share of the entries of dW that are not the nearest to the truth."""
    return float((result.weight != truth.weight.to(result.weight.dtype)).double().mean())


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale up": {"scale": 4.0},
    "scale down": {"scale": 0.125, "bias": True},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "scale": 0.25, "softcap": 5.0},
    "narrow student": {"hidden": (8, 72)},
    "wide student": {"hidden": (72, 8), "bias": True},
    "padded teacher": {"teacher_vocab": 1031 + 57, "bias": True},
    "padded student": {"teacher_vocab": 1031 - 57, "bias": True, "softcap": 8.0},
}


@pytest.mark.parametrize("form", HEADS)
@pytest.mark.parametrize("divergence", ["fkl", "skew_rkl", "jsd"])
def test_every_form_of_head(engine: Any, form: str, divergence: str) -> None:
    case = make_case(24, **HEADS[form])
    call = dict(divergence=divergence, temperature=1.5, ce_weight=0.4)
    assert_close(solve(engine, case, **call), oracle(case, **call), FLOAT32)


@pytest.mark.parametrize("vocab", [1, 2, 7, 16, 1023, 1024, 1025, 2049])
def test_vocabularies_at_the_edges_of_blocks(engine: Any, vocab: int) -> None:
    case = make_case(9, vocab, bias=True)
    call = dict(temperature=1.3, ce_weight=0.5)
    result, truth = solve(engine, case, **call), oracle(case, **call)
    if vocab == 1:  # one token has probability one: nothing to lose, nothing to learn
        assert float(result.accuracy) == 1.0
        assert all(
            float(x.abs().max()) <= 1e-6 for x in vars(dataclasses.replace(result, accuracy=result.loss)).values()
        )
    else:
        assert_close(result, truth, FLOAT32)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_few_rows(engine: Any, rows: int) -> None:
    case = make_case(rows, 300, seed=3)
    case = case.replace(labels=case.labels.clamp_min(0))
    for divergence in ("fkl", "tvd"):
        assert_close(solve(engine, case, divergence=divergence), oracle(case, divergence=divergence), FLOAT32)


@pytest.mark.parametrize("name", NAMES)
def test_every_temperature_and_mix(engine: Any, name: str) -> None:
    case = make_case(16, 1031, seed=1)
    for temperature, ce_weight in ((0.25, 0.0), (1.0, 0.0), (1.0, 0.6), (3.0, 1.0), (4.0, 0.6)):
        call = dict(divergence=name, temperature=temperature, ce_weight=ce_weight)
        # Dividing the logits by a quarter makes them, and their rounding errors, four times as large.
        assert_close(solve(engine, case, **call), oracle(case, **call), FLOAT32 * max(1.0, 1 / temperature))


def test_without_labels_every_row_counts(engine: Any) -> None:
    case = make_case(16, 1031)
    result, truth = solve(engine, case, labels=False), oracle(case, labels=False)
    assert result.cross_entropy is None
    assert_close(result, truth, FLOAT32)


@pytest.mark.parametrize("name", NAMES)
def test_a_vocabulary_of_a_real_model(engine: Any, name: str) -> None:
    case = make_case(4, 50257, bias=True, seed=2)
    case = case.replace(labels=case.labels.clamp_min(0))
    truth = oracle(case, divergence=name)
    errors = solve(engine, case, divergence=name).errors(truth)
    plain = pytorch(case, divergence=name).errors(truth)
    assert {k: e for k, e in errors.items() if e > max(FLOAT32, 2 * plain[k])} == {}


@pytest.mark.parametrize("name", NAMES)
def test_logits_far_from_zero_cost_no_more_than_their_own_rounding(engine: Any, name: str) -> None:
    # A common offset of 500 on all logits of both models changes nothing but the spacing of float32 around them.
    base = make_case(16, 1031, near=1e-3, bias=True)
    heads = [Head(h.weight, h.bias + 500.0) for h in (base.student_head, base.teacher_head)]
    case = base.replace(student_head=heads[0], teacher_head=heads[1])
    truth = oracle(case, divergence=name)
    errors = solve(engine, case, divergence=name).errors(truth)
    plain = pytorch(case, divergence=name).errors(truth)
    assert errors["loss"] <= max(plain["loss"], 1e-3)
    for gradient in ("hidden", "weight", "bias"):
        assert errors[gradient] <= 1.2 * plain[gradient], gradient


@pytest.mark.parametrize(("name", "temperature"), [*((name, 1.0) for name in NAMES), ("fkl", 0.5), ("jsd", 0.5)])
def test_peaked_distributions_underflow_without_harm(engine: Any, name: str, temperature: float) -> None:
    # Logits of deviation 60: most probabilities are exactly zero in float32 on both sides.
    base = make_case(16, 1031)
    heads = [Head(h.weight * 30) for h in (base.student_head, base.teacher_head)]
    case = base.replace(student_head=heads[0], teacher_head=heads[1])
    call = dict(divergence=name, temperature=temperature)
    result, truth = solve(engine, case, **call), oracle(case, **call)
    assert reference.relative_error(result.loss, truth.loss) <= FLOAT32
    # Where q is one up to rounding the true gradient is nearly zero: an error in it is small next to q itself.
    for mine, exact, size in ((result.weight, truth.weight, 1.0), (result.hidden, truth.hidden, 30.0)):
        assert float((mine - exact).norm()) <= 5e-6 * max(size, float(exact.norm()))


@pytest.mark.parametrize("near", [None, 1e-4])
@pytest.mark.parametrize(
    "divergence", [Alpha(0.02), Alpha(0.98), SkewForwardKL(0.99), SkewReverseKL(0.9), JSD(0.02), JSD(0.98)], ids=repr
)
def test_gradients_at_the_ends_of_the_parameters(engine: Any, divergence: Divergence, near: float | None) -> None:
    cases = [make_case(24, 2053, near=near, seed=seed) for seed in SEEDS]
    truth = [oracle(case, divergence=divergence) for case in cases]
    ours, plain = (
        [f(case, divergence=divergence).errors(t) for case, t in zip(cases, truth, strict=True)]
        for f in (functools.partial(solve, engine), pytorch)
    )
    for gradient in ("hidden", "weight"):
        assert pooled(ours, gradient) <= max(1.2 * pooled(plain, gradient), FLOAT32), gradient


@pytest.mark.parametrize("name", INSTANCES)
def test_gradcheck(name: str) -> None:
    case = make_case(3, 7, hidden=(3, 4), bias=True, scale=0.5, softcap=6.0, dtype=torch.float64)
    head = case.student_head
    labels = torch.tensor([2, -100, 5])

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, memory: str) -> torch.Tensor:
        student = Head(weight, bias, head.scale, head.softcap)
        return pocl_kernels.fused_linear_divergence(
            hidden, student, case.teacher_hidden, case.teacher_head, divergence=INSTANCES[name], temperature=1.7,
            labels=labels, ce_weight=0.3, memory=memory,
        ).loss  # fmt: skip

    leaves = [x.clone().requires_grad_() for x in (case.student_hidden, head.weight, head.bias)]
    for memory in ("fast", "low") if name == "fkl" else ("low",):
        assert torch.autograd.gradcheck(functools.partial(loss, memory=memory), leaves, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_cross_entropy_alone(engine: Any, form: str, dtype: torch.dtype) -> None:
    case = make_case(24, dtype=dtype, **HEADS[form])
    head = case.student_head
    results = []
    for cast, function in ((dtype, engine.cross_entropy), (torch.float64, float64_cross_entropy)):
        h = case.student_hidden.detach().to(cast).requires_grad_()
        w = head.weight.detach().to(cast).requires_grad_()
        bias = None if head.bias is None else head.bias.detach().to(cast).requires_grad_()
        loss = function(h, Head(w, bias, head.scale, head.softcap), case.labels)
        loss.backward()
        results.append(
            Solution(loss.detach(), None, None, None, h.grad, w.grad, bias.grad if bias is not None else None)
        )
    ours, truth = results
    tolerance = {torch.float32: FLOAT32, torch.float64: 1e-13, torch.bfloat16: 3e-3}[dtype]
    assert_close(ours, truth, tolerance)
    assert reference.relative_error(ours.loss, truth.loss) <= 1e-6


def float64_cross_entropy(hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
    z = head.scale * F.linear(hidden, head.weight, head.bias)
    return F.cross_entropy(z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap), labels)
