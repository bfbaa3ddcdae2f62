"""What a sparse teacher must not be, said in words, and what rows without a label may hold."""

import math
from typing import Any

import pytest
import torch

from pocl_kernels import AlphaBeta, MixedKL, SparseTeacher, fused_linear_divergence
from tests.kernels.cases import assert_close, make_case, solve
from tests.kernels.sparse_cases import oracle, sparse, taught_by

V, H, N = 50, 8, 3
IDS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, -1]])
LOG_PROBS = torch.tensor([[0.5, 0.2, 0.1]] * N).log()


def call(ids: Any = IDS, log_probs: Any = LOG_PROBS, tail: str = "bucket", **options: Any) -> Any:
    vocab_size = options.pop("vocab_size", None)
    teacher = SparseTeacher(ids, log_probs, tail, vocab_size)
    return fused_linear_divergence(torch.ones(N, H), torch.ones(V, H), teacher, **options)


def changed(x: torch.Tensor, place: tuple[int, int], value: float) -> torch.Tensor:
    x = x.clone()
    x[place] = value
    return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ids=IDS.tolist()), "token_ids is a list: it must be a tensor"),
        (dict(log_probs=None), "log_probs is a NoneType"),
        (dict(ids=IDS.float()), "token_ids are torch.float32: they must be int64 or int32"),
        (dict(ids=IDS.bool()), "token_ids are torch.bool"),
        (dict(log_probs=IDS), "log_probs are torch.int64: they must be floating point"),
        (dict(ids=IDS[:, :2]), r"token_ids have shape \(3, 2\), log_probs \(3, 3\): both must be the same"),
        (dict(ids=IDS[:, :0], log_probs=LOG_PROBS[:, :0]), "K = 0 tokens a position: it needs at least one"),
        (dict(ids=IDS[:2], log_probs=LOG_PROBS[:2]), r"leading shape \(2,\), student_hidden \(3,\): both models must"),
        (dict(ids=IDS[None], log_probs=LOG_PROBS[None]), r"leading shape \(1, 3\), student_hidden \(3,\)"),
        (dict(tail="buckets"), "tail='buckets' must be one of .* did you mean 'bucket'"),
        (dict(tail="renormalize"), "did you mean 'renormalise'"),
        (dict(tail=None), "tail=None must be one of bucket, renormalise, zero, uniform"),
        (dict(vocab_size=0), "vocab_size=0 must be a positive number of tokens"),
        (dict(vocab_size=1000), "vocabularies have 50 and 1000 entries"),
        (dict(log_probs=LOG_PROBS.clone().requires_grad_()), "log_probs require grad, but no gradient flows"),
        (dict(teacher_head=torch.ones(V, H)), "teacher_head has no meaning with a SparseTeacher"),
        (dict(ids=changed(IDS, (1, 0), V)), r"token_ids must be in \[0, 50\), or -1 for padding, got 50 \(1 such\)"),
        (dict(ids=changed(IDS, (1, 0), -100)), r"token_ids must be in \[0, 50\), or -1 for padding, got -100"),
        (dict(ids=changed(IDS, (1, 0), 6)), r"must not name a token twice in a position, got 6 \(1 such\)"),
        (dict(ids=torch.tensor([[1, 2, 3], [-1, -1, -1], [7, 8, 9]])), "must have a token that is not padding"),
        (dict(log_probs=changed(LOG_PROBS, (0, 1), 0.7)), "must be logarithms of probabilities, at most 0, got 0.7"),
        (dict(log_probs=LOG_PROBS.exp()), "must be logarithms of probabilities"),
        (dict(log_probs=changed(LOG_PROBS, (0, 1), math.nan)), "log_probs must not be NaN"),
        (dict(log_probs=changed(LOG_PROBS, (0, 1), math.inf)), "must be logarithms of probabilities"),
        (dict(log_probs=changed(LOG_PROBS, (0, 1), -0.1)), r"must sum to 1 at most \(0.0001 for rounding\), got 1"),
        (dict(log_probs=changed(LOG_PROBS.half(), (0, 1), -0.1)), r"must sum to 1 at most \(0.02 for rounding\)"),
        (dict(log_probs=LOG_PROBS - math.inf, tail="renormalise"), "scaled to 1 must not sum to 0"),
        (dict(tail="zero", temperature=2.0), 'must be 1 with tail="zero".*temperature=2'),
        (dict(tail="zero", temperature=torch.tensor([1.0, 1.0, 3.0])), 'must be 1 with tail="zero".*got 3'),
        (dict(tail="zero", divergence="rkl"), "ReverseKL is infinite where the teacher has no probability"),
        (dict(tail="renormalise", divergence=MixedKL(torch.tensor([1.0, 1.0, 0.5]))), "MixedKL is infinite where"),
        (dict(tail="renormalise", divergence=AlphaBeta(0.0, 0.5)), "AlphaBeta is infinite where"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(**arguments)


def test_hidden_states_without_a_head_are_refused() -> None:
    with pytest.raises(ValueError, match="teacher_head is missing: hidden states need their head"):
        fused_linear_divergence(torch.ones(N, H), torch.ones(V, H), torch.ones(N, H))


def test_more_tokens_than_the_vocabulary_has_are_refused() -> None:
    ids = torch.arange(60).expand(N, 60)
    with pytest.raises(ValueError, match="K = 60 tokens a position, the vocabulary 50"):
        call(ids, torch.full((N, 60), -9.0))


def test_what_comes_near_to_bad_input_is_taken() -> None:
    for log_probs in (
        torch.tensor([[0.5, 0.3, 0.2]] * N).log() + 2e-5,  # sums to 1 and a little
        torch.tensor([[0.5, 0.3, 0.2]] * N).log().half(),
        torch.tensor([[0.0, -math.inf, -math.inf]] * N),  # a token of the K without probability
        torch.tensor([[5e-5, -40.0, -40.0]] * N),
    ):
        assert torch.isfinite(call(log_probs=log_probs).loss)
    assert torch.isfinite(call(tail="renormalise", divergence=MixedKL(1.0)).loss)  # a forward KL
    assert torch.isfinite(call(IDS.int(), LOG_PROBS.double()).loss)


@pytest.mark.parametrize("tail", ["bucket", "uniform", "renormalise"])
def test_a_row_that_does_not_count_may_hold_anything(engine: Any, tail: str) -> None:
    case = sparse(make_case(12, V), 5, tail)
    ids, log_probs = case.teacher_hidden.token_ids.clone(), case.teacher_hidden.log_probs.clone()
    ids[case.labels == -100], log_probs[case.labels == -100] = -1, math.nan
    broken = ids.clone()
    broken[(case.labels == -100).nonzero()[0]] = 10**6
    for these in (ids, broken):
        result = solve(engine, taught_by(case, SparseTeacher(these, log_probs, tail)))
        assert_close(result, oracle(case), 2e-6)
    weight = (case.labels != -100).float()
    out = engine(
        case.student_hidden,
        case.student_head,
        SparseTeacher(ids, log_probs, tail),
        token_weight=weight,
        reduction="sum",
    )
    expected = float(oracle(case, reduction="sum").loss)
    assert float(out.loss.detach()) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_a_batch_without_tokens(engine: Any, shape: tuple[int, ...]) -> None:
    hidden = torch.ones(*shape, H, requires_grad=True)
    teacher = SparseTeacher(torch.ones(*shape, 3, dtype=torch.int64), torch.zeros(*shape, 3))
    out = engine(hidden, torch.ones(V, H), teacher)
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0
    assert hidden.grad is not None


def test_leading_shapes(engine: Any) -> None:
    case = sparse(make_case(12, V), 5)
    teacher = SparseTeacher(
        *(x.reshape(3, 4, 5) for x in (case.teacher_hidden.token_ids, case.teacher_hidden.log_probs))
    )
    out = engine(
        case.student_hidden.reshape(3, 4, -1), case.student_head, teacher, labels=case.labels.reshape(3, 4),
        reduction="none",
    )  # fmt: skip
    assert out.loss.shape == out.divergence.shape == out.teacher_entropy.shape == (3, 4)
    assert float(out.loss.sum()) == pytest.approx(float(oracle(case, reduction="sum").loss), rel=2e-6)


@pytest.mark.parametrize("name", ["fkl", "rkl", "jsd", "alpha"])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_masked_logits_of_the_student(engine: Any, tail: str, name: str) -> None:
    """-inf is a legal logit, in the tail and, where a divergence stays finite, at one of the K."""
    case = sparse(make_case(12, V, bias=True), 5, tail)
    bias = case.student_head.bias.clone()
    named = set(case.teacher_hidden.token_ids.flatten().tolist()) | set(case.labels.tolist())
    bias[min(set(range(V)) - named)] = -math.inf
    case = case.replace(student_head=type(case.student_head)(case.student_head.weight, bias))
    truth = oracle(case, divergence=name)
    result = solve(engine, case, divergence=name)
    for field, error in result.errors(truth).items():
        if torch.isfinite(getattr(truth, field)).all():
            assert error <= 3e-6, (field, error)
    assert torch.isfinite(result.divergence) == torch.isfinite(truth.divergence)


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_broken_logits_give_a_loss_that_is_not_finite(engine: Any, tail: str) -> None:
    case = sparse(make_case(12, V), 5, tail)
    row = int((case.labels != -100).nonzero()[0])
    for value in (math.nan, math.inf):
        hidden = case.student_hidden.clone()
        hidden[row, 3] = value
        out = engine(hidden, case.student_head, case.teacher_hidden, labels=case.labels)
        assert not torch.isfinite(out.loss)
