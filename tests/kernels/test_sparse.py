"""Sparse teachers: every divergence and tail against float64, and the laws that they obey."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pocl_kernels import (
    DIVERGENCES,
    JSD,
    Alpha,
    AlphaBeta,
    Divergence,
    Head,
    MixedKL,
    SparseTeacher,
    fused_linear_divergence,
    reference,
)
from pocl_kernels.sparse import TAILS, shares_tail
from tests.kernels.cases import INSTANCES, NAMES, Case, assert_close, by_name, make_case, solve
from tests.kernels.cases import oracle as dense_oracle
from tests.kernels.sparse_cases import double, one_by_one, oracle, sparse, taught_by, teacher_log_probs, top_k

V = 311
EXACT = 1.5e-6


@functools.cache
def sparse_case(K: int, tail: str, **of_case: Any) -> Case:
    return sparse(make_case(12, V, **of_case), K, tail, ragged=K < V)


def kind_of(name: str) -> Divergence:
    divergence = INSTANCES[name]
    return DIVERGENCES[divergence]() if isinstance(divergence, str) else divergence


def finite_without_teacher(name: str) -> bool:
    return bool(torch.isfinite(kind_of(name).value(torch.tensor(-1.0), torch.tensor(-torch.inf))))


# --- Against float64 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail", "name"), [(tail, name) for tail in TAILS for name in (INSTANCES if tail == "bucket" else NAMES)]
)
def test_every_divergence_and_tail_equals_float64(engine: Any, tail: str, name: str) -> None:
    case, call = sparse_case(7, tail), {"divergence": INSTANCES[name], "ce_weight": 0.3}
    if tail in ("renormalise", "zero") and not finite_without_teacher(name):
        with pytest.raises(ValueError, match="is infinite where the teacher has no probability"):
            solve(engine, case, **call)
        return
    T = 1.0 if tail == "zero" else 2.0
    assert_close(solve(engine, case, temperature=T, **call), oracle(case, temperature=T, **call), EXACT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_all_tokens_named_are_the_dense_teacher(engine: Any, tail: str, name: str) -> None:
    case = make_case(12, V)
    everything = sparse(case, V, tail, ragged=False)
    for T in (0.5, 1.0, 4.0):
        dense = solve(engine, case, divergence=name, temperature=T, ce_weight=0.3)
        assert_close(solve(engine, everything, divergence=name, temperature=T, ce_weight=0.3), dense, EXACT)


@pytest.mark.parametrize("name", ["fkl", "rkl", "jsd", "alpha"])
@pytest.mark.parametrize("of_case", [{"spread": 5.0}, {"spread": 0.5}], ids=["sharp", "flat"])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_sharp_and_flat_models_are_as_exact_as_with_a_dense_teacher(
    name: str, of_case: dict[str, float], tail: str
) -> None:
    case, dense = sparse_case(16, tail, **of_case), make_case(12, V, **of_case)
    for T in (0.5, 1.0, 4.0):
        call = dict(divergence=name, temperature=T)
        errors = solve(fused_linear_divergence, case, **call).errors(oracle(case, **call))
        allowed = solve(fused_linear_divergence, dense, **call).errors(dense_oracle(dense, **call))
        assert all(error <= 2.0 * allowed[field] + 2e-6 for field, error in errors.items()), (errors, allowed)


def of_given_logits(case: Case) -> Case:
    """The same student with an identity for a head: its logits are exact, and what is lost is lost behind them."""
    logits = torch.nn.functional.linear(case.student_hidden, case.student_head.weight)
    return case.replace(student_hidden=logits, student_head=Head(torch.eye(V)))


@pytest.mark.parametrize("name", ["fkl", "rkl", "jsd", "skew_rkl", "alpha"])
@pytest.mark.parametrize("near", [1e-4, 1e-6])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_nothing_is_lost_behind_the_logits_of_a_student_near_its_teacher(
    engine: Any, tail: str, near: float, name: str
) -> None:
    case = of_given_logits(sparse_case(16, tail, near=near))
    errors = solve(engine, case, divergence=name).errors(oracle(case, divergence=name))
    assert errors["divergence"] <= 1.5e-6, errors
    assert max(errors["hidden"], errors["weight"]) <= 3e-5, errors


def test_double_precision_keeps_its_digits() -> None:
    for tail in TAILS:
        case = sparse_case(7, tail)
        for name in ("fkl", "jsd", "alpha_beta"):
            assert_close(
                solve(fused_linear_divergence, double(case), divergence=name, ce_weight=0.3),
                oracle(case, divergence=name, ce_weight=0.3),
                1e-11,
            )


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
@pytest.mark.parametrize(
    "of_case",
    [{"bias": True}, {"scale": 0.25}, {"softcap": 8.0}, {"bias": True, "scale": -2.0, "softcap": 30.0}],
    ids=str,
)
def test_every_form_of_head(engine: Any, of_case: dict[str, Any], tail: str) -> None:
    case = sparse_case(7, tail, **of_case)
    call = dict(divergence="jsd", temperature=1.5, ce_weight=0.3)
    assert_close(solve(engine, case, **call), oracle(case, **call), 3e-6)


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_rows_of_the_head_beyond_the_vocabulary_are_padding(engine: Any, tail: str) -> None:
    case = make_case(12, V, bias=True)
    few = top_k(teacher_log_probs(case)[:, : V - 20], 7, tail)
    case = taught_by(case, dataclasses.replace(few, vocab_size=V - 20))
    case = case.replace(labels=case.labels.clamp(max=V - 21))
    result = solve(engine, case, divergence="rkl", ce_weight=0.2)
    assert_close(result, oracle(case, divergence="rkl", ce_weight=0.2), EXACT)
    assert not result.weight[V - 20 :].any()
    ids = few.token_ids.clone()
    ids[:, 0] = V - 20
    with pytest.raises(ValueError, match=rf"token_ids must be in \[0, {V - 20}\)"):
        solve(engine, taught_by(case, SparseTeacher(ids, few.log_probs, tail, V - 20)))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_reductions_weights_and_upstream_gradients(engine: Any, tail: str, reduction: str) -> None:
    case = sparse_case(7, tail)
    weight = torch.linspace(0.0, 2.0, 12)
    upstream = torch.linspace(-1.0, 1.0, 12) if reduction == "none" else 3.0
    call = dict(divergence="skew_rkl", ce_weight=0.3, reduction=reduction, token_weight=weight, upstream=upstream)
    truth = solve(
        functools.partial(reference.fused_linear_divergence, divergence="skew_rkl"),
        double(case),
        **{k: v for k, v in call.items() if k != "divergence"},
    )
    assert_close(solve(engine, case, **call), truth, EXACT)


def test_a_label_is_right_only_if_no_token_at_all_is_likelier(engine: Any) -> None:
    case = sparse_case(7, "bucket")
    logits = case.student_hidden @ case.student_head.weight.T
    named = logits.gather(1, teacher_of(case)[0].clamp(0)).argmax(1, keepdim=True)
    labels = teacher_of(case)[0].clamp(0).gather(1, named).squeeze(1)
    labels[::2] = logits.argmax(1)[::2]
    case = case.replace(labels=labels)
    truth = oracle(case)
    assert 0.4 < float(truth.accuracy) < 0.9
    assert_close(solve(engine, case), truth, EXACT)


KINDS = {"fkl": lambda x: "fkl", "jsd": JSD, "alpha": Alpha, "mixed_kl": MixedKL}


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
@pytest.mark.parametrize("name", KINDS)
def test_numbers_of_one_a_token(engine: Any, name: str, tail: str) -> None:
    numbers, temperature = torch.linspace(0.1, 0.9, 12), torch.linspace(0.7, 3.0, 12)
    case = sparse_case(7, tail)
    truth = one_by_one(case, KINDS[name], numbers.tolist(), temperature.tolist(), ce_weight=0.3)
    call = dict(divergence=KINDS[name](numbers), temperature=temperature, ce_weight=0.3, reduction="sum")
    assert_close(solve(engine, case, **call), truth, 3e-6)


@pytest.mark.parametrize("wanted", [(), ("hidden",), ("weight",)], ids=str)
def test_only_the_gradients_that_are_wanted(engine: Any, wanted: tuple[str, ...]) -> None:
    case = sparse_case(7, "bucket")
    assert_close(solve(engine, case, wanted=wanted), oracle(case, wanted=wanted), EXACT)


def test_chunks_keep_every_row_its_own_tokens(engine: Any) -> None:
    case = sparse_case(7, "bucket")
    assert_close(solve(engine, case, workspace_mb=0.004), oracle(case), EXACT)


def test_backward_twice_gives_the_gradient_twice(engine: Any) -> None:
    case = sparse_case(7, "bucket")
    hidden = case.student_hidden.clone().requires_grad_()
    loss = engine(hidden, case.student_head, case.teacher_hidden, labels=case.labels).loss
    (first,) = torch.autograd.grad(loss, hidden, torch.tensor(2.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert reference.relative_error(first, 2.0 * second.double()) < 1e-6


def teacher_of(case: Case) -> tuple[Tensor, Tensor]:
    assert isinstance(case.teacher_hidden, SparseTeacher)
    return case.teacher_hidden.token_ids, case.teacher_hidden.log_probs


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own
def test_compiles_into_one_graph() -> None:
    case = sparse_case(7, "bucket")
    hidden, teacher = case.student_hidden.clone().requires_grad_(), teacher_of(case)

    def loss(hidden: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
        return fused_linear_divergence(hidden, weight, SparseTeacher(ids, log_probs), labels=case.labels).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, case.student_head.weight, *teacher)
    (gradient,) = torch.autograd.grad(compiled, hidden)
    assert reference.relative_error(gradient, oracle(case).hidden) < EXACT


# --- Laws -------------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, str, float]:
    """Logits of a student and log-probabilities of a teacher ``[3, V]``, K, a divergence and a temperature."""
    size = draw(st.integers(3, 17))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.3, 2.0, 8.0]))
    z, y = (torch.randn(3, size, generator=g, dtype=torch.float64) * scale for _ in range(2))
    K = draw(st.integers(1, size - 1))
    return z, torch.log_softmax(y, -1), K, draw(st.sampled_from(NAMES)), draw(st.sampled_from([0.5, 1.0, 3.0]))


def on_logits(z: Tensor, teacher: SparseTeacher, **call: Any) -> tuple[Tensor, Tensor]:
    """The divergence of each row and the gradient of their sum by the student's logits."""
    z = z.clone().requires_grad_()
    out = fused_linear_divergence(z, torch.eye(z.shape[1], dtype=z.dtype), teacher, reduction="none", **call)
    (gradient,) = torch.autograd.grad(out.loss.sum(), z)
    return out.divergence, gradient


