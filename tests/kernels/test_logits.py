"""The divergence of logits at hand: what the linear loss says with an identity for a head, wherever the rows lie."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import pocl_kernels
from pocl_kernels import JSD, Head, fused_divergence
from pocl_kernels.cpu import compiler
from pocl_kernels.reference import relative_error
from tests.kernels.cases import INSTANCES, Case, assert_close, make_case, oracle, solve
from tests.kernels.test_memory import peak_mib

CALL = {"divergence": "jsd", "temperature": 2.0, "ce_weight": 0.3}
law = settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
Loss = Callable[..., Any]


@pytest.fixture(params=["compiled", "eager", "triton"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Loss:
    """The loss by one kind of kernel, called like the linear one with heads that are not looked at."""
    if request.param == "compiled" and compiler.compiler() is None:
        pytest.skip("this machine has no C compiler")
    if request.param == "eager":
        monkeypatch.setattr(compiler, "load", lambda *_: None)
    backend = "triton" if request.param == "triton" else "auto"

    def loss(student: Tensor, head: Head, teacher: Tensor, teacher_head: Head, **arguments: Any) -> Any:
        return fused_divergence(student, teacher, backend=backend, **arguments)

    loss.backend = backend  # type: ignore[attr-defined]
    return loss


def of_logits(case: Case) -> Case:
    """Both models' logits as hidden states under an identity."""
    z, y = (
        h @ head.weight.T
        for h, head in (
            (case.student_hidden, case.student_head),
            (case.teacher_hidden, case.teacher_head),
        )
    )
    eyes = [Head(torch.eye(x.shape[-1], dtype=x.dtype)) for x in (z, y)]
    return Case(z, eyes[0], y, eyes[1], case.labels)


def close(loss: Loss, case: Case, tolerance: float, **arguments: Any) -> None:
    result = solve(loss, case, wanted=("hidden",), **arguments)
    assert_close(result, oracle(case, wanted=("hidden",), **arguments), tolerance)


CASE = of_logits(make_case(9, 131))
WIDE = of_logits(make_case(5, 4099, seed=1))  # several blocks, the last one ragged
EVEN = of_logits(make_case(5, 4096, seed=2))  # rows that are read 128 bits at a time


@pytest.mark.parametrize("name", INSTANCES)
def test_every_divergence_equals_its_definition_in_float64(kernel: Loss, name: str) -> None:
    close(kernel, CASE, 3e-6, divergence=INSTANCES[name], temperature=2.0, ce_weight=0.3)


