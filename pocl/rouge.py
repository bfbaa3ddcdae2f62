"""ROUGE-L, equal to the `rouge_score` package to the last bit and one to two orders of magnitude faster.

    P = LCS / |prediction|,  R = LCS / |reference|,  F1 = 2 P R / (P + R)

over words. What a word is, is a rule:

    rouge_score   the package's: lower case, runs of `[a-z0-9]`. A text without a Latin letter or a digit has no word.
    unicode       segments between the default word boundaries of the Unicode standard that hold a letter or a digit:
                  Cyrillic, Arabic, Hindi or Korean words are runs of letters; where a script is written without spaces
                  (Han, Hiragana, Thai, Lao, Khmer, Burmese) every character is a word, with its marks; Katakana is
                  not cut.
    characters    every character (grapheme cluster) that is or holds a letter or a digit.
    auto          `rouge_score` for a pair whose reference has a word under it, else `unicode`.

Words longer than three Latin letters and digits are compared by their Porter stems. `unicode` and `characters` compare
texts after compatibility normalisation and case folding, so full-width and half-width forms are equal.

The longest common subsequence is bit-parallel (rapidfuzz, 64 columns a machine word) over interned word ids; stems are
cached, since a data set has far fewer distinct words than words.

Sources: C.-Y. Lin, "ROUGE: a package for automatic evaluation of summaries", 2004, section 3; Unicode Standard Annex
29, "Unicode text segmentation", sections 3 and 4; the Unicode Standard, section 3.13 (case folding).
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

WORD_RULES = ("auto", "rouge_score", "unicode", "characters")

_WORD = re.compile(r"[a-z0-9]+")

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _porter() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer

    stem: Callable[[str], str] = PorterStemmer().stem
    return stem


@lru_cache(maxsize=1 << 18)
def _stem(word: str) -> str:
    return _porter()(word) if len(word) > 3 else word


@lru_cache(maxsize=1)
def _unicode_patterns() -> tuple[Any, Any, Any]:
    """Word boundaries, characters, and what makes a segment of either a word."""
    import regex

    return regex.compile(r"(?V1w)\b"), regex.compile(r"\X"), regex.compile(r"[\p{L}\p{N}]")


def words(text: str, *, stem: bool = True, rule: str = "auto") -> list[str]:
    """The words of `text` that ROUGE compares.

    Args:
        text: any text.
        stem: give Porter stems in place of Latin words longer than three characters.
        rule: one of `WORD_RULES`; `auto` looks at this text alone.
    """
    check_rule(rule)
    if rule in ("auto", "rouge_score"):
        found = _WORD.findall(text.lower())
        if found or rule == "rouge_score":
            return [_stem(word) for word in found] if stem else found
    boundaries, character, of_words = _unicode_patterns()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    segments = character.findall(folded) if rule == "characters" else boundaries.split(folded)
    found = [segment for segment in segments if of_words.search(segment)]
    return [_stem(word) if _WORD.fullmatch(word) else word for word in found] if stem else found


def check_rule(rule: str) -> None:
    """Raise a ValueError if there is no such rule for words."""
    if rule not in WORD_RULES:
        raise ValueError(f"words must be one of {', '.join(WORD_RULES)}, got {rule!r}")


def rouge_l(
    predictions: Sequence[str], references: Sequence[str], *, stem: bool = True, words: str = "auto"
) -> list[float]:
    """ROUGE-L F1 of each prediction against its reference, in [0, 1]; 0 where either has no words.

    References without a single word measure nothing; how many there are is told in one warning.

    Args:
        predictions: texts to judge.
        references: as many texts to judge by.
        stem: compare Porter stems, as the paper does.
        words: what a word is: `auto`, `rouge_score`, `unicode` or `characters`.

    Raises:
        ValueError: the two differ in length, or there is no such rule for words.
    """
    scores = pair_scores(predictions, references, stem=stem, words=words)
    # a reference without words scores 0: others need not be looked at again
    unscored = [reference for score, reference in zip(scores, references, strict=True) if not score]
    warn_of_wordless(count_wordless(unscored, words), len(references), words)
    return scores


def pair_scores(predictions: Sequence[str], references: Sequence[str], *, stem: bool, words: str) -> list[float]:
    """As `rouge_l`, without a warning."""
    check_rule(words)
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions and references must have the same length, got {len(predictions)} and {len(references)}"
        )
    return [_pair(p, r, stem, words) for p, r in zip(predictions, references, strict=True)]


def count_wordless(references: Sequence[str], rule: str) -> int:
    """How many references have no word under a rule, so that any answer scores 0."""
    check_rule(rule)
    latin = rule in ("auto", "rouge_score")
    left = [text for text in references if not latin or not _WORD.search(text.lower())]
    return len(left) if rule == "rouge_score" else sum(not words(text, stem=False, rule=rule) for text in left)


def warn_of_wordless(count: int, total: int, rule: str, where: str = "") -> None:
    """Say, if it is so, that references have no words, and what to do."""
    if count:
        logger.warning(
            "%d of %d references have no word under the rule %r: ROUGE-L is 0 for whatever answers them%s%s",
            count,
            total,
            rule,
            "; words='unicode' finds words of any script" if rule == "rouge_score" else "",
            where,
        )


def _pair(prediction: str, reference: str, stem: bool, rule: str) -> float:
    from rapidfuzz.distance import LCSseq

    in_reference: list[str] = []
    if rule == "auto":
        in_reference, rule = words(reference, stem=stem, rule="rouge_score"), "rouge_score"
        if not in_reference:
            rule = "unicode"
    in_reference = in_reference or words(reference, stem=stem, rule=rule)
    in_prediction = words(prediction, stem=stem, rule=rule)
    if not in_prediction or not in_reference:
        return 0.0
    # Small integers stand for words: rapidfuzz would compare hashes of strings, and two words may share a hash.
    ids: dict[str, int] = {}
    a = [ids.setdefault(word, len(ids)) for word in in_prediction]
    b = [ids.setdefault(word, len(ids)) for word in in_reference]
    lcs = LCSseq.similarity(a, b)
    # The order of these operations is that of rouge_score: the last bit depends on it.
    precision, recall = lcs / len(a), lcs / len(b)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
