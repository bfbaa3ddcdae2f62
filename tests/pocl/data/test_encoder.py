"""Rows whatever the text: words that look like special tokens, batches, cuts, and tokenizers that are not fast."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl.data import Conversation
from pocl.data.encoder import IGNORE_INDEX, Encoder
from pocl.data.templates import special_tokens
from tests.pocl.data.chat_templates import FAMILIES, tokenizer_of

SAMPLED = ("chatml", "marked", "llama-3", "gemma", "mistral", "qwen-3", "deepseek-r1", "phi-3", "vicuna-like")
PIECES = st.sampled_from(
    [" ", "\n", "\n\n", "the", "é", "🙂", "<|im_end|>", "<|im_start|>", "</s>", "<end_of_turn>", "<"]
)
TEXTS = st.lists(PIECES, max_size=6).map("".join).map(lambda text: f"a{text}b")
PAIRS = st.integers(1, 2).flatmap(lambda count: st.lists(TEXTS, min_size=2 * count, max_size=2 * count))


def _encoder(name: str, **options: Any) -> Encoder:
    return _made(name, tuple(sorted(options.items())))


@cache
def _made(name: str, options: tuple[tuple[str, Any], ...]) -> Encoder:
    return Encoder(
        tokenizer_of(name), **{"template": "chat", "max_length": 4096, "max_prompt_length": 2048} | dict(options)
    )


def _turns(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _example(texts: list[str], sample_id: int = 0) -> dict[str, Any]:
    talk = Conversation(tuple(_turns(texts))).to_json()
    return {"id": sample_id, "prompt": "".join(texts[:-1]), "response": texts[-1], "conversation": talk}


def _row(encoder: Encoder, example: dict[str, Any]) -> dict[str, Any]:
    row = encoder(example)
    assert row is not None
    return row


def _specials(name: str, ids: list[int]) -> list[int]:
    tokenizer = tokenizer_of(name)
    return [i for i in ids if tokenizer.convert_ids_to_tokens(i) in special_tokens(tokenizer)]


@given(texts=PAIRS)
@settings(max_examples=25)
@pytest.mark.parametrize("name", SAMPLED)
def test_no_text_becomes_a_special_token_and_none_is_lost(name: str, texts: list[str]) -> None:
    tokenizer = tokenizer_of(name)
    whole = tokenizer.apply_chat_template(_turns(texts), tokenize=False)
    for labels in ("last", "all"):
        encoder = _encoder(name, labels=labels)
        row, neutral = _row(encoder, _example(texts)), _row(encoder, _example(["word"] * len(texts)))
        ids = row["input_ids"]
        assert _specials(name, ids) == _specials(name, neutral["input_ids"])
        text = tokenizer.decode(ids[:-1] if FAMILIES[name].end is None else ids)
        assert whole.startswith(text) or FAMILIES[name].style == "metaspace"
        learnt = tokenizer.decode([label for label in row["labels"] if label != IGNORE_INDEX])
        assert all(answer.strip() in learnt for answer in (texts[1::2] if labels == "all" else texts[-1:]))


@pytest.mark.parametrize("name", SAMPLED)
def test_the_text_of_a_special_token_is_the_token_where_that_is_wanted(name: str) -> None:
    tokenizer = tokenizer_of(name)
    word = FAMILIES[name].end or tokenizer.eos_token
    texts = ["Hi", f"say {word} twice"]
    whole = tokenizer.apply_chat_template(_turns(texts), return_dict=False)
    wanted, text = _row(_encoder(name, special_tokens="tokens"), _example(texts)), _row(_encoder(name), _example(texts))
    count = len(wanted["input_ids"]) - (FAMILIES[name].end is None)
    assert wanted["input_ids"][:count] == whole[:count]
    assert len(_specials(name, wanted["input_ids"])) == 1 + len(_specials(name, text["input_ids"]))
    assert tokenizer.decode(wanted["input_ids"][wanted["prompt_length"] :]).count("twice") == 1


def test_an_answer_that_opens_a_turn_by_a_real_token_is_one_answer() -> None:
    answer = "a<|im_end|>\n<|im_start|>assistant\nb"
    tokenizer = tokenizer_of("chatml")
    row = _row(_encoder("chatml", special_tokens="tokens"), _example(["Hi", answer]))
    assert tokenizer.decode(row["input_ids"][row["prompt_length"] :]) == answer + "<|im_end|>"


def test_texts_without_a_chat_template_stay_text_too() -> None:
    tokenizer = tokenizer_of("chatml")
    example = {"id": 0, "prompt": "say <|endoftext|>", "response": "<|im_start|> and <|endoftext|>"}
    for template in ("plain", "alpaca"):
        ids = _row(_encoder("chatml", template=template), example)["input_ids"]
        assert _specials("chatml", ids) == [tokenizer.eos_token_id]
        assert tokenizer.decode(ids).endswith("<|im_start|> and <|endoftext|><|endoftext|>")
    real = _row(_encoder("chatml", template="plain", special_tokens="tokens"), example)
    assert real["input_ids"].count(tokenizer.eos_token_id) == 2  # the answer brought its own end


def test_what_became_of_special_tokens_is_counted() -> None:
    encoder = Encoder(tokenizer_of("chatml"), "chat", 512, 256)
    encoder.encode_batch([_example(["a <|im_end|>", "b"]), _example(["a <", "b"]), _example(["a", "<think>b</think>"])])
    assert "1 write special tokens, which stay text" in str(encoder.report(3, 3))
    encoder = Encoder(tokenizer_of("vicuna-like"), "chat", 512, 256)
    encoder.encode_batch([_example(["a", "b"])])
    assert "1 end with the tokenizer's EOS, for the chat template closes no turn" in str(encoder.report(1, 1))


@given(texts=st.lists(st.lists(TEXTS, min_size=2, max_size=2), min_size=1, max_size=6))
@settings(max_examples=20)
@pytest.mark.parametrize("name", ["chatml", "mistral", "gemma"])
def test_a_batch_has_the_rows_of_its_examples(name: str, texts: list[list[str]]) -> None:
    examples = [_example(pair, i) for i, pair in enumerate(texts)]
    together, alone = (Encoder(tokenizer_of(name), "chat", 24, 12) for _ in range(2))
    assert together.encode_batch(examples) == [alone(example) for example in examples]
    assert together.counts == alone.counts


@given(texts=st.lists(st.lists(TEXTS, min_size=4, max_size=4), min_size=1, max_size=4))
@settings(max_examples=20)
@pytest.mark.parametrize("labels", ["last", "all"])
def test_a_cut_row_is_a_part_of_the_whole_one(labels: str, texts: list[list[str]]) -> None:
    whole, cut = (
        _encoder("qwen-3", labels=labels),
        _encoder("qwen-3", labels=labels, max_length=24, max_prompt_length=12),
    )
    for pair in texts:
        before = dict(cut.counts)
        long, short = _row(whole, _example(pair)), _row(cut, _example(pair))
        added = {name: cut.counts[name] - before[name] for name in ("prompt_tokens", "response_tokens")}
        assert added["response_tokens"] == sum(label != IGNORE_INDEX for label in short["labels"])
        assert added["prompt_tokens"] == short["labels"].count(IGNORE_INDEX)
        first, kept = (
            next(i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX) for row in (long, short)
        )
        for column in ("input_ids", "labels"):
            assert short[column] == long[column][first - kept :][: len(short["labels"])]
        assert len(short["input_ids"]) <= 24
        assert kept <= 12
        assert short["labels"][short["prompt_length"]] != IGNORE_INDEX


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral", "qwen-3", "vicuna-like"])
def test_a_tokenizer_that_is_not_fast_gives_the_same_rows(name: str) -> None:
    fast = tokenizer_of(name)
    slow = copy.copy(fast)
    slow.__class__ = type("Slow", (type(fast),), {"is_fast": False, "backend_tokenizer": None})
    talks = [["a\n\n", "\n\nb  the"], ["x", "y", "z", " 🙂"]]
    if FAMILIES[name].style == "bytes":  # in the other style a space stands before each piece
        talks.append(["say <|im_end|></s><|eot_id|>", "no <|im_end|></s><|eot_id|>"])
    for labels in ("last", "all"):
        of_fast, of_slow = (Encoder(tokenizer, "chat", 512, 256, labels=labels) for tokenizer in (fast, slow))
        for talk in talks:
            assert of_slow(_example(talk)) == of_fast(_example(talk))