@given(problems(), st.sampled_from(["bucket", "uniform"]), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_tokens_and_padding_change_nothing(problem: Any, tail: str, random: Any) -> None:
    z, log_probs, K, name, T = problem
    teacher = top_k(log_probs, K, tail, ragged=False)
    call = dict(divergence=name, temperature=T)
    order = list(range(K + 2))
    random.shuffle(order)
    ids = torch.cat([teacher.token_ids, torch.full((3, 2), -1)], 1)[:, order]
    padded = torch.cat([teacher.log_probs, torch.tensor([[float("nan"), 7.0]] * 3)], 1)[:, order]
    for found, expected in zip(
        on_logits(z, SparseTeacher(ids[:, : z.shape[1]], padded[:, : z.shape[1]], tail), **call)
        if z.shape[1] >= K + 2
        else on_logits(z, teacher, **call),
        on_logits(z, teacher, **call),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@given(problems())
@settings(max_examples=40, deadline=None)
def test_the_gradient_sums_to_zero_over_the_vocabulary(problem: Any) -> None:
    z, log_probs, K, name, T = problem
    for tail in ("bucket", "uniform"):
        _, gradient = on_logits(z, top_k(log_probs, K, tail), divergence=name, temperature=T)
        assert (gradient.sum(-1).abs() <= 1e-12 + 1e-11 * gradient.abs().sum(-1)).all()


@given(problems())
@settings(max_examples=40, deadline=None)
def test_to_know_less_never_makes_an_f_divergence_larger(problem: Any) -> None:
    """The data-processing inequality: outcomes that are told apart no more are no farther apart."""
    z, log_probs, K, name, _ = problem
    if name == "alpha_beta":
        return  # no f-divergence
    best = log_probs.topk(K, -1)
    bucket, _ = on_logits(z, SparseTeacher(best.indices, best.values), divergence=name)
    more = log_probs.topk(K + 1, -1)
    larger, _ = on_logits(z, SparseTeacher(more.indices, more.values), divergence=name)
    name, parameters = by_name(name)
    full = reference.divergence_rows(name, torch.log_softmax(z, -1), log_probs, **parameters)
    assert (bucket <= larger * (1 + 1e-9) + 1e-12).all()
    assert (larger <= full * (1 + 1e-9) + 1e-12).all()


def test_a_bucket_is_blind_to_how_the_student_spreads_it() -> None:
    teacher = SparseTeacher(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3]]).log())
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.5, 0.3, 0.1, 0.1]]).log()
    for row in z:
        D, gradient = on_logits(row[None], teacher)
        assert float(D) == pytest.approx(0.0, abs=1e-12)
        assert gradient.abs().max() < 1e-7


