"""ROUGE-L against the package it must equal, and its own laws."""

import logging
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.rouge import count_wordless, rouge_l, words

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
    expected = [_expected(scorers[stem], prediction, reference)]
    assert rouge_l([prediction], [reference], stem=stem, words="rouge_score") == expected
    if words(reference, rule="rouge_score"):
        assert rouge_l([prediction], [reference], stem=stem) == expected


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


UNICODE_WORDS = {  # after the standard's rules, and equal to what another implementation of them gives
    "кот сидит на коврике": ["кот", "сидит", "на", "коврике"],
    "القط جلس على السجادة": ["القط", "جلس", "على", "السجادة"],
    "बिल्ली बैठी": ["बिल्ली", "बैठी"],
    "שלום, עולם!": ["שלום", "עולם"],
    "한국어 단어는": ["한국어", "단어는"],
    "猫坐在垫子上。": ["猫", "坐", "在", "垫", "子", "上"],
    "コンピュータでひらがな": ["コンピュータ", "で", "ひ", "ら", "が", "な"],
    "กินข้าว": ["กิ", "น", "ข้", "า", "ว"],
    "ខ្មែរ": ["ខ្", "មែ", "រ"],
    "GPT4模型 don't U.S.": ["gpt4", "模", "型", "don't", "u.s"],
    "Straße ＡＢＣ ｶﾞ ١٢": ["strasse", "abc", "ガ", "١٢"],
    "🐈 … ++": [],
}


@pytest.mark.parametrize("text", UNICODE_WORDS)
def test_unicode_words_are_those_of_the_standard(text: str) -> None:
    assert words(text, rule="unicode", stem=False) == UNICODE_WORDS[text]


def test_characters_are_counted_with_their_marks() -> None:
    assert words("Ab ป่า 猫。ガ", rule="characters") == ["a", "b", "ป่", "า", "猫", "ガ"]


def test_only_latin_words_are_stemmed_whatever_the_rule() -> None:
    assert words("Running машинами don't", rule="unicode") == ["run", "машинами", "don't"]


@pytest.mark.parametrize("text", [text for text, found in UNICODE_WORDS.items() if found])
@pytest.mark.parametrize("rule", ["auto", "unicode", "characters"])
def test_a_perfect_answer_scores_one_in_any_script(rule: str, text: str) -> None:
    assert rouge_l([text], [text], words=rule) == [1.0]


def test_answers_in_scripts_without_spaces_share_what_they_share() -> None:
    assert rouge_l(["猫在垫子上睡觉"], ["猫坐在垫子上"]) == [2 * (5 / 7) * (5 / 6) / (5 / 7 + 5 / 6)]
    assert rouge_l(["собака сидит на ковре"], ["кот сидит на коврике"]) == [0.5]
    composed, decomposed, wide = "caf\u00e9 12", "CAFE\u0301 12", "ｃａｆé １２"
    assert rouge_l([decomposed, wide], [composed] * 2, words="unicode") == [1.0, 1.0]


def test_by_default_a_reference_with_a_latin_word_is_judged_by_its_latin_words_alone() -> None:
    assert rouge_l(["GPT 模型"], ["GPT 很好"]) == [1.0]
    assert rouge_l(["GPT 模型"], ["GPT 很好"], words="unicode") == [1 / 3]
    assert rouge_l(["GPT"], ["很好"]) == [0.0]


def test_references_without_a_word_are_told_once_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rouge_l(["猫", "cat", "x"] * 2, ["猫", "cat", "!"] * 2, words="rouge_score")
    (record,) = caplog.records
    assert "4 of 6 references have no word under the rule 'rouge_score'" in record.getMessage()
    assert "words='unicode' finds words of any script" in record.getMessage()
    caplog.clear()
    rouge_l(["猫", "cat", "dog"], ["猫", "cat", "cat"])
    assert not caplog.records
    assert [count_wordless(["™", "a", "猫", "!", ""], rule) for rule in ("auto", "rouge_score", "unicode")] == [2, 4, 2]


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="words must be one of auto, rouge_score, unicode, characters, got 'jieba'"):
        rouge_l(["a"], ["a"], words="jieba")
