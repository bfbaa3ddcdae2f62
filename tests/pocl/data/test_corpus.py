"""A corpus: its blocks hold every token once, and all but the first of each are learnt."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from pocl.data import load_examples, tokenize
from pocl.data.corpus import Blocks, CorpusReport, Documents
from pocl.difficulty import score
from pocl.evaluate import evaluate

EOS = 1


def documents(lengths: list[int], first: int = 0) -> tuple[Documents, list[list[int]]]:
    """Documents numbered from 100 + first, of tokens that are all different, each closed by 1."""
    made, number = [], 10 + 1000 * first
    for length in lengths:
        made.append([*range(number, number + length), EOS])
        number += length
    ids = np.array([token for one in made for token in one], dtype=np.int32)
    ends = np.cumsum([len(one) for one in made], dtype=np.int64)
    return Documents(np.arange(100 + first, 100 + first + len(made)), ids, ends), made


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), max_size=4), st.integers(2, 7), st.booleans())
def test_blocks_hold_every_token_once_in_order_however_the_documents_come(
    pieces: list[list[int]], max_length: int, joined: bool
) -> None:
    cut, rows, whole, count = Blocks(max_length, joined), [], [], 0
    for lengths in pieces:
        some, made = documents(lengths, count)
        whole += made
        count += len(lengths)
        rows += cut.add(some)[0].to_pylist()
    last, _ = cut.add(documents([])[0], last=True)
    rows += last.to_pylist()
    stream = [[token for one in whole for token in one]] if joined else whole
    blocks = [one[i : i + max_length] for one in stream for i in range(0, len(one), max_length)]
    assert [row["input_ids"] for row in rows] == [block for block in blocks if len(block) > 1]
    assert [row["labels"] for row in rows] == [[-100, *row["input_ids"][1:]] for row in rows]
    assert [row["sample_id"] for row in rows] == list(range(len(rows)))
    assert {row["prompt_length"] for row in rows} <= {1}
    of_token = {token: 100 + number for number, one in enumerate(whole) for token in one if token != EOS}
    for row in rows:
        holds = [of_token[token] for token in row["input_ids"] if token in of_token]
        assert set(holds) <= set(range(row["first_document"], row["last_document"] + 1))
        assert not joined or max_length < 3 or row["last_document"] - row["first_document"] < max_length


def corpus(*texts: str) -> Any:
    return load_examples([{"text": text} for text in texts])


def test_texts_are_joined_with_the_end_token_between_them(shared_tokenizer: Any) -> None:
    rows, report = tokenize(corpus("w0 w1 w2", "", "w3", "w4 w5"), shared_tokenizer, max_length=4, progress=False)
    ids = shared_tokenizer.convert_tokens_to_ids
    assert rows["input_ids"][:] == [ids(["w0", "w1", "w2", "<eos>"]), ids(["w3", "<eos>", "w4", "w5"])]
    assert rows["first_document"][:] == [0, 2]
    assert rows["last_document"][:] == [0, 3]
    assert report == CorpusReport(num_examples=4, num_samples=2, empty=1, short=1, tokens=8)
    assert str(report) == (
        "a corpus: 4 documents make 2 blocks of 8 tokens; 1 documents without text left out; "
        "1 blocks of a single token left out"
    )


def test_texts_apart_share_no_block(shared_tokenizer: Any) -> None:
    options: Any = {"max_length": 4, "blocks": "apart", "progress": False}
    rows, report = tokenize(corpus("w0 w1 w2 w3 w4", "w5"), shared_tokenizer, **options)
    ids = shared_tokenizer.convert_tokens_to_ids
    assert rows["input_ids"][:] == [ids(["w0", "w1", "w2", "w3"]), ids(["w4", "<eos>"]), ids(["w5", "<eos>"])]
    assert rows["first_document"][:] == rows["last_document"][:] == [0, 0, 1]
    assert report.num_samples == 3


@pytest.mark.parametrize("blocks", ["joined", "apart"])
def test_a_corpus_without_a_token_to_predict_is_refused(shared_tokenizer: Any, blocks: str) -> None:
    with pytest.raises(ValueError, match="no sample is left after tokenisation: a corpus: 2 documents make 0 blocks"):
        tokenize(corpus("", "  "), shared_tokenizer, blocks=blocks, progress=False)


def test_a_text_longer_than_any_limit_is_cut_into_blocks(shared_tokenizer: Any) -> None:
    text = " ".join(f"w{i % 900}" for i in range(20_000))
    rows, report = tokenize(corpus(text), shared_tokenizer, max_length=512, progress=False)
    assert len(rows) == 40
    assert sum(len(ids) for ids in rows["input_ids"]) == report.tokens == 20_001


def test_an_unknown_kind_of_blocks_is_refused(shared_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="blocks must be one of joined, apart, got 'packed'"):
        tokenize(corpus("w0"), shared_tokenizer, blocks="packed", progress=False)


def test_questions_with_answers_beside_a_text_are_no_corpus(shared_tokenizer: Any) -> None:
    row = {"prompt": "w0", "completion": "w1", "text": "w0 w1 rendered"}
    rows, _ = tokenize(load_examples([row]), shared_tokenizer, progress=False)
    assert rows.column_names == ["sample_id", "input_ids", "labels", "prompt_length"]


def test_blocks_are_scored_by_cross_entropy_alone(shared_tokenizer: Any, make_tiny_model: Any) -> None:
    model, texts = make_tiny_model(), corpus(*[f"w{i} w{i + 1} w{i + 2}" for i in range(8)])
    rows: Dataset = tokenize(texts, shared_tokenizer, max_length=8, progress=False)[0]
    scores = score(model, shared_tokenizer, rows, answers=False, progress=False)
    assert scores["num_tokens"][:] == [7] * 4
    found = evaluate(model, shared_tokenizer, rows, num_generated=0, progress=False)
    assert found.cross_entropy == pytest.approx(np.mean(scores["cross_entropy"][:]))
    assert found.rouge_l is None
    with pytest.raises(ValueError, match="blocks of a corpus, which are no questions to answer; pass answers=False"):
        score(model, shared_tokenizer, rows, progress=False)
    with pytest.raises(ValueError, match="texts of a corpus.*make token rows of them with tokenize"):
        score(model, shared_tokenizer, texts, answers=False, progress=False)
