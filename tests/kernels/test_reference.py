"""The oracle against numbers worked by hand and other projects' formulas: every kernel test leans on it."""

import math

import pytest
import torch
from torch import Tensor

from pocl_kernels import Head, reference
from pocl_kernels.divergences import DIVERGENCES

# Two tokens, teacher p = (3/4, 1/4), student q = (1/2, 1/2).
P, Q = (0.75, 0.25), (0.5, 0.5)
KL_PQ = 0.75 * math.log(1.5) - 0.25 * math.log(2)
KL_QP = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)


def rows(*probabilities: tuple[float, ...]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def direct(p: Tensor, q: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """KL(p, m) and KL(q, m) with m = weight p + (1 - weight) q, over the probabilities themselves."""
    m = weight * p + (1 - weight) * q
    return (p * (p / m).log()).sum(-1), (q * (q / m).log()).sum(-1)


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("fkl", {}, KL_PQ),
        ("rkl", {}, KL_QP),
        ("jeffreys", {}, KL_PQ + KL_QP),
        ("tvd", {}, 0.25),
        # m = 0.2 p + 0.8 q = (0.55, 0.45)
        ("skew_fkl", {"skew": 0.2}, 0.75 * math.log(0.75 / 0.55) + 0.25 * math.log(0.25 / 0.45)),
        # m = 0.2 q + 0.8 p = (0.7, 0.3)
        ("skew_rkl", {"skew": 0.2}, 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)),
        # beta = 0.6 weights the teacher: m = 0.6 p + 0.4 q = (0.65, 0.35)
        (
            "jsd",
            {"beta": 0.6},
            0.6 * (0.75 * math.log(0.75 / 0.65) + 0.25 * math.log(0.25 / 0.35))
            + 0.4 * (0.5 * math.log(0.5 / 0.65) + 0.5 * math.log(0.5 / 0.35)),
        ),
        ("alpha", {"alpha": 0.5}, 4 * (1 - math.sqrt(0.375) - math.sqrt(0.125))),
        ("alpha", {"alpha": 0.25}, (1 - 0.75**0.25 * 0.5**0.75 - 0.25**0.25 * 0.5**0.75) / (0.25 * 0.75)),
    ],
)
def test_divergences_equal_the_values_worked_by_hand(name: str, parameters: dict[str, float], expected: float) -> None:
    assert float(reference.divergence_rows(name, rows(Q), rows(P), **parameters)) == pytest.approx(expected, rel=1e-14)


def test_disjoint_distributions_reach_the_known_bounds() -> None:
    l, r = rows((1.0, 0.0)), rows((0.0, 1.0))
    assert float(reference.divergence_rows("tvd", l, r)) == 1.0
    assert float(reference.divergence_rows("jsd", l, r, beta=0.5)) == pytest.approx(math.log(2), rel=1e-15)
    assert float(reference.divergence_rows("alpha", l, r, alpha=0.25)) == pytest.approx(1 / (0.25 * 0.75), rel=1e-15)
    assert float(reference.divergence_rows("skew_fkl", l, r, skew=0.1)) == pytest.approx(math.log(10), rel=1e-15)
    assert math.isinf(reference.divergence_rows("fkl", l, r))


def test_a_token_that_both_exclude_adds_nothing() -> None:
    for name in reference.divergence_names():
        longer = reference.divergence_rows(name, rows((*Q, 0.0)), rows((*P, 0.0)))
        torch.testing.assert_close(longer, reference.divergence_rows(name, rows(Q), rows(P)), rtol=1e-15, atol=0)


def test_the_oracle_knows_the_divergences_of_the_package_and_no_others() -> None:
    assert set(reference.divergence_names()) == set(DIVERGENCES)
    with pytest.raises(ValueError, match="hellinger"):
        reference.divergence_rows("hellinger", rows(Q), rows(P))


