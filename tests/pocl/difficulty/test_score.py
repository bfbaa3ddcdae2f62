"""Scores against the model's own loss and answers, and their independence of batching."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset

from pocl.data import load_examples, tokenize
from pocl.difficulty import rouge_l, score
from pocl.difficulty.score import cross_entropies, token_budget_batches
from pocl.generation import GenerationSettings

SETTINGS = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Any]) -> Any:
    return make_tiny_model(seed=3)


@pytest.fixture
def examples(tiny_pairs: list[dict[str, str]]) -> Dataset:
    return load_examples(tiny_pairs[:12])


def _score(model: Any, tokenizer: Any, data: Dataset, **options: Any) -> Dataset:
    return score(model, tokenizer, data, template="plain", generation=SETTINGS, progress=False, **options)


def test_cross_entropy_is_the_models_own_loss_of_each_sample(
    model: Any, tiny_tokenizer: Any, examples: Dataset
) -> None:
    rows, _ = tokenize(examples, tiny_tokenizer, template="plain", progress=False)
    scores = _score(model, tiny_tokenizer, examples)
    for row, value in zip(rows, scores["cross_entropy"], strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        assert value == pytest.approx(expected.item(), rel=1e-5)


def test_scores_keep_the_order_of_the_data_and_judge_the_models_answer(
    model: Any, tiny_tokenizer: Any, examples: Dataset
) -> None:
    scores = _score(model, tiny_tokenizer, examples)
    assert scores["sample_id"][:] == examples["id"][:]
    assert scores["rouge_l"][:] == rouge_l(scores["response"][:], examples["response"][:])
    assert scores["num_tokens"][:] == [len(r.split()) + 1 for r in examples["response"]]
    assert all(len(r.split()) <= 8 for r in scores["response"])


def test_token_rows_score_like_the_examples_they_come_from(model: Any, tiny_tokenizer: Any, examples: Dataset) -> None:
    rows, _ = tokenize(examples, tiny_tokenizer, template="plain", progress=False)
    assert _score(model, tiny_tokenizer, rows).to_dict() == _score(model, tiny_tokenizer, examples).to_dict()


def test_cross_entropy_does_not_depend_on_the_token_budget(model: Any, tiny_tokenizer: Any, examples: Dataset) -> None:
    rows, _ = tokenize(examples, tiny_tokenizer, template="plain", progress=False)
    one, many = (cross_entropies(model, rows, max_batch_tokens=n, progress=False) for n in (1, 10_000))
    assert one == pytest.approx(many, rel=1e-5)


def test_budget_batches_hold_every_sample_once_within_the_budget() -> None:
    lengths = [3, 50, 7, 7, 20, 1, 33]
    batches = token_budget_batches(lengths, 40)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 40 for b in batches)


def test_non_finite_logits_name_the_sample(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, examples: Dataset
) -> None:
    broken = make_tiny_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"cross-entropy of sample .* is nan: the model gives non-finite logits"):
        _score(broken, tiny_tokenizer, examples)
