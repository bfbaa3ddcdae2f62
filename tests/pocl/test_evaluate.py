"""Evaluation against the formulas written out, and SQuAD's normalisation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset

from pocl.data import load_examples, tokenize
from pocl.evaluate import evaluate, exact_match, normalize_answer
from pocl.generation import GenerationSettings


@pytest.fixture(scope="module")
def student(make_tiny_model: Callable[..., Any]) -> Any:
    return make_tiny_model(seed=3)


@pytest.fixture(scope="module")
def teacher(make_tiny_model: Callable[..., Any]) -> Any:
    return make_tiny_model(seed=4, hidden_size=48)


@pytest.fixture
def examples(tiny_pairs: list[dict[str, str]]) -> Dataset:
    return load_examples(tiny_pairs[:10])


def _evaluate(model: Any, tokenizer: Any, examples: Dataset, **options: Any) -> Any:
    return evaluate(
        model, tokenizer, examples, **{"template": "plain", "max_new_tokens": 6, "progress": False, **options}
    )


def test_cross_entropy_and_kl_are_means_over_response_tokens(
    student: Any, teacher: Any, tiny_tokenizer: Any, examples: Dataset
) -> None:
    rows, report = tokenize(examples, tiny_tokenizer, template="plain", progress=False)
    ce = kl = 0.0
    for row in rows:
        ids, start = torch.tensor([row["input_ids"]]), row["prompt_length"]
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, start - 1 : -1].double().log_softmax(-1) for m in (teacher, student))
        ce -= q.gather(-1, ids[0, start:, None]).sum().item()
        kl += (p.exp() * (p - q)).sum().item()
    result = _evaluate(student, tiny_tokenizer, examples, teacher=teacher, max_batch_tokens=60)
    assert result.num_tokens == report.response_tokens
    assert result.cross_entropy == pytest.approx(ce / report.response_tokens, rel=1e-5)
    assert result.kl_to_teacher == pytest.approx(kl / report.response_tokens, rel=1e-4)


def test_kl_of_a_model_to_itself_is_zero(student: Any, tiny_tokenizer: Any, examples: Dataset) -> None:
    result = _evaluate(student, tiny_tokenizer, examples, teacher=student, num_generated=0)
    assert result.kl_to_teacher == pytest.approx(0.0, abs=1e-6)
    assert result.metrics().keys() == {"cross_entropy", "kl_to_teacher"}


def test_without_a_teacher_there_is_no_kl(student: Any, tiny_tokenizer: Any, examples: Dataset) -> None:
    result = _evaluate(student, tiny_tokenizer, examples, num_generated=3)
    assert result.kl_to_teacher is None
    assert len(result.responses) == 3
    assert 0 <= result.rouge_l <= 1


def test_seeds_are_averaged(student: Any, tiny_tokenizer: Any, examples: Dataset) -> None:
    # the references are the student's own greedy answers, so that sampled answers overlap with them
    greedy = _evaluate(student, tiny_tokenizer, examples).responses
    own = load_examples([{"prompt": p, "completion": r} for p, r in zip(examples["prompt"], greedy, strict=True)])
    sampling = GenerationSettings(do_sample=True, temperature=0.3)
    one, two, both = (
        _evaluate(student, tiny_tokenizer, own, generation=sampling, seeds=seeds).rouge_l
        for seeds in ([1], [2], [1, 2])
    )
    assert one != two
    assert both == pytest.approx((one + two) / 2)


def test_words_are_those_of_the_rule_and_references_without_one_are_told_once(
    student: Any, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # an answer that is not in the vocabulary: the reference is the text, whatever its tokens
    odd = load_examples([{"prompt": "w1 w2", "completion": "猫"}, {"prompt": "w3", "completion": "w4"}])
    sampling = {"generation": GenerationSettings(do_sample=True), "seeds": [1, 2, 3]}
    result = _evaluate(student, tiny_tokenizer, odd, words="rouge_score", **sampling)
    assert [message.split(":")[0] for message in caplog.messages] == [
        "1 of 2 references have no word under the rule 'rouge_score'"
    ]
    assert result.rouge_l <= 0.5
    with pytest.raises(ValueError, match="words must be one of"):
        _evaluate(student, tiny_tokenizer, odd, words="latin")


def test_normalisation_is_squads() -> None:
    assert normalize_answer("The  quick, brown Fox!") == "quick brown fox"
    assert normalize_answer("an apple a day") == "apple day"
    assert normalize_answer("theatre") == "theatre"
    assert exact_match(["A cat.", "dog"], ["cat", "dogs"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="same length, got 1 and 0"):
        exact_match(["a"], [])