def test_the_unnormalised_teacher_gives_the_generalised_divergence() -> None:
    """For the forward KL ``sum p log(p / q) - sum p + 1``, with the gradient of the usual top-k loss."""
    case = sparse_case(7, "zero")
    ids, log_probs = teacher_of(case)
    z = torch.randn(12, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    there, p = ids >= 0, torch.where(ids >= 0, log_probs.double().exp(), 0.0)
    l = torch.log_softmax(z, -1).gather(1, ids.clamp(0))
    usual = torch.where(there, p * (log_probs.double() - l), 0.0).sum(1)
    (expected,) = torch.autograd.grad(usual.sum(), z)
    D, gradient = on_logits(z.detach(), SparseTeacher(ids, log_probs, "zero"))
    torch.testing.assert_close(D, (usual - p.sum(1) + 1.0).detach())
    torch.testing.assert_close(gradient, expected)


def test_a_teacher_that_is_merely_sure_has_a_tail(engine: Any) -> None:
    """A log-probability that float32 rounds to 0 leaves no tail, for which a reverse KL would be infinite."""
    case = make_case(2, V)
    sure = SparseTeacher(torch.tensor([[3, 5], [3, -1]]), torch.tensor([[-1e-9, -20.0], [0.0, 0.0]]))
    case = taught_by(case, sure).replace(labels=torch.tensor([1, 2]))
    result = solve(engine, case, divergence="rkl")
    assert_close(result, oracle(case, divergence="rkl"), EXACT)
    assert torch.isfinite(result.hidden).all()


def test_which_divergences_share_a_slope_over_a_tail_without_probability() -> None:
    for name, kind in DIVERGENCES.items():
        assert shares_tail(kind, "bucket")
        assert not shares_tail(kind, "uniform")
        assert shares_tail(kind, "zero") is shares_tail(kind, "renormalise") is (kind is not AlphaBeta), name
