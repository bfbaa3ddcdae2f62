"""Temperature and divergence parameters of one a token: as so many calls of one token each, on every path."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pocl_kernels
from pocl_kernels import JSD, Alpha, AlphaBeta, Divergence, MixedKL, SkewForwardKL, SkewReverseKL
from tests.kernels.cases import Case, Solution, assert_close, make_case, oracle, solve

ROWS = 9
NUMBERS = ("loss", "divergence", "cross_entropy", "student_entropy")
RAMP = torch.linspace(0.0, 1.0, ROWS)
KINDS: dict[str, Callable[[Any], Divergence | str]] = {
    "fkl": lambda x: "fkl",
    "rkl": lambda x: "rkl",
    "tvd": lambda x: "tvd",
    "skew_fkl": lambda x: SkewForwardKL(0.9 * x),
    "skew_rkl": lambda x: SkewReverseKL(0.9 * x),
    "jsd": JSD,
    "alpha": Alpha,
    "alpha_beta": lambda x: AlphaBeta(x, 1.5 - x),
    "mixed_kl": MixedKL,
}


def one_by_one(case: Case, kind: Callable[[Any], Any], temperatures: list[float], **call: Any) -> Solution:
    """Sums over calls of the oracle with one row each."""
    parts = [
        oracle.__wrapped__(
            case.rows(slice(i, i + 1)), divergence=kind(float(RAMP[i])), temperature=t, reduction="sum", **call
        )
        for i, t in enumerate(temperatures)
    ]
    hidden = torch.cat([p.hidden for p in parts])  # type: ignore[arg-type]
    values = (sum(getattr(p, name) for p in parts) for name in NUMBERS)
    more = (sum(getattr(p, name) for p in parts) for name in ("teacher_entropy", "accuracy"))
    weight = sum(p.weight for p in parts)
    return Solution(*values, hidden, weight, None, *more)  # type: ignore[arg-type, misc]


@pytest.mark.parametrize("name", KINDS)
def test_numbers_of_each_token_are_those_of_a_call_of_its_own(engine: Any, name: str) -> None:
    case = make_case(ROWS, 257, seed=1)
    temperature = torch.linspace(0.7, 3.0, ROWS)
    call = dict(ce_weight=0.3)
    truth = one_by_one(case, KINDS[name], temperature.tolist(), **call)
    result = solve(engine, case, divergence=KINDS[name](RAMP), temperature=temperature, reduction="sum", **call)
    assert_close(result, truth, 3e-6)


def test_temperature_alone_or_a_parameter_alone(engine: Any) -> None:
    case = make_case(ROWS, 257, seed=2)
    temperature = torch.linspace(0.7, 3.0, ROWS)
    for call, kind, temperatures in (
        (dict(divergence="jsd", temperature=temperature), lambda x: "jsd", temperature.tolist()),
        (dict(divergence=JSD(RAMP), temperature=2.0), JSD, [2.0] * ROWS),
    ):
        assert_close(solve(engine, case, reduction="sum", **call), one_by_one(case, kind, temperatures), 3e-6)


def test_double_precision_keeps_its_digits_by_token() -> None:
    case = make_case(ROWS, 257, dtype=torch.float64)
    temperature = torch.linspace(0.7, 3.0, ROWS, dtype=torch.float64)
    call = dict(divergence=Alpha(RAMP.double()), temperature=temperature, reduction="sum")
    assert_close(
        solve(pocl_kernels.fused_linear_divergence, case, **call), one_by_one(case, Alpha, temperature.tolist()), 1e-12
    )


def test_chunks_keep_every_token_its_own_number(engine: Any) -> None:
    case = make_case(ROWS, 1031, seed=3)
    call = dict(divergence=MixedKL(RAMP), temperature=1.0 + RAMP, reduction="sum")
    assert_close(solve(engine, case, workspace_mb=0.03, **call), solve(engine, case, **call), 3e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JSD(RAMP + 0.5), r"JSD(beta=...): beta must be in [0, 1] for every token, got 1.125 (4 such)"),
        (lambda: SkewReverseKL(RAMP), "skew must be in [0, 0.999999] for every token, got 1"),
        (lambda: AlphaBeta(RAMP, RAMP), "alpha + beta must be positive, got 0"),
        (lambda: call(temperature=RAMP), "temperature must be positive and finite for every token, got 0"),
        (lambda: call(temperature=torch.ones(ROWS - 1)), "temperature has shape (8,): it must be a number, or one a"),
        (lambda: call(divergence=JSD(RAMP[:3])), "beta has shape (3,): it must be a number, or one a token, (9,)"),
        (lambda: call(temperature=torch.ones(ROWS, device="meta")), "temperature on meta"),
    ],
)
def test_numbers_that_do_not_fit_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def call(**arguments: Any) -> Any:
    case = make_case(ROWS, 17)
    return solve(pocl_kernels.fused_linear_divergence, case, **arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own
def test_a_schedule_by_token_is_compiled_once() -> None:
    from torch._dynamo.backends.common import aot_autograd  # heavy, and processes import this file

    case, graphs = make_case(ROWS, 67), []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(h: torch.Tensor, temperature: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return pocl_kernels.fused_linear_divergence(
            h, case.student_head, case.teacher_hidden, case.teacher_head, divergence=MixedKL(weight),
            temperature=temperature, labels=case.labels,
        ).loss  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=aot_autograd(fw_compiler=backend))
    for x in (0.1, 0.2, 0.5):
        h, g = (case.student_hidden.clone().requires_grad_() for _ in range(2))
        compiled(h, 1.0 + x * RAMP, x * RAMP).backward()
        step(g, 1.0 + x * RAMP, x * RAMP).backward()
        torch.testing.assert_close(h.grad, g.grad)
        assert len(graphs) <= 2  # forward and backward
