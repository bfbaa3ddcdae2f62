"""The cross-entropy with smoothed labels, the z-loss and what is reported beside it, against float64 and PyTorch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pocl_kernels
from pocl_kernels import Head, reference
from tests.kernels.cases import Case, make_case

OPTIONS = [
    {"label_smoothing": 0.1},
    {"z_loss": 1e-3},
    {"label_smoothing": 0.3, "z_loss": 1e-2, "reduction": "sum"},
    {"label_smoothing": 1.0, "reduction": "none"},
    {"reduction": "none"},
    {"z_loss": 0.1, "normalizer": 40.0},
]


def solve(loss: Any, case: Case, **call: Any) -> dict[str, Tensor]:
    """Every figure and gradient of the student's side of a case."""
    head = case.student_head
    tensors = {"hidden": case.student_hidden, "weight": head.weight, "bias": head.bias}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items() if x is not None}
    mine = Head(leaves["weight"], leaves.get("bias"), head.scale, head.softcap)
    out = loss(leaves["hidden"], mine, case.labels, **call)
    out.loss.backward(torch.linspace(0.5, 1.5, out.loss.numel()).to(out.loss).reshape(out.loss.shape))
    return {**out._asdict(), **{name: leaf.grad for name, leaf in leaves.items()}}


def check(loss: Any, case: Case, tolerance: float, **call: Any) -> None:
    """All of it within a tolerance, relative to the float64 reference's norm."""
    truth = solve(reference.fused_linear_cross_entropy, case.to(torch.float64), **call)
    found = solve(functools.partial(loss, parts=True), case, **call)
    errors = {name: reference.relative_error(found[name], exact) for name, exact in truth.items()}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}, call


def half_right(case: Case) -> Case:
    """With the student's own choice and its second choice as labels that count, in turn."""
    choices = reference.logits(case.student_hidden, case.student_head).topk(2, -1).indices
    chosen = choices.gather(1, torch.arange(len(choices))[:, None] % 2).squeeze(1)
    return case.replace(labels=torch.where(case.labels >= 0, chosen, case.labels))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_against_float64(engine: Any, options: dict[str, Any]) -> None:
    check(engine.cross_entropy, half_right(make_case(13, 1031, bias=True)), 2e-6, **options)
    rows = torch.linspace(0.0, 2.0, 13)
    check(engine.cross_entropy, half_right(make_case(13, 1031, softcap=5.0)), 2e-6, token_weight=rows, **options)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_every_option_in_float64_and_in_sixteen_bits(engine: Any, options: dict[str, Any]) -> None:
    check(engine.cross_entropy, make_case(9, 257, bias=True, dtype=torch.float64), 1e-12, **options)
    check(engine.cross_entropy, make_case(9, 257, bias=True, dtype=torch.bfloat16), 3e-3, **options)


def test_smoothing_is_pytorchs(engine: Any) -> None:
    case = make_case(11, 1031, bias=True)
    z = reference.logits(case.student_hidden, case.student_head)
    for smoothing in (0.0, 0.2, 1.0):
        for reduction in ("mean", "sum", "none"):
            exact = F.cross_entropy(z, case.labels, label_smoothing=smoothing, reduction=reduction)
            call = dict(label_smoothing=smoothing, reduction=reduction)
            found = engine.cross_entropy(case.student_hidden, case.student_head, case.labels, **call)
            assert reference.relative_error(found, exact) <= 1e-6


def test_chunks_change_nothing(engine: Any) -> None:
    case = half_right(make_case(13, 1031, bias=True))
    call = dict(label_smoothing=0.2, z_loss=1e-2)
    whole = solve(functools.partial(engine.cross_entropy, parts=True), case, **call)
    some = solve(functools.partial(engine.cross_entropy, parts=True, workspace_mb=0.01), case, **call)
    assert max(reference.relative_error(some[name], whole[name]) for name in whole) <= 2e-6


def test_an_offset_of_all_logits_costs_the_smoothing_nothing_more(engine: Any) -> None:
    base = make_case(9, 1031, bias=True)
    head = base.student_head
    case = base.replace(student_head=Head(head.weight, head.bias + 300.0))
    check(engine.cross_entropy, case, 3e-5, label_smoothing=0.5)  # logits near 300 are spaced by 3e-5


def test_a_masked_token_is_as_in_pytorch(engine: Any) -> None:
    case = make_case(6, 257, bias=True)
    bias = case.student_head.bias.clone()
    bias[200] = -torch.inf
    hidden, head = case.student_hidden, Head(case.student_head.weight, bias)
    labels = case.labels.clamp_min(0).clamp_max(199)
    plain = engine.cross_entropy(hidden, head, labels, parts=True, z_loss=1e-3)
    assert torch.isfinite(torch.stack(plain[:4])).all()
    # A part of the probability is asked of a token that has none.
    assert engine.cross_entropy(hidden, head, labels, label_smoothing=0.1) == torch.inf


def test_parts_cost_no_other_loss_and_carry_no_gradient(engine: Any) -> None:
    case = make_case(7, 257)
    hidden = case.student_hidden.clone().requires_grad_()
    out = engine.cross_entropy(hidden, case.student_head, case.labels, parts=True, label_smoothing=0.1)
    assert torch.equal(out.loss, engine.cross_entropy(hidden, case.student_head, case.labels, label_smoothing=0.1))
    assert not any(x.requires_grad for x in out[1:])
    assert int(out.num_tokens) == int((case.labels >= 0).sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"label_smoothing": -0.1}, r"label_smoothing=-0.1 must be in \[0, 1\]"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"label_smoothing": float("nan")}, "label_smoothing=nan"),
        ({"label_smoothing": "0.1"}, "label_smoothing='0.1'"),
        ({"z_loss": -1e-4}, "z_loss=-0.0001 must be a number, at least 0"),
        ({"z_loss": float("inf")}, "z_loss=inf"),
        ({"z_loss": None}, "z_loss=None"),
    ],
)
def test_values_out_of_range_are_refused_in_words(call: dict[str, Any], message: str) -> None:
    case = make_case(3, 17)
    with pytest.raises(ValueError, match=message):
        pocl_kernels.fused_linear_cross_entropy(case.student_hidden, case.student_head, case.labels, **call)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own
@pytest.mark.parametrize("what", ["label_smoothing", "z_loss"])
def test_a_schedule_is_compiled_twice_at_most(what: str) -> None:
    """For the first value, and for all others."""
    from torch._dynamo.backends.common import aot_autograd  # heavy, and processes import this file

    case, graphs = make_case(9, 67), []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(h: Tensor, **call: Any) -> Tensor:
        return pocl_kernels.fused_linear_cross_entropy(h, case.student_head, case.labels, **call)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    for x in (0.1, 0.2, 0.35, 0.5):
        h, g = (case.student_hidden.clone().requires_grad_() for _ in range(2))
        compiled(h, **{what: x}).backward()
        step(g, **{what: x}).backward()
        assert reference.relative_error(h.grad, g.grad) <= 1e-6
    assert len(graphs) <= 4  # forward and backward