@pytest.fixture
def probabilities() -> tuple[Tensor, Tensor]:
    z = torch.randn(2, 5, 30, dtype=torch.float64) * 2
    p, q = torch.softmax(z, dim=-1)
    return p, q


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_beta_is_that_of_trl(beta: float, probabilities: tuple[Tensor, Tensor]) -> None:
    # TRL's generalized_jsd_loss: mixture = (1 - beta) student + beta teacher; beta KL(teacher) + (1 - beta) KL(student)
    p, q = probabilities
    kl_teacher, kl_student = direct(p, q, beta)
    expected = beta * kl_teacher + (1 - beta) * kl_student
    torch.testing.assert_close(
        reference.divergence_rows("jsd", q.log(), p.log(), beta=beta), expected, rtol=1e-12, atol=0
    )


def test_distillms_jsd_weight_is_one_minus_beta(probabilities: tuple[Tensor, Tensor]) -> None:
    # js_distance(lam): m = lam student + (1 - lam) teacher, lam KL(student, m) + (1 - lam) KL(teacher, m)
    p, q = probabilities
    lam = 0.3
    kl_student, kl_teacher = direct(q, p, lam)
    expected = lam * kl_student + (1 - lam) * kl_teacher
    ours = reference.divergence_rows("jsd", q.log(), p.log(), beta=1 - lam)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_distillms_skews_weight_the_first_argument(probabilities: tuple[Tensor, Tensor]) -> None:
    # skewed_forward_kl(lam): KL(p, lam p + (1 - lam) q); skewed_reverse_kl(lam): KL(q, (1 - lam) p + lam q)
    p, q = probabilities
    lam = 0.1
    forward, reverse = direct(p, q, lam)[0], direct(q, p, lam)[0]
    l, r = q.log(), p.log()
    torch.testing.assert_close(reference.divergence_rows("skew_fkl", l, r, skew=lam), forward, rtol=1e-12, atol=0)
    torch.testing.assert_close(reference.divergence_rows("skew_rkl", l, r, skew=lam), reverse, rtol=1e-12, atol=0)


def test_the_authors_forward_kl_differs_by_the_teachers_entropy_alone(probabilities: tuple[Tensor, Tensor]) -> None:
    p, q = probabilities
    authors = -(p * q.log()).sum(-1)
    teacher_entropy = -(p * p.log()).sum(-1)
    torch.testing.assert_close(reference.divergence_rows("fkl", q.log(), p.log()), authors - teacher_entropy)


def test_limits_of_alpha_skew_and_beta_are_the_plain_divergences(probabilities: tuple[Tensor, Tensor]) -> None:
    p, q = probabilities
    l, r = q.log(), p.log()
    near = 1e-7
    for name, parameters, scale, limit in (
        ("alpha", {"alpha": 1 - near}, 1.0, "fkl"),
        ("alpha", {"alpha": near}, 1.0, "rkl"),
        ("skew_fkl", {"skew": 0.0}, 1.0, "fkl"),
        ("skew_rkl", {"skew": 0.0}, 1.0, "rkl"),
        ("jsd", {"beta": near}, near, "fkl"),
        ("jsd", {"beta": 1 - near}, near, "rkl"),
    ):
        ours = reference.divergence_rows(name, l, r, **parameters) / scale
        torch.testing.assert_close(ours, reference.divergence_rows(limit, l, r), rtol=1e-4, atol=0)


# --- The whole loss, on hidden states of size one: the logits are the logarithms of the probabilities ---

STUDENT = Head(torch.tensor([[math.log(0.5)], [math.log(0.5)]], dtype=torch.float64))
TEACHER = Head(torch.tensor([[math.log(0.75)], [math.log(0.25)]], dtype=torch.float64))
ONES = torch.ones(3, 1, dtype=torch.float64)
LABELS = torch.tensor([1, -100, 0])
LN2 = math.log(2)


def test_loss_mixes_divergence_and_cross_entropy() -> None:
    out = reference.fused_linear_divergence(ONES, STUDENT, ONES, TEACHER, labels=LABELS, ce_weight=0.25)
    assert float(out.loss) == pytest.approx(0.75 * KL_PQ + 0.25 * LN2, rel=1e-14)
    assert float(out.divergence) == pytest.approx(KL_PQ, rel=1e-14)
    assert float(out.cross_entropy) == pytest.approx(LN2, rel=1e-14)
    assert float(out.student_entropy) == pytest.approx(LN2, rel=1e-14)
    assert int(out.num_tokens) == 2


