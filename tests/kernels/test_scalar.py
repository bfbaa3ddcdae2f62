"""The scalar language: one definition, three ways to run it, the same numbers."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pocl_kernels
from pocl_kernels import DIVERGENCES, Divergence, ForwardKL, scalar
from pocl_kernels.scalar import (
    GIVEN,
    Program,
    Recorder,
    Value,
    absolute,
    equal,
    exp,
    kl_term,
    log,
    log1p_unit,
    log_mixture,
    log_ratios,
    maximum,
    name_of,
    phi_series,
    sign,
    trace,
    weighted,
    where,
)
from tests.kernels.cases import INSTANCES, make_case, solve

INFINITY = math.inf
# Log-probabilities: equal, near, far, underflowing, masked on either side or on both.
GRID = [-0.0, -1e-30, -1e-4, -0.3, -0.31, -2.0, -2.0000002, -17.0, -87.0, -104.0, -500.0, -INFINITY]
PYTHON_SYNTAX = {
    "const": "{}", "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "divide({}, {})", "neg": "(-{})",
    "lt": "({} < {})", "eq": "({} == {})", "where": "({1} if {0} else {2})", "exp": "exp({})", "log": "log({})",
    "abs": "abs({})",
}  # fmt: skip


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    l, r = torch.meshgrid(*(torch.tensor(GRID, dtype=torch.float64),) * 2, indexing="ij")
    return l.flatten(), r.flatten()


ANCHOR = (-0.4, -1.7)


def run_python(program: Program, parameters: list[float], l: float, r: float) -> tuple[float, float]:
    """The traced program printed as Python and run in double precision, one number at a time."""
    lines = [line for part in program.render(PYTHON_SYNTAX, lambda name, code: f"{name} = {code}") for line in part]
    names: dict[str, Any] = {
        "exp": lambda x: math.exp(x) if x < 709 else INFINITY,
        "log": lambda x: math.log(x) if x > 0 else -INFINITY,
        "divide": lambda x, y: x / y if y else x * INFINITY,
        **program_arguments(program, parameters, l, r),
    }
    exec("\n".join(lines), names)
    return names["value"], names["slope"]


def program_arguments(program: Program, parameters: list[float], l: float, r: float) -> dict[str, float]:
    uniforms = dict(zip(map(name_of, program.uniforms), program.uniform_values(parameters), strict=True))
    return {"l": l, "r": r, "l0": ANCHOR[0], "r0": ANCHOR[1], **uniforms}


def shipped(name: str) -> Divergence:
    instance = INSTANCES[name]
    return DIVERGENCES[instance]() if isinstance(instance, str) else instance


@pytest.mark.parametrize("name", INSTANCES)
def test_printed_program_equals_eager_evaluation(name: str) -> None:
    divergence = shipped(name)
    program = trace(divergence)
    l, r = grid()
    for function, index, anchor in (("value", 0, ()), ("relative_slope", 1, ANCHOR)):
        eager = getattr(divergence, function)(l, r, *(torch.tensor(x, dtype=torch.float64) for x in anchor))
        printed = torch.tensor(
            [
                run_python(program, divergence.parameters(), a, b)[index]
                for a, b in zip(l.tolist(), r.tolist(), strict=True)
            ],
            dtype=torch.float64,
        )
        # The recorded series stop where float32 does: far below its spacing of 6e-8 at the probabilities themselves.
        tolerance = 1e-7 * eager.abs() + 2e-8 * (l.exp() + r.exp())
        agree = (printed == eager) | ((printed - eager).abs() <= tolerance)
        bad = torch.nonzero(~agree).flatten()
        assert not len(bad), [(l[i].item(), r[i].item(), printed[i].item(), eager[i].item()) for i in bad[:5]]


@pytest.mark.parametrize("name", INSTANCES)
def test_values_and_slopes_are_finite_wherever_the_mathematics_is(name: str) -> None:
    l, r = grid()
    divergence = shipped(name)
    value, slope = divergence.value(l, r), divergence.slope(l, r)
    assert not value.isnan().any()
    assert not slope.isnan().any()
    # Infinite only where one side gives a token no probability and the other does.
    masked = torch.isinf(l) ^ torch.isinf(r)
    assert torch.isfinite(value[~masked]).all()
    assert torch.isfinite(slope[~masked]).all()


@pytest.mark.parametrize("name", INSTANCES)
def test_slope_is_the_student_weighted_derivative_of_the_value(name: str) -> None:
    divergence = shipped(name)
    g = torch.Generator().manual_seed(0)
    l, r = (torch.log_softmax(2 * torch.randn(64, dtype=torch.float64, generator=g), 0) for _ in range(2))
    l = l.requires_grad_()
    # dD/dl of the value; slope = dD/dl up to a multiple of q, which the subtraction of q c removes.
    (derivative,) = torch.autograd.grad(divergence.value(l, r).sum(), l)
    with torch.no_grad():
        q, slope = l.exp(), divergence.slope(l, r)
        difference = (slope - q * slope.sum()) - (derivative - q * derivative.sum())
        assert float(difference.norm()) <= 1e-13 * max(1.0, float(derivative.norm()))


@pytest.mark.parametrize("name", INSTANCES)
def test_the_relative_slope_is_the_slope_but_for_a_multiple_of_q(name: str) -> None:
    divergence = shipped(name)
    g = torch.Generator().manual_seed(1)
    l, r = (torch.log_softmax(2 * torch.randn(64, dtype=torch.float64, generator=g), 0) for _ in range(2))
    q, top = l.exp(), l.argmax()
    slope, relative = divergence.slope(l, r), divergence.relative_slope(l, r, l[top], r[top])
    multiple = ((relative - slope) / q)[top]
    torch.testing.assert_close(relative, slope + multiple * q, rtol=1e-12, atol=1e-14)
    if name != "fkl":  # whose c is known
        assert abs(float(relative[top])) <= 1e-15


def test_common_subexpressions_are_recorded_once() -> None:
    @dataclasses.dataclass(frozen=True)
    class Repeats(Divergence):
        def value(self, l: Value, r: Value) -> Value:
            return exp(l) * exp(r) + exp(l) * exp(r)

        def slope(self, l: Value, r: Value) -> Value:
            return exp(l) * exp(r)

        def relative_slope(self, l: Value, r: Value, l0: Value, r0: Value) -> Value:
            return self.slope(l, r)

    program = trace(Repeats())
    assert sorted(node.op for node in program.nodes) == ["add", "exp", "exp", "input", "input", "mul"]
    _, body = program.render(PYTHON_SYNTAX, lambda name, code: f"{name} = {code}")
    assert len(body) == 6


def test_what_depends_on_parameters_alone_is_hoisted_out_of_the_loop() -> None:
    program = trace(shipped("skew_fkl"))
    row, body = program.render(PYTHON_SYNTAX, lambda name, code: f"{name} = {code}")
    # On the host what is the parameters' alone, once a row what is the anchor's, and the rest for each entry.
    assert any(node.op == "log" for node in program.nodes)
    assert not any("log(" in line for line in (*row, *body))
    assert any("exp(" in line for line in row)
    assert not any(re.search(r"\bl\b|\br\b", line) for line in row)
    assert all(re.search(r"\bl\b|\br\b|\bt\d+\b", line) for line in body)


def test_what_a_kernel_has_at_hand_is_not_computed_again() -> None:
    _, body = trace(shipped("rkl")).render(PYTHON_SYNTAX, lambda name, code: f"{name} = {code}", given=GIVEN)
    assert not any("l - r" in line or "r - l" in line for line in body)
    assert any(re.search(r"\bd\b", line) for line in body)


def test_what_no_result_needs_is_dropped() -> None:
    @dataclasses.dataclass(frozen=True)
    class Wasteful(Divergence):
        unused: float = 3.0

        def value(self, l: Value, r: Value) -> Value:
            log(exp(r) * self.unused)
            return exp(l)

        def slope(self, l: Value, r: Value) -> Value:
            return 0.0 * l

        def relative_slope(self, l: Value, r: Value, l0: Value, r0: Value) -> Value:
            return self.slope(l, r)

    assert not any(node.op in ("log", "param") for node in trace(Wasteful()).nodes)


def test_one_key_for_one_program_whatever_the_parameters() -> None:
    programs = {name: trace(shipped(name)).key for name in INSTANCES}
    assert programs["jsd"] == programs["jsd(0.1)"] == programs["jsd(0.9)"]
    assert len(set(programs.values())) == len(DIVERGENCES)


# --- The functions themselves ---


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (exp, (0.5,), math.exp(0.5)),
        (log, (0.0,), -INFINITY),
        (absolute, (-2.0,), 2.0),
        (maximum, (1.0, 3.0), 3.0),
        (maximum, (3.0, 1.0), 3.0),
        (equal, (2.0, 2.0), 1.0),
        (sign, (-3.0,), -1.0),
        (sign, (0.0,), 0.0),
        (sign, (5.0,), 1.0),
        (where, (True, 1.0, 2.0), 1.0),
        (weighted, (0.0, -INFINITY), 0.0),
        (weighted, (2.0, 3.0), 6.0),
        (log1p_unit, (0.25,), math.log(1.25)),
        (phi_series, (0.25,), math.exp(0.25) - 1.25),
        (kl_term, (0.0, -INFINITY, 0.3, math.log(0.3)), 0.3),
        (kl_term, (0.2, math.log(0.2), 0.3, math.log(0.3)), 0.2 * math.log(2 / 3) + 0.1),
        (log_mixture, (math.log(0.2), math.log(0.6), 0.25), math.log(0.5)),
    ],
)
def test_functions_agree_on_numbers_tensors_and_mixtures(
    function: Callable[..., Any], arguments: tuple[Any, ...], expected: float
) -> None:
    assert function(*arguments) == pytest.approx(expected, rel=1e-9)
    tensors = [
        torch.tensor([float(a)] * 2, dtype=torch.float64) if not isinstance(a, bool) else torch.tensor([a] * 2)
        for a in arguments
    ]
    assert function(*tensors).tolist() == pytest.approx([expected] * 2, rel=1e-9)
    for i in range(len(arguments)):  # any one of the arguments may be a plain number
        mixed = [tensors[j] if j == i else arguments[j] for j in range(len(arguments))]
        result = torch.as_tensor(function(*mixed), dtype=torch.float64).expand(2)
        assert result.tolist() == pytest.approx([expected] * 2, rel=1e-9)


@pytest.mark.parametrize("weight", [0.0, 1e-6, 0.1, 0.5, 0.9, 1.0])
def test_log_mixture_at_every_weight_and_at_masked_tokens(weight: float) -> None:
    l, r = grid()
    expected = torch.log(weight * l.exp() + (1 - weight) * r.exp())
    shift = torch.maximum(l, r).clamp_min(-1e3)  # the sum of exponentials underflows far from zero
    scaled = torch.log(weight * (l - shift).exp() + (1 - weight) * (r - shift).exp()) + shift
    result = log_mixture(l, r, weight)
    torch.testing.assert_close(result, torch.where(torch.isinf(expected), scaled, expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 1e-6, 0.1, 0.5, 0.9, 1.0])
def test_log_ratios_at_every_weight_and_at_masked_tokens(weight: float) -> None:
    l, r = grid()
    m = log_mixture(r, l, weight)
    by_p, by_q = log_ratios(l, r, weight)
    for result, side in ((by_p, r), (by_q, l)):
        counts = ~torch.isinf(side)
        result = torch.as_tensor(result, dtype=torch.float64).expand_as(l)
        torch.testing.assert_close(result[counts], (m - side)[counts], rtol=1e-12, atol=1e-13)


def test_phi_keeps_its_digits_near_zero() -> None:
    x = torch.tensor([1e-8, -1e-8, 1e-3, -0.499, 0.499], dtype=torch.float64)
    terms = functools.reduce(
        lambda total, k: total + x**k / float(math.factorial(k)), range(30, 1, -1), torch.zeros(5).double()
    )
    torch.testing.assert_close(phi_series(x), terms, rtol=1e-15, atol=0)
    torch.testing.assert_close(phi_series(x.float()).double(), terms, rtol=1e-6, atol=0)


@dataclasses.dataclass(frozen=True)
class Tripled(ForwardKL):
    factor: float = 3.0

    def value(self, l: Value, r: Value) -> Value:
        return self.factor * super().value(l, r)

    def slope(self, l: Value, r: Value) -> Value:
        return self.factor * super().slope(l, r)


def test_another_function_is_not_taken_for_its_bases_kl() -> None:
    assert Tripled.kl_weights is None
    assert ForwardKL.kl_weights == (1.0, 0.0)


def test_the_kernels_see_the_fields_as_they_are() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Halved(Tripled):
        def __post_init__(self) -> None:
            object.__setattr__(self, "factor", self.factor / 2)

    case = make_case(6, 67)
    once = solve(pocl_kernels.fused_linear_divergence, case)
    halved = solve(pocl_kernels.fused_linear_divergence, case, divergence=Halved(factor=3.0))
    torch.testing.assert_close(halved.loss, 1.5 * once.loss)
    torch.testing.assert_close(halved.hidden, 1.5 * once.hidden)


def test_a_field_that_is_no_number_is_named() -> None:
    @dataclasses.dataclass(frozen=True)
    class Moody(Tripled):
        mood: str = "good"

    with pytest.raises(TypeError, match=r"Moody.mood is 'good'.*numbers.*class variable"):
        Moody().parameters()


# --- What is refused ---


def defined(value: Callable[[Any, Any], Any]) -> Divergence:
    @dataclasses.dataclass(frozen=True)
    class Defined(Divergence):
        parameter: float = 0.5

        def value(self, l: Value, r: Value) -> Value:
            return value(l, r)

        def slope(self, l: Value, r: Value) -> Value:
            return -exp(r)

    return Defined()


def test_pythons_abs_is_the_absolute_value() -> None:
    recorded = [trace(defined(lambda l, r, f=f: f(l - r))) for f in (abs, absolute)]
    assert [node.op for node in recorded[0].nodes] == [node.op for node in recorded[1].nodes]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda l, r: exp(l) if l < r else exp(r), TypeError, "where"),
        (lambda l, r: max(l, r), TypeError, "maximum"),
        (lambda l, r: l**3, TypeError, r"squares.*exp\(y \* log\(x\)\)"),
        (lambda l, r: l**0.5, TypeError, "squares"),
        (lambda l, r: "nats", TypeError, r"Defined\.value returned str"),
        (lambda l, r: None, TypeError, r"Defined\.value returned NoneType"),
        (lambda l, r: l + INFINITY, ValueError, r"constant inf.*weighted\(\) or where\(\)"),
        (lambda l, r: where(l < r, math.nan, l), ValueError, "constant nan"),
        (lambda l, r: torch.exp(l), TypeError, "Scalar"),
        (lambda l, r: math.exp(l), TypeError, "Scalar"),
    ],
)
def test_what_cannot_be_recorded_is_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trace(defined(value))


def test_an_ordinary_comparison_for_equality_is_recorded_like_equal() -> None:
    # `l == r` on recorded values would otherwise be a silent False.
    for value in (lambda l, r: where(l == r, 1.0, 2.0), lambda l, r: where(equal(l, r), 1.0, 2.0)):
        program = trace(defined(value))
        assert run_python(program, [0.5], -1.0, -1.0)[0] == 1.0
        assert run_python(program, [0.5], -1.0, -2.0)[0] == 2.0
    with pytest.raises(TypeError):
        trace(defined(lambda l, r: where(l != r, 1.0, 2.0)))


def test_recorders_share_nodes_by_operation_and_arguments() -> None:
    recorder = Recorder()
    a, b = recorder.leaf("input", "l"), recorder.leaf("input", "r")
    assert a + b is a + b
    assert (a + b) is not (b + a)
    assert a + 1 is a + 1.0
    assert -a is -a
    assert (a > b) is (b < a)
    assert a**2 is a * a
    assert (1.0 - a).op == "sub"
    assert (2.0 / a).args[1] is a


def test_the_module_offers_what_its_text_names() -> None:
    for name in re.findall(r":func:`(\w+)`", scalar.__doc__ or ""):
        assert callable(getattr(scalar, name))
