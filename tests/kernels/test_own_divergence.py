"""A divergence that a user writes: two functions, and it runs wherever those that are shipped do."""

import dataclasses
from typing import Any

import pytest
import torch

import pocl_kernels
from pocl_kernels import Divergence
from pocl_kernels.scalar import Value, exp, kl_term
from tests.kernels.cases import Solution, make_case, solve


@dataclasses.dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """1/2 sum (sqrt p - sqrt q)^2, times ``gain``."""

    gain: float = 1.0

    def value(self, l: Value, r: Value) -> Value:
        return 0.5 * self.gain * (exp(0.5 * l) - exp(0.5 * r)) ** 2

    def slope(self, l: Value, r: Value) -> Value:
        return -0.5 * self.gain * exp(0.5 * (l + r))


def hellinger(case: Any, gain: float, temperature: float) -> Solution:
    weight = case.student_head.weight.double().requires_grad_()
    hidden = case.student_hidden.double().requires_grad_()
    l = torch.log_softmax(hidden @ weight.T / temperature, -1)
    r = torch.log_softmax(case.teacher_hidden.double() @ case.teacher_head.weight.double().T / temperature, -1)
    d = (0.5 * gain * ((0.5 * l).exp() - (0.5 * r).exp()) ** 2).sum(-1).mean()
    (temperature**2 * d).backward()
    entropy, of_teacher = (-(x.exp() * x).sum(-1).mean().detach() for x in (l, r))
    loss = temperature**2 * d.detach()
    return Solution(loss, d.detach(), None, entropy, hidden.grad, weight.grad, None, teacher_entropy=of_teacher)


@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_a_users_own_divergence_works_end_to_end(engine: Any, gain: float) -> None:
    case = make_case(12, 257)
    result = solve(engine, case, labels=False, divergence=SquaredHellinger(gain), temperature=2.0)
    errors = result.errors(hellinger(case, gain, 2.0))
    assert max(errors.values()) <= 3e-6, errors
    half_alpha = solve(engine, case, labels=False, divergence="alpha", temperature=2.0)  # alpha at 1/2 is four times it
    assert float(result.loss) == pytest.approx(gain / 4 * float(half_alpha.loss), rel=1e-5)


# Names that the kernels use themselves, or that C does not allow.
NAMES = ("w", "scale", "c", "q", "p", "z", "D", "V", "param", "t3", "l", "r", "int", "f_exp", "label", "exp")


def test_fields_may_have_any_name(engine: Any) -> None:
    def value(self: Any, l: Value, r: Value) -> Value:
        return sum(getattr(self, name) for name in NAMES) * kl_term(exp(r), r, exp(l), l)

    def slope(self: Any, l: Value, r: Value) -> Value:
        return sum(getattr(self, name) for name in NAMES) * -exp(r)

    kind = dataclasses.make_dataclass(
        "Named",
        [(name, float, float(2**i)) for i, name in enumerate(NAMES)],
        bases=(Divergence,),
        namespace={"value": value, "slope": slope},
        frozen=True,
    )
    case = make_case(6, 67)
    result, plain = solve(engine, case, divergence=kind()), solve(engine, case)
    total = 2 ** len(NAMES) - 1
    assert float(result.loss) == pytest.approx(total * float(plain.loss), rel=1e-5)
    torch.testing.assert_close(result.weight, total * plain.weight, rtol=1e-4, atol=1e-2)


def test_another_slope_is_not_taken_for_its_bases_difference_of_slopes() -> None:
    @dataclasses.dataclass(frozen=True)
    class Doubled(pocl_kernels.Alpha):
        def value(self, l: Value, r: Value) -> Value:
            return 2.0 * super().value(l, r)

        def slope(self, l: Value, r: Value) -> Value:
            return 2.0 * super().slope(l, r)

    case = make_case(6, 67)
    once, twice = (
        solve(pocl_kernels.fused_linear_divergence, case, divergence=d) for d in (pocl_kernels.Alpha(), Doubled())
    )
    assert once.hidden is not None
    torch.testing.assert_close(twice.hidden, 2 * once.hidden)
