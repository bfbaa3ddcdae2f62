"""Laws that every divergence obeys on every engine, whatever the numbers."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocl_kernels import JSD, Alpha, Head, SkewForwardKL, SkewReverseKL
from tests.kernels.cases import INSTANCES, NAMES, Case, Solution, assert_close, make_case, oracle, solve

# The engine is the same for all examples of a test; only the numbers vary.
law = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
seeds = st.integers(0, 7)
divergences = st.sampled_from(list(INSTANCES.values()))
temperatures = st.sampled_from([0.5, 1.0, 1.7, 4.0])
shares = st.sampled_from([0.0, 0.3, 1.0])
SAME = 2e-6  # two float32 evaluations of one number


def with_student(case: Case, **changes: Any) -> Case:
    return case.replace(student_head=dataclasses.replace(case.student_head, **changes))


def with_teacher(case: Case, **changes: Any) -> Case:
    return case.replace(teacher_head=dataclasses.replace(case.teacher_head, **changes))


@pytest.mark.parametrize("name", INSTANCES)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(engine: Any, name: str) -> None:
    case = make_case(16, 257, bias=True)
    case = case.replace(student_hidden=case.teacher_hidden, student_head=case.teacher_head)
    result = solve(engine, case, divergence=INSTANCES[name], temperature=2.0)
    # Second order in the rounding of l - r, but for tvd, where it is first order.
    assert 0.0 <= float(result.divergence) <= (1e-7 if name == "tvd" else 1e-13)
    assert float(result.bias.norm()) <= 1e-6
    assert float(result.weight.norm()) <= 1e-5


@law
@given(seeds, divergences, temperatures, shares)
def test_logit_gradient_rows_sum_to_zero(
    engine: Any, seed: int, divergence: Any, temperature: float, ce: float
) -> None:
    # The gradient of the bias is that of the logits when there is one row.
    case = make_case(1, 257, bias=True, scale=0.5, seed=seed)
    case = case.replace(labels=case.labels.clamp_min(0))
    gradient = solve(engine, case, divergence=divergence, temperature=temperature, ce_weight=ce).bias
    assert float(gradient.abs().sum()) > 1e-3
    assert abs(float(gradient.double().sum())) <= 2e-6 * float(gradient.abs().sum())


@law
@given(seeds, divergences, temperatures, st.sampled_from([-24.0, 8.0]))
def test_a_constant_added_to_all_logits_changes_nothing(
    engine: Any, seed: int, divergence: Any, temperature: float, shift: float
) -> None:
    case = make_case(8, 257, bias=True, seed=seed)
    moved = with_student(case, bias=case.student_head.bias + shift)
    moved = with_teacher(moved, bias=case.teacher_head.bias - shift)
    call = dict(divergence=divergence, temperature=temperature, ce_weight=0.3)
    # The shift coarsens the spacing of the logits themselves; the gradient of the hidden states sees the same weights.
    assert_close(solve(engine, moved, **call), solve(engine, case, **call), 2e-5)


@law
@given(seeds, divergences, temperatures)
def test_no_divergence_is_ever_negative(engine: Any, seed: int, divergence: Any, temperature: float) -> None:
    for near in (None, 1e-3, 1e-7):
        case = make_case(12, 257, near=near, seed=seed)
        out = solve(engine, case, divergence=divergence, temperature=temperature, reduction="none", wanted=())
        # Jeffreys' and Alpha's closed forms are differences: never below their own rounding.
        assert float(out.divergence.min()) >= -1e-7


def test_bounded_divergences_stay_within_their_bounds(engine: Any) -> None:
    case = make_case(16, 257, seed=5)
    opposed = with_student(case, weight=-9 * case.student_head.weight)
    for divergence, bound in (("tvd", 1.0), ("jsd", math.log(2)), ("alpha", 4.0), ("skew_fkl", math.log(10))):
        rows = solve(engine, opposed, divergence=divergence, reduction="none", wanted=()).divergence
        assert float(rows.max()) <= bound * (1 + 1e-6), divergence


@law
@given(seeds, temperatures)
def test_exchanging_the_models_exchanges_the_divergences(engine: Any, seed: int, temperature: float) -> None:
    case = make_case(8, 257, seed=seed)
    swapped = Case(case.teacher_hidden, case.teacher_head, case.student_hidden, case.student_head, case.labels)
    for ours, theirs in (
        ("fkl", "rkl"),
        ("tvd", "tvd"),
        ("jeffreys", "jeffreys"),
        (JSD(0.2), JSD(0.8)),
        (Alpha(0.3), Alpha(0.7)),
        (SkewForwardKL(0.4), SkewReverseKL(0.4)),
    ):
        pair = [
            float(solve(engine, x, divergence=d, temperature=temperature, wanted=()).divergence)
            for x, d in ((case, ours), (swapped, theirs))
        ]
        assert pair[0] == pytest.approx(pair[1], rel=SAME)


@pytest.mark.parametrize("workspace_mb", [1e-9, 0.02, 0.05])  # at the last the teacher is cut finer
def test_loss_is_independent_of_chunk_size(engine: Any, workspace_mb: float) -> None:
    case = make_case(48, 1031, bias=True)
    for divergence in ("fkl", "jsd"):
        call = dict(divergence=divergence, temperature=2.0, ce_weight=0.3)
        assert_close(solve(engine, case, workspace_mb=workspace_mb, **call), solve(engine, case, **call), SAME)


@law
@given(seeds, divergences, st.randoms(use_true_random=False))
def test_loss_is_independent_of_row_order(engine: Any, seed: int, divergence: Any, random: Any) -> None:
    case = make_case(16, 257, bias=True, seed=seed)
    order = list(range(16))
    random.shuffle(order)
    call = dict(divergence=divergence, ce_weight=0.3)
    truth, result = solve(engine, case, **call), solve(engine, case.rows(order), **call)
    assert_close(result, dataclasses.replace(truth, hidden=truth.hidden[order]), SAME)


@law
@given(seeds, divergences)
def test_loss_is_independent_of_the_order_of_the_vocabulary(engine: Any, seed: int, divergence: Any) -> None:
    case = make_case(16, 257, bias=True, seed=seed)
    order = torch.randperm(257, generator=torch.Generator().manual_seed(seed))
    moved = case
    for change in (with_student, with_teacher):
        head = moved.student_head if change is with_student else moved.teacher_head
        moved = change(moved, weight=head.weight[order], bias=head.bias[order])
    place = torch.empty(257, dtype=torch.int64).scatter_(0, order, torch.arange(257))
    moved = moved.replace(labels=torch.where(case.labels < 0, case.labels, place[case.labels.clamp_min(0)]))
    call = dict(divergence=divergence, ce_weight=0.3)
    truth, result = solve(engine, case, **call), solve(engine, moved, **call)
    assert_close(result, dataclasses.replace(truth, weight=truth.weight[order], bias=truth.bias[order]), SAME)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_is_independent_of_the_contents_of_ignored_rows(engine: Any, reduction: str, poison: float) -> None:
    check_ignored_rows(engine, reduction, poison)


def check_ignored_rows(loss: Any, reduction: str, poison: float) -> None:
    case = make_case(24, 257, bias=True)
    ignored = case.labels == -100
    assert 0 < int(ignored.sum()) < 24
    poisoned = case.replace(
        student_hidden=case.student_hidden.masked_fill(ignored[:, None], poison),
        teacher_hidden=case.teacher_hidden.masked_fill(ignored[:, None], poison),
    )
    call = dict(divergence="jsd", ce_weight=0.3, reduction=reduction, temperature=2.0)
    weight = torch.rand(24) + 0.5
    truth = solve(loss, case, token_weight=weight, **call)
    result = solve(loss, poisoned, token_weight=weight.masked_fill(ignored, poison), **call)
    for field in dataclasses.fields(Solution):
        assert torch.equal(getattr(result, field.name), getattr(truth, field.name)), field.name
    assert float(result.hidden[ignored].abs().max()) == 0.0
    assert float(result.hidden[~ignored].abs().max(-1).values.min()) > 0.0
    if reduction == "none":
        assert all(
            float(x[ignored].abs().max()) == 0.0 for x in (result.loss, result.divergence, result.student_entropy)
        )


@pytest.mark.parametrize("ignore_index", [-1, 0, 5])
def test_any_index_can_mean_ignored(engine: Any, ignore_index: int) -> None:
    case = make_case(24, 257, bias=True)
    labels = torch.where(case.labels == ignore_index, 9, case.labels)
    case = case.replace(labels=labels)
    renamed = case.replace(labels=labels.masked_fill(labels == -100, ignore_index))
    result = solve(engine, renamed, ce_weight=0.5, ignore_index=ignore_index)
    assert_close(result, solve(engine, case, ce_weight=0.5), 0.0)


@law
@given(seeds, divergences, shares)
def test_reductions_agree(engine: Any, seed: int, divergence: Any, ce: float) -> None:
    case = make_case(16, 257, bias=True, seed=seed)
    count = int((case.labels != -100).sum())
    call = dict(divergence=divergence, ce_weight=ce, temperature=1.7)
    mean, total, none = (solve(engine, case, reduction=r, **call) for r in ("mean", "sum", "none"))
    assert none.loss.shape == (16,)
    scaled = Solution(*(getattr(mean, f.name) * count for f in dataclasses.fields(Solution)))
    figures = [f.name for f in dataclasses.fields(Solution) if f.name not in Solution.GRADIENTS]
    summed = dataclasses.replace(none, **{name: getattr(none, name).sum() for name in figures})
    assert_close(total, scaled, SAME)
    assert_close(summed, total, SAME)


@pytest.mark.parametrize("normalizer", [40.0, torch.tensor(40), torch.tensor([40.0]).squeeze()])
def test_accumulated_parts_with_the_global_count_equal_the_whole(engine: Any, normalizer: Any) -> None:
    case = make_case(40, 257, bias=True)
    call = dict(divergence="skew_rkl", ce_weight=0.3, temperature=2.0)
    whole = solve(engine, case, normalizer=normalizer, **call)
    # Cut unevenly: the parts have very different numbers of valid tokens.
    parts = [solve(engine, case.rows(part), normalizer=normalizer, **call) for part in (slice(0, 5), slice(5, 40))]
    names = [f.name for f in dataclasses.fields(Solution) if f.name != "hidden"]
    summed = {name: getattr(parts[0], name) + getattr(parts[1], name) for name in names}
    summed["hidden"] = torch.cat([part.hidden for part in parts])
    assert_close(Solution(**summed), whole, SAME)
    assert_close(whole, oracle(case, normalizer=40.0, **call), SAME)


def test_a_token_of_weight_two_counts_like_two_tokens(engine: Any) -> None:
    case = make_case(12, 257, bias=True)
    case = case.replace(labels=case.labels.clamp_min(0))
    weight = torch.tensor([1.0, 2.0, 0.0] * 4)
    index = [i for i, w in enumerate(weight.tolist()) for _ in range(int(w))]
    call = dict(divergence="jeffreys", ce_weight=0.3, reduction="sum")
    weighted, repeated = solve(engine, case, token_weight=weight, **call), solve(engine, case.rows(index), **call)
    folded = torch.zeros_like(case.student_hidden).index_add_(0, torch.tensor(index), repeated.hidden)
    assert_close(weighted, dataclasses.replace(repeated, hidden=folded), SAME)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weights_of_any_sign_and_dtype(engine: Any, reduction: str) -> None:
    case = make_case(24, 257, bias=True)
    weight = torch.randn(24)
    call = dict(divergence="fkl", ce_weight=0.3, reduction=reduction, temperature=2.0)
    truth = oracle(case, token_weight=weight, **call)
    assert_close(solve(engine, case, token_weight=weight, **call), truth, 5 * SAME)
    assert_close(solve(engine, case, token_weight=weight.double().requires_grad_(), **call), truth, 5 * SAME)
    whole = solve(engine, case, token_weight=torch.full((24,), 3), **call)
    assert_close(whole, oracle(case, token_weight=torch.full((24,), 3.0), **call), SAME)


@law
@given(seeds, divergences, temperatures, st.sampled_from([0.2, 0.7]))
def test_loss_is_linear_in_the_share_of_cross_entropy(
    engine: Any, seed: int, divergence: Any, temperature: float, share: float
) -> None:
    case = make_case(12, 257, bias=True, seed=seed)
    call = dict(divergence=divergence, temperature=temperature)
    pure, hard, mixed = (solve(engine, case, ce_weight=w, **call) for w in (0.0, 1.0, share))
    assert float(hard.loss) == pytest.approx(float(hard.cross_entropy), rel=SAME)
    expected = {
        name: (1 - share) * getattr(pure, name) + share * getattr(hard, name)
        for name in ("loss", "hidden", "weight", "bias")
    }
    # Only the loss and the gradients mix: what is logged beside them is the same for every share.
    assert_close(mixed, dataclasses.replace(pure, **expected), 5 * SAME)


@law
@given(seeds, divergences, st.sampled_from([0.5, 2.0, 3.0]))
def test_temperature_squared_scales_the_divergence_and_its_gradient(
    engine: Any, seed: int, divergence: Any, temperature: float
) -> None:
    case = make_case(12, 257, bias=True, seed=seed)
    call = dict(divergence=divergence, temperature=temperature)
    scaled, plain = solve(engine, case, **call), solve(engine, case, scale_by_temperature=False, **call)
    square = temperature**2
    assert float(plain.loss) == float(plain.divergence) == float(scaled.divergence)
    names = ("loss", "hidden", "weight", "bias")
    assert_close(scaled, dataclasses.replace(plain, **{n: square * getattr(plain, n) for n in names}), SAME)


@law
@given(seeds, divergences, st.sampled_from([0.5, 2.0, 4.0]))
def test_temperature_divides_the_logits_of_both(engine: Any, seed: int, divergence: Any, temperature: float) -> None:
    case = make_case(12, 257, bias=True, seed=seed)
    cooled = with_student(case, scale=1 / temperature)
    cooled = with_teacher(cooled, scale=1 / temperature)
    warm = solve(engine, case, divergence=divergence, temperature=temperature, scale_by_temperature=False)
    cold = solve(engine, cooled, divergence=divergence)
    assert_close(dataclasses.replace(warm, cross_entropy=cold.cross_entropy), cold, SAME)
    assert float(warm.cross_entropy) == pytest.approx(float(oracle(case, wanted=()).cross_entropy), rel=SAME)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_padded_vocabulary_is_cut_whatever_the_surplus_rows_hold(engine: Any, side: str, name: str) -> None:
    case = make_case(16, 257, bias=True)
    head = case.student_head if side == "student" else case.teacher_head
    surplus = Head(
        torch.cat([head.weight, torch.full((21, head.hidden_size), math.nan)]),
        torch.cat([head.bias, torch.full((21,), math.inf)]),
    )
    padded = case.replace(**{f"{side}_head": surplus})
    call = dict(divergence=name, ce_weight=0.3, temperature=2.0)
    result, truth = solve(engine, padded, **call), solve(engine, case, **call)
    if side == "student":
        assert float(result.weight[257:].abs().max()) == float(result.bias[257:].abs().max()) == 0.0
        result = dataclasses.replace(result, weight=result.weight[:257], bias=result.bias[:257])
    assert_close(result, truth, SAME)


def test_loss_and_gradients_are_the_same_bits_every_time(engine: Any) -> None:
    case = make_case(48, 1031, bias=True)
    first, second = (solve(engine, case, divergence="alpha", ce_weight=0.3, workspace_mb=0.1) for _ in range(2))
    assert_close(first, second, 0.0)