def test_temperature_divides_the_logits_of_both_and_its_square_scales_the_divergence_alone() -> None:
    # At T = 2 the teacher's probabilities are proportional to sqrt(3) and 1.
    root = math.sqrt(3)
    p = (root / (root + 1), 1 / (root + 1))
    kl = sum(x * math.log(2 * x) for x in p)
    out = reference.fused_linear_divergence(ONES, STUDENT, ONES, TEACHER, temperature=2.0, labels=LABELS, ce_weight=0.5)
    assert float(out.divergence) == pytest.approx(kl, rel=1e-13)
    assert float(out.loss) == pytest.approx(0.5 * 4 * kl + 0.5 * LN2, rel=1e-13)
    plain = reference.fused_linear_divergence(ONES, STUDENT, ONES, TEACHER, temperature=2.0, scale_by_temperature=False)
    assert float(plain.loss) == pytest.approx(kl, rel=1e-13)
    # The student's entropy is that of the tempered student, its cross-entropy is not.
    swapped = reference.fused_linear_divergence(ONES, TEACHER, ONES, STUDENT, temperature=2.0, labels=LABELS)
    assert float(swapped.student_entropy) == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-13)
    assert float(swapped.cross_entropy) == pytest.approx(-0.5 * math.log(0.25) - 0.5 * math.log(0.75), rel=1e-13)


def test_reductions_weights_and_normaliser() -> None:
    weight = torch.tensor([2.0, 5.0, 0.5])
    call = dict(labels=LABELS, ce_weight=1.0, token_weight=weight)
    none = reference.fused_linear_divergence(ONES, TEACHER, ONES, TEACHER, reduction="none", **call).loss
    first, last = -2 * math.log(0.25), -0.5 * math.log(0.75)
    assert none.tolist() == pytest.approx([first, 0.0, last], rel=1e-14)
    for reduction, normalizer, divisor in (("sum", None, 1), ("mean", None, 2), ("mean", 7.0, 7)):
        out = reference.fused_linear_divergence(
            ONES, TEACHER, ONES, TEACHER, reduction=reduction, normalizer=normalizer, **call
        )
        assert float(out.loss) == pytest.approx((first + last) / divisor, rel=1e-14)


def test_head_transforms_apply_in_the_order_bias_scale_softcap() -> None:
    head = Head(torch.tensor([[1.0], [2.0]]), torch.tensor([0.5, -0.5]), scale=3.0, softcap=5.0)
    logits = [5 * math.tanh(3 * (2.0 + 0.5) / 5), 5 * math.tanh(3 * (4.0 - 0.5) / 5)]
    total = math.log(sum(math.exp(z / 2) for z in logits))
    expected = [z / 2 - total for z in logits]
    ours = reference.log_probabilities(torch.tensor([[2.0]]), head, 2.0, 2)
    assert ours[0].tolist() == pytest.approx(expected, rel=1e-14)


def test_surplus_vocabulary_is_cut_before_the_softmax() -> None:
    padded = Head(torch.cat([TEACHER.weight, torch.full((1, 1), 9.0, dtype=torch.float64)]))
    for student, teacher in ((STUDENT, padded), (padded, STUDENT)):
        out = reference.fused_linear_divergence(ONES, student, ONES, teacher)
        assert float(out.divergence) == pytest.approx(KL_PQ if teacher is padded else KL_QP, rel=1e-14)


def test_gradient_is_the_softmax_jacobian_worked_by_hand() -> None:
    # d KL(p, q) / dz = q - p = (-1/4, 1/4); the logits are the weights themselves; mean over tokens of equal rows.
    weight = STUDENT.weight.clone().requires_grad_()
    reference.fused_linear_divergence(ONES, weight, ONES, TEACHER).loss.backward()
    assert weight.grad.flatten().tolist() == pytest.approx([-0.25, 0.25], rel=1e-14)


def test_relative_error_is_the_norm_of_the_difference_over_that_of_the_oracle() -> None:
    assert reference.relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert reference.relative_error(torch.zeros(3), torch.tensor([1e-20, 0.0, 0.0])) == 1.0
