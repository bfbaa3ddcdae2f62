"""ROUGE-L against the package it must equal, and its own laws."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.rouge import rouge_l, words

# Words that stem, collide after stemming, are short, hold digits or letters that lower() turns into ASCII.
WORDS = ["run", "running", "runner", "runs", "the", "an", "cats", "cat", "dying", "flies", "x", "3rd", "U.S.", "don't"]
WORDS += ["naïve", "K2", "\u212a2", "İstanbul", "straße"]


@pytest.fixture(scope="module")
def scorers() -> dict[bool, Any]:
    from rouge_score.rouge_scorer import RougeScorer

    return {stem: RougeScorer(["rougeL"], use_stemmer=stem) for stem in (True, False)}


def _expected(scorer: Any, prediction: str, reference: str) -> float:
    return float(scorer.score(reference, prediction)["rougeL"].fmeasure)


@given(prediction=st.text(max_size=60), reference=st.text(max_size=60), stem=st.booleans())
def test_any_unicode_scores_as_rouge_score_does(
    scorers: dict[bool, Any], prediction: str, reference: str, stem: bool
) -> None:
    assert rouge_l([prediction], [reference], stem=stem) == [_expected(scorers[stem], prediction, reference)]


@given(
    prediction=st.lists(st.sampled_from(WORDS), max_size=150),
    reference=st.lists(st.sampled_from(WORDS), max_size=150),
    stem=st.booleans(),
)
def test_word_sequences_beyond_one_machine_word_score_as_rouge_score_does(
    scorers: dict[bool, Any], prediction: list[str], reference: list[str], stem: bool
) -> None:
    a, b = " ".join(prediction), " ".join(reference)
    assert rouge_l([a], [b], stem=stem) == [_expected(scorers[stem], a, b)]


def test_long_random_texts_score_as_rouge_score_does(scorers: dict[bool, Any]) -> None:
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(1, 400))) for _ in range(40)]
    pairs = list(zip(texts, reversed(texts), strict=True))
    for stem in (True, False):
        expected = [_expected(scorers[stem], p, r) for p, r in pairs]
        assert rouge_l([p for p, _ in pairs], [r for _, r in pairs], stem=stem) == expected


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30))
def test_a_text_with_words_scores_one_against_itself(text: list[str]) -> None:
    assert rouge_l([" ".join(text)], [" ".join(text)]) == [1.0]


def test_only_words_longer_than_three_characters_are_stemmed() -> None:
    assert words("Ties dies running") == ["tie", "die", "run"]
    assert words("was runs", stem=True) == ["was", "run"]
    assert words("running", stem=False) == ["running"]


def test_texts_without_words_score_zero() -> None:
    assert rouge_l(["", "…", "word"], ["word", "word", "!"]) == [0.0, 0.0, 0.0]


def test_unequal_numbers_of_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="same length, got 1 and 2"):
        rouge_l(["a"], ["a", "b"])
