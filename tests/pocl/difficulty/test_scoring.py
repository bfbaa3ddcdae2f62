"""Scores against the model's own loss and answers, and their independence of batching."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from pocl.data import load_examples, tokenize
from pocl.difficulty import KL_TO_TEACHER, RESPONSE_LENGTH, TEACHER_CROSS_ENTROPY, rank, rouge_l, score
from pocl.difficulty.measure import token_budget_batches
from pocl.difficulty.scoring import Scorer
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


def test_cross_entropy_does_not_depend_on_batches_or_answers(
    model: Any, tiny_tokenizer: Any, examples: Dataset
) -> None:
    whole = _score(model, tiny_tokenizer, examples)["cross_entropy"][:]
    for options in ({"max_batch_tokens": 1}, {"shard_size": 5}, {"backend": "transformers"}, {"batch_size": 3}):
        assert _score(model, tiny_tokenizer, examples, **options)["cross_entropy"][:] == pytest.approx(whole, rel=1e-5)
    alone = score(model, tiny_tokenizer, examples, template="plain", answers=False, progress=False)
    assert alone["cross_entropy"][:] == whole
    assert alone.column_names == ["sample_id", "cross_entropy", "num_tokens"]


def test_answers_do_not_depend_on_batches_or_backend(model: Any, tiny_tokenizer: Any, examples: Dataset) -> None:
    whole = _score(model, tiny_tokenizer, examples)["response"][:]
    for options in ({"max_batch_tokens": 1}, {"shard_size": 5}, {"backend": "transformers"}, {"batch_size": 3}):
        assert _score(model, tiny_tokenizer, examples, **options)["response"][:] == whole


def test_a_teacher_adds_its_cross_entropy_and_the_distance_to_it(
    model: Any, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, examples: Dataset
) -> None:
    teacher = make_tiny_model(seed=8, hidden_size=48)
    scores = _score(model, tiny_tokenizer, examples, teacher=teacher)
    assert scores["teacher_cross_entropy"][:] == pytest.approx(
        _score(teacher, tiny_tokenizer, examples)["cross_entropy"][:], rel=1e-5
    )
    rows, _ = tokenize(examples, tiny_tokenizer, template="plain", progress=False)
    for row, value in zip(rows, scores["kl_to_teacher"], strict=True):
        ids, start = torch.tensor([row["input_ids"]]), row["prompt_length"]
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, start - 1 : -1].double().log_softmax(-1) for m in (teacher, model))
        assert value == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    ranked = rank(scores, criteria=[KL_TO_TEACHER, TEACHER_CROSS_ENTROPY, RESPONSE_LENGTH], num_subsets=2)
    assert sorted(ranked["rank"][:]) == list(range(1, 13))


def test_a_model_in_training_is_scored_without_dropout_and_left_in_training(
    make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, examples: Dataset
) -> None:
    dropping = make_tiny_model(seed=3, attention_dropout=0.5)
    expected = _score(dropping, tiny_tokenizer, examples, teacher=dropping).to_dict()
    assert _score(dropping.train(), tiny_tokenizer, examples, teacher=dropping).to_dict() == expected
    assert dropping.training


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


# -------------------------------------------------------------------------------------------------------- bad input


def test_samples_without_text_are_left_out_and_said(
    model: Any, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [("w1", "w2"), ("", "w2"), ("w1", ""), ("w1", " "), ("w3", "w4")]
    examples = load_examples([{"prompt": p, "completion": c} for p, c in pairs])
    assert _score(model, tiny_tokenizer, examples)["sample_id"][:] == [0, 4]
    assert "3 samples were left out: 1 without a prompt, 2 without a response" in caplog.text


def test_references_without_words_are_counted_once_over_all_shards_and_in_a_second_run(
    model: Any, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    examples = load_examples([{"prompt": f"w{i}", "completion": c} for i, c in enumerate(["w2", "!", "猫", "…", "w4"])])
    for _ in range(2):
        scores = _score(model, tiny_tokenizer, examples, shard_size=2, output_dir=tmp_path / "a", words="rouge_score")
        told = [record.getMessage() for record in caplog.records]
        assert [line.split(":")[0] for line in told] == ["3 of 5 references have no word under the rule 'rouge_score'"]
        caplog.clear()
    assert scores["rouge_l"][1:4] == [0.0] * 3
    score(model, tiny_tokenizer, examples, template="plain", answers=False, progress=False)
    assert not caplog.records
    with pytest.raises(ValueError, match="words"):
        _score(model, tiny_tokenizer, examples, shard_size=2, output_dir=tmp_path / "a", words="unicode")


def test_nothing_left_to_score_is_refused(model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no sample is left to score"):
        _score(model, tiny_tokenizer, load_examples([{"prompt": "w1", "completion": ""}]))


def test_a_sample_beyond_the_context_is_named(model: Any, tiny_tokenizer: Any) -> None:
    long = load_examples([{"prompt": "w1 " * 300, "completion": "w2 " * 300}])
    with pytest.raises(ValueError, match=r"sample 0 has 601 tokens and the context of LlamaForCausalLM is 512"):
        _score(model, tiny_tokenizer, long, max_length=1000, max_prompt_length=500)


def test_duplicate_ids_are_refused_in_tables_and_in_streams(
    model: Any, tiny_tokenizer: Any, examples: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubled = concatenate_datasets([examples, examples.select([3])])
    with pytest.raises(ValueError, match="1 sample ids occur more than once, the first is 3"):
        _score(model, tiny_tokenizer, doubled)
    scored: list[int] = []
    plain = Scorer.__call__
    monkeypatch.setattr(Scorer, "__call__", lambda self, rows, *a: scored.append(len(rows)) or plain(self, rows, *a))
    with pytest.raises(ValueError, match="sample id 3 occurs more than once"):
        _score(model, tiny_tokenizer, doubled.to_iterable_dataset(), shard_size=5)
    assert scored == [5, 5]  # refused before the shard with the second one is scored


def test_a_tokenizer_without_an_end_token_is_refused(model: Any, tiny_tokenizer: Any, examples: Dataset) -> None:
    bare = copy.deepcopy(tiny_tokenizer)
    bare.eos_token = None
    with pytest.raises(ValueError, match="tokenizer has no EOS token.*`eos_token` in tokenizer_config.json"):
        _score(model, bare, examples)


def test_a_tokenizer_without_a_pad_token_scores_the_same(model: Any, tiny_tokenizer: Any, examples: Dataset) -> None:
    bare = copy.deepcopy(tiny_tokenizer)
    bare.pad_token = None
    assert _score(model, bare, examples).to_dict() == _score(model, tiny_tokenizer, examples).to_dict()


def test_rows_of_several_turns_are_refused(model: Any, tiny_tokenizer: Any) -> None:
    row = {"sample_id": 0, "input_ids": [3, 4, 5, 6], "labels": [-100, 4, -100, 6], "prompt_length": 1}
    with pytest.raises(ValueError, match="labels of sample 0 are not -100 up to the response"):
        _score(model, tiny_tokenizer, Dataset.from_list([row]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": -1}, "shard_size must be at least 1, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"answers": False}, "generation is given but answers=False"),
        ({"backend": "vllm"}, "backend must be one of auto, slots, transformers, got 'vllm'"),
    ],
)
def test_bad_arguments_are_refused(
    model: Any, tiny_tokenizer: Any, examples: Dataset, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _score(model, tiny_tokenizer, examples, **options)
