"""What a loss says beside itself: entropies of both models, and whether the student's choice is the label."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pocl_kernels import Head
from tests.kernels.cases import Case, make_case, oracle, solve

V = 3079  # three blocks of the compiled kernels


def half_right(case: Case) -> Case:
    """The case with the student's own choice and its second choice as labels, in turn."""
    labels = case.labels.clone()
    head = case.student_head
    z = case.student_hidden @ head.weight.T
    choices = (z if head.bias is None else z + head.bias).topk(2, -1).indices
    labels[::2], labels[1::2] = choices[::2, 0], choices[1::2, 1]
    labels[3] = -100
    return case.replace(labels=labels)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["fkl", "jsd"])
def test_entropies_and_accuracy_are_those_of_full_logits(engine: Any, divergence: str, reduction: str) -> None:
    check_outputs(engine, half_right(make_case(12, V, bias=True)), divergence, reduction)


def check_outputs(loss: Any, case: Case, divergence: str, reduction: str, tolerance: float = 2e-6) -> None:
    weight = torch.linspace(0.5, 2.0, len(case.labels))
    for temperature in (1.0, 2.5):
        call = dict(divergence=divergence, temperature=temperature, reduction=reduction)
        errors = solve(loss, case, token_weight=weight, **call).errors(oracle(case, token_weight=weight, **call))
        assert errors["teacher_entropy"] <= tolerance
        assert errors["student_entropy"] <= tolerance
        assert errors["accuracy"] <= 3e-7


def test_a_teacher_that_is_sure_has_no_entropy_and_one_that_masks_has_less(engine: Any) -> None:
    check_masks(engine)


def check_masks(loss: Any) -> None:
    case = make_case(6, V, bias=True)
    first = torch.arange(V) < 1500  # nothing but masked logits for a while
    for masked in (first, ~first):
        bias = case.teacher_head.bias.masked_fill(masked, -torch.inf)
        some = case.replace(teacher_head=Head(case.teacher_head.weight, bias))
        truth = oracle(some, wanted=()).teacher_entropy
        torch.testing.assert_close(solve(loss, some, wanted=()).teacher_entropy.double(), truth, rtol=2e-6, atol=0)
    one = case.replace(teacher_head=Head(30.0 * case.teacher_head.weight))
    sure = solve(loss, one, wanted=(), reduction="none").teacher_entropy
    assert (sure >= 0).all()
    torch.testing.assert_close(
        sure.double(),
        oracle(one, wanted=(), reduction="none").teacher_entropy,
        rtol=1e-4,
        atol=1e-7,  # of logits near 60
    )


def test_a_label_that_ties_with_another_token_is_right(engine: Any) -> None:
    case = make_case(4, V)
    weight = case.student_head.weight.clone()
    weight[[5, 900]] = 9 * case.student_hidden[1]
    tied = case.replace(student_head=Head(weight), labels=torch.tensor([7, 5, 900, -100]))
    for label in (5, 900):
        labels = tied.labels.clone()
        labels[1] = label
        right = solve(engine, tied.replace(labels=labels), wanted=(), reduction="none").accuracy
        assert right[1] == 1.0


def test_without_labels_there_is_no_accuracy_and_padding_has_no_entropy(engine: Any) -> None:
    case = make_case(5, 700, teacher_vocab=731)
    result = solve(engine, case, labels=False, wanted=())
    assert result.accuracy is None
    exact = oracle(case, labels=False, wanted=())
    torch.testing.assert_close(result.teacher_entropy.double(), exact.teacher_entropy, rtol=2e-6, atol=0)


def test_a_broken_teacher_has_no_entropy_that_looks_sound(engine: Any) -> None:
    case = make_case(4, V)
    for value in (torch.nan, torch.inf):
        hidden = case.teacher_hidden.clone()
        hidden[2, 5] = value
        broken = case.replace(teacher_hidden=hidden, labels=case.labels.clamp_min(0))
        finite = torch.isfinite(solve(engine, broken, wanted=(), reduction="none").teacher_entropy)
        assert finite.tolist() == [True, True, False, True]