@pytest.mark.parametrize("case", [WIDE, EVEN], ids=["ragged", "aligned"])
@pytest.mark.parametrize("name", ["fkl", "skew_rkl"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vocabularies_of_several_blocks(kernel: Loss, case: Case, name: str, reduction: str) -> None:
    upstream = torch.linspace(-1.0, 2.0, 5) if reduction == "none" else 1.7
    truth = oracle.__wrapped__(
        case, wanted=("hidden",), divergence=name, reduction=reduction, upstream=upstream, temperature=0.7
    )
    result = solve(
        kernel, case, wanted=("hidden",), divergence=name, reduction=reduction, upstream=upstream, temperature=0.7
    )
    assert_close(result, truth, 3e-6)


def test_double_precision_keeps_its_digits(kernel: Loss) -> None:
    close(kernel, CASE.to(torch.float64), 1e-12, **CALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", [None, torch.float32])
@pytest.mark.parametrize("case", [CASE, EVEN], ids=["ragged", "aligned"])
def test_16_bit_logits_lose_the_rounding_of_the_gradient_alone(
    kernel: Loss, case: Case, dtype: torch.dtype, teacher: torch.dtype | None
) -> None:
    case = case.replace(
        student_hidden=case.student_hidden.to(dtype), teacher_hidden=case.teacher_hidden.to(teacher or dtype)
    )
    result = solve(kernel, case, wanted=("hidden",), **CALL)
    truth = oracle(case, wanted=("hidden",), **CALL)
    assert result.hidden.dtype == dtype
    assert_close(dataclasses.replace(result, hidden=truth.hidden), truth, 3e-6)
    # A gradient is rounded once; Triton's interpreter cuts where a GPU rounds to the nearest.
    once = relative_error(truth.hidden.to(dtype), truth.hidden)
    bound = 0.6 * torch.finfo(dtype).eps if kernel.backend == "triton" else 1.05 * once
    assert relative_error(result.hidden, truth.hidden) <= bound


def test_float16_gradients_are_rounded_after_the_loss_scale(kernel: Loss) -> None:
    case = CASE.replace(student_hidden=CASE.student_hidden.half(), teacher_hidden=CASE.teacher_hidden.half())
    call = dict(wanted=("hidden",), normalizer=2.0**20, upstream=2.0**16)
    result, truth = solve(kernel, case, **call), oracle(case, **call)
    assert relative_error(result.hidden, truth.hidden) < 1e-3
    # What float16 cannot hold is infinite, so that a loss scaler sees it.
    overflown = solve(kernel, case, wanted=("hidden",), reduction="sum", upstream=2.0**20)
    assert overflown.hidden.isinf().any()


# --- Where the rows lie ---


def with_neighbours(x: Tensor, columns: int) -> Tensor:
    """``[3, 3, V]`` of the rows, as a part of a larger tensor that holds NaN elsewhere."""
    V = x.shape[-1]
    large = torch.full((4, 5, V + columns), torch.nan, dtype=x.dtype)
    large[:3, 1:4, 8 : 8 + V] = x.view(3, 3, V)
    return large[:3, 1:4, 8 : 8 + V]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "last position cut off": lambda x: torch.cat([x.view(3, 3, -1), x.new_full((3, 1, x.shape[-1]), torch.nan)], 1)[
        :, :-1
    ],
    "sequence first": lambda x: x.view(3, 3, -1).transpose(0, 1).contiguous().transpose(0, 1),
    "part of a larger tensor": lambda x: with_neighbours(x, 16),
    "rows of odd width": lambda x: with_neighbours(x, 9),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["beside", "inplace"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("vocab", [128, 131])
def test_rows_are_read_and_written_where_they_lie(kernel: Loss, layout: str, vocab: int, inplace: bool) -> None:
    case = of_logits(make_case(9, vocab, seed=3))
    truth = oracle(case, wanted=("hidden",), **CALL)
    student, teacher = LAYOUTS[layout](case.student_hidden), LAYOUTS[layout](case.teacher_hidden)
    base = student._base if student._base is not None else student
    before = base.clone()
    logits, seen = student.detach().requires_grad_(), []
    part = Same.apply(logits, seen)
    out = kernel(part, None, teacher, None, labels=case.labels.view(3, 3), inplace=inplace, **CALL)
    out.loss.backward()
    (gradient,) = seen
    assert relative_error(gradient.reshape(9, -1), truth.hidden) < 3e-6
    assert relative_error(out.loss, truth.loss) < 3e-6
    assert (gradient.data_ptr() == student.data_ptr()) == inplace
    if inplace:
        student.copy_(before.as_strided(student.shape, student.stride(), student.storage_offset()))
    assert torch.equal(base.nan_to_num(7.0), before.nan_to_num(7.0)), "a neighbour was written"


class Same(torch.autograd.Function):
    """Hands its input on as a tensor that is no leaf, of the same memory and strides; keeps the gradient it gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Tensor]) -> Tensor:
        ctx.seen = seen
        result = x.detach()
        return result.as_strided(x.shape, x.stride(), x.storage_offset())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(gradient)
        return gradient.clone(), None


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("inplace", [False, True], ids=["beside", "inplace"])
def test_padding_of_either_vocabulary_takes_no_probability(kernel: Loss, side: str, inplace: bool) -> None:
    truth = solve(kernel, CASE, wanted=("hidden",), **CALL)
    padded = {"student": CASE.student_hidden, "teacher": CASE.teacher_hidden}
    padded[side] = torch.cat([padded[side], torch.full((9, 16), torch.nan)], 1)
    leaf = padded["student"].clone().requires_grad_()
    out = kernel(leaf * 1, None, padded["teacher"], None, labels=CASE.labels, inplace=inplace, **CALL)
    out.loss.backward()
    assert relative_error(out.loss, truth.loss) < 1e-6
    assert relative_error(leaf.grad[:, :131], truth.hidden) < 1e-6
    assert not leaf.grad[:, 131:].any()


@pytest.mark.parametrize("inplace", [False, True], ids=["beside", "inplace"])
def test_ignored_rows_are_not_looked_at_and_get_a_gradient_of_zero(kernel: Loss, inplace: bool) -> None:
    truth = solve(kernel, CASE, wanted=("hidden",), **CALL)
    ignored = CASE.labels == -100
    assert ignored.any()
    leaf = CASE.student_hidden.masked_fill(ignored[:, None], torch.nan).requires_grad_()
    teacher = CASE.teacher_hidden.masked_fill(ignored[:, None], torch.inf)
    out = kernel(leaf.clone(), None, teacher, None, labels=CASE.labels, inplace=inplace, **CALL)
    out.loss.backward()
    assert torch.equal(out.loss, truth.loss)
    assert torch.equal(leaf.grad, truth.hidden)
    nothing = torch.full_like(CASE.labels, -100)
    leaf = CASE.student_hidden.clone().requires_grad_()
    out = kernel(leaf.clone(), None, teacher, None, labels=nothing, inplace=inplace, **CALL)
    out.loss.backward()
    assert not out.loss
    assert not leaf.grad.any()


def test_tokens_masked_by_both_models_and_rows_without_weight(kernel: Loss) -> None:
    masked = CASE.replace(
        student_hidden=CASE.student_hidden.index_fill(1, torch.arange(3, 40), -torch.inf),
        teacher_hidden=CASE.teacher_hidden.index_fill(1, torch.arange(3, 40), -torch.inf),
        labels=torch.full_like(CASE.labels, 100),
    )
    weight = torch.tensor([1.0, 0.0, 2.0] * 3)
    result = solve(kernel, masked, wanted=("hidden",), divergence="skew_fkl", token_weight=weight)
    kept = [i for i in range(131) if not 3 <= i < 40]
    small = masked.replace(
        student_hidden=masked.student_hidden[:, kept],
        student_head=Head(torch.eye(94)),
        teacher_hidden=masked.teacher_hidden[:, kept],
        teacher_head=Head(torch.eye(94)),
        labels=torch.full_like(CASE.labels, 63),
    )
    truth = oracle.__wrapped__(small, wanted=("hidden",), divergence="skew_fkl", token_weight=weight)
    assert relative_error(result.loss, truth.loss) < 3e-6
    assert relative_error(result.hidden[:, kept], truth.hidden) < 3e-6
    assert not result.hidden[:, 3:40].any()
    assert not result.hidden[1::3].any()


# --- Laws ---


@law
@given(
    st.integers(0, 5),
    st.sampled_from(list(INSTANCES.values())),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from(["mean", "sum", "none"]),
)
def test_it_is_the_linear_loss_with_an_identity_for_a_head(
    kernel: Loss, seed: int, divergence: Any, temperature: float, ce: float, reduction: str
) -> None:
    case = of_logits(make_case(6, 67, seed=seed))
    call = dict(
        wanted=("hidden",), divergence=divergence, temperature=temperature, ce_weight=ce, reduction=reduction,
        token_weight=torch.linspace(0.5, 2.0, 6),
    )  # fmt: skip
    assert_close(solve(kernel, case, **call), solve(pocl_kernels.fused_linear_divergence, case, **call), 2e-6)


@law
@given(st.integers(0, 5), st.sampled_from(list(INSTANCES.values())), st.floats(-40, 40), st.floats(-40, 40))
def test_a_constant_on_all_logits_of_a_row_changes_nothing(
    kernel: Loss, seed: int, divergence: Any, a: float, b: float
) -> None:
    case = of_logits(make_case(6, 67, seed=seed))
    moved = case.replace(
        student_hidden=case.student_hidden + a * torch.linspace(-1, 1, 6)[:, None],
        teacher_hidden=case.teacher_hidden + b,
    )
    call = dict(wanted=("hidden",), divergence=divergence, temperature=1.5, ce_weight=0.3)
    result, truth = solve(kernel, moved, **call), solve(kernel, case, **call)
    assert_close(result, truth, 3e-5)  # the shift coarsens the spacing of the logits themselves
    assert float(result.hidden.double().sum(1).abs().max()) <= 2e-6 * float(truth.hidden.abs().sum(1).max())


@law
@given(st.integers(0, 5), st.sampled_from(list(INSTANCES.values())), st.booleans(), st.floats(-3, 3))
def test_inplace_changes_neither_loss_nor_gradient(
    kernel: Loss, seed: int, divergence: Any, none: bool, upstream: float
) -> None:
    case, grads = of_logits(make_case(6, 67, seed=seed)), []
    for inplace in (False, True):
        leaf = case.student_hidden.clone().requires_grad_()
        out = kernel(
            leaf * 1, None, case.teacher_hidden, None, labels=case.labels, inplace=inplace,
            reduction="none" if none else "mean", **CALL | {"divergence": divergence},
        )  # fmt: skip
        (out.loss * upstream).sum().backward()
        grads.append((out.loss, leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_numbers_of_each_token_are_its_own(kernel: Loss) -> None:
    temperature, beta = torch.linspace(0.7, 3.0, 9), torch.linspace(0.0, 1.0, 9)
    call = dict(wanted=("hidden",), ce_weight=0.3, reduction="sum")
    result = solve(kernel, CASE, divergence=JSD(beta), temperature=temperature, **call)
    parts = [
        oracle.__wrapped__(CASE.rows(slice(i, i + 1)), divergence=JSD(float(beta[i])), temperature=t, **call)
        for i, t in enumerate(temperature.tolist())
    ]
    assert relative_error(result.loss, sum(p.loss for p in parts)) < 3e-6
    assert relative_error(result.hidden, torch.cat([p.hidden for p in parts])) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True], ids=["beside", "inplace"])
def test_nothing_of_the_size_of_the_logits_is_made_but_the_gradient(
    kernel: Loss, request: pytest.FixtureRequest, inplace: bool, dtype: torch.dtype
) -> None:
    if kernel.backend == "triton":
        pytest.skip("the interpreter's own copies are counted too")
    rows, V = 512, 40_000
    logits = torch.randn(rows, V).to(dtype).requires_grad_() * 1
    teacher = torch.randn(rows, V).to(dtype)
    labels = torch.arange(rows).masked_fill(torch.arange(rows) % 2 == 0, -100)

    def run() -> None:
        out = kernel(logits, None, teacher, None, inplace=inplace, labels=labels, **CALL)
        torch.autograd.grad(out.loss, logits)

    gradient = 0 if inplace else rows * V * dtype.itemsize / 2**20
    # Rows of threads; or of the eager path a dozen sub-blocks, and chunks of 16-bit logits, of 4 MiB.
    scratch = 70 if "eager" in request.node.name else 1 if dtype == torch.float32 else 24
    assert peak_mib(run) <= gradient + scratch
