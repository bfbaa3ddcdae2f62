"""Templating, cutting and batching of prompt/response data."""

from typing import Any

import pytest
import torch
from datasets import Dataset

from pocl.data import IGNORE_INDEX, Collator, load_examples, render_prompt, resolve_template, tokenize

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture
def chat_tokenizer(tiny_tokenizer: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


def _examples(*pairs: tuple[str, str]) -> Dataset:
    return load_examples([{"prompt": p, "completion": c} for p, c in pairs])


# -------------------------------------------------------------------------------------------------------- templates


def test_auto_is_chat_with_a_chat_template_and_alpaca_without(tiny_tokenizer: Any, chat_tokenizer: Any) -> None:
    assert resolve_template("auto", chat_tokenizer) == "chat"
    assert resolve_template("auto", tiny_tokenizer) == "alpaca"
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        resolve_template("chat", tiny_tokenizer)
    with pytest.raises(ValueError, match="template must be one of auto, chat, alpaca, plain, got 'llama'"):
        resolve_template("llama", tiny_tokenizer)


def test_alpaca_text_has_an_input_section_only_with_an_input(tiny_tokenizer: Any) -> None:
    rows = load_examples(
        [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Ho"}]
    )
    first, second = (render_prompt(row, tiny_tokenizer, "alpaca") for row in rows)
    assert first.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert second.endswith("the request.\n\n### Instruction:\nHi\n\n### Response:\n")


def test_chat_template_gets_the_turns_and_the_generation_prompt(chat_tokenizer: Any) -> None:
    row = load_examples([{"instruction": "w1", "input": "w2", "output": "w3"}])[0]
    assert render_prompt(row, chat_tokenizer, "chat") == "<user> w1\n\nw2 <assistant> "


# ------------------------------------------------------------------------------------------------------- tokenising


def test_labels_are_the_response_tokens_and_eos_and_nothing_else(tiny_tokenizer: Any) -> None:
    rows, report = tokenize(_examples(("w1 w2", "w3 w4")), tiny_tokenizer, template="plain", progress=False)
    ids = tiny_tokenizer.convert_tokens_to_ids(["w1", "w2", "w3", "w4"])
    assert rows[0]["input_ids"] == [*ids, tiny_tokenizer.eos_token_id]
    assert rows[0]["labels"] == [IGNORE_INDEX, IGNORE_INDEX, ids[2], ids[3], tiny_tokenizer.eos_token_id]
    assert rows[0]["prompt_length"] == 2
    assert (report.prompt_tokens, report.response_tokens) == (2, 3)


def test_empty_responses_and_prompts_are_dropped_and_counted_and_ids_stay(tiny_tokenizer: Any) -> None:
    examples = _examples(("w1", "w2"), ("w1", " "), ("", "w2"), ("w3", "w4"))
    rows, report = tokenize(examples, tiny_tokenizer, template="plain", progress=False)
    assert rows["sample_id"][:] == [0, 3]
    assert (report.num_examples, report.num_samples, report.empty_responses, report.empty_prompts) == (4, 2, 1, 1)
    assert "1 dropped (empty response)" in str(report)


def test_a_long_prompt_is_cut_from_the_left_and_the_response_kept(tiny_tokenizer: Any) -> None:
    words = [f"w{i}" for i in range(40)]
    examples = _examples((" ".join(words), "w41 w42"))
    rows, report = tokenize(
        examples, tiny_tokenizer, template="plain", max_length=32, max_prompt_length=16, progress=False
    )
    expected = tiny_tokenizer.convert_tokens_to_ids([*words[-16:], "w41", "w42"])
    assert rows[0]["input_ids"] == [*expected, tiny_tokenizer.eos_token_id]
    assert (report.cut_prompts, report.cut_responses) == (1, 0)


def test_the_prompt_gives_way_to_the_response_within_max_length(tiny_tokenizer: Any) -> None:
    prompt, response = " ".join(["w1"] * 16), " ".join(["w2"] * 20)
    rows, report = tokenize(
        _examples((prompt, response)),
        tiny_tokenizer,
        template="plain",
        max_length=32,
        max_prompt_length=16,
        progress=False,
    )
    assert (rows[0]["prompt_length"], len(rows[0]["input_ids"])) == (11, 32)
    assert rows[0]["labels"][-1] == tiny_tokenizer.eos_token_id
    assert (report.cut_prompts, report.cut_responses) == (1, 0)


def test_a_response_longer_than_the_row_is_cut_without_an_end_token(tiny_tokenizer: Any) -> None:
    rows, report = tokenize(
        _examples((" ".join(["w1"] * 20), " ".join(["w2"] * 99))),
        tiny_tokenizer,
        template="plain",
        max_length=32,
        progress=False,
    )
    assert (rows[0]["prompt_length"], len(rows[0]["input_ids"])) == (8, 32)
    assert tiny_tokenizer.eos_token_id not in rows[0]["labels"]
    assert (report.cut_prompts, report.cut_responses) == (1, 1)


def test_what_cannot_be_tokenised_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"examples lack the columns id, response .*load_examples"):
        tokenize(Dataset.from_list([{"prompt": "w1"}]), tiny_tokenizer)
    with pytest.raises(ValueError, match="no sample is left after tokenisation: 0 of 1 samples kept"):
        tokenize(_examples(("w1", "")), tiny_tokenizer, progress=False)
    with pytest.raises(ValueError, match="max_length must be at least 4"):
        tokenize(_examples(("w1", "w2")), tiny_tokenizer, max_length=2)


# --------------------------------------------------------------------------------------------------------- batching


def test_collator_pads_on_the_right_and_never_labels_padding() -> None:
    rows = [
        {"sample_id": 7, "input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"sample_id": 3, "input_ids": [8], "labels": [-100]},
    ]
    batch = Collator(pad_token_id=9, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [-100] * 4]
    assert batch["sample_id"].tolist() == [7, 3]
    assert all(value.dtype == torch.int64 for value in batch.values())
    with pytest.raises(ValueError, match="rows is empty"):
        Collator(0)([])
