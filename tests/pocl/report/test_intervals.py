"""Intervals over samples: seeded, as wide as theory says, weighted by tokens, and silent where nothing is known."""

import math
import random

import pytest

from pocl.report.intervals import difference, half_width


def result(values: list[float], measure: str = "rouge_l", tokens: list[int] | None = None) -> dict[str, object]:
    return {"of_each": {measure: values, "num_tokens": tokens or [1] * len(values)}}


def test_half_a_width_is_near_two_standard_errors() -> None:
    generator = random.Random(0)
    values = [generator.gauss(0.5, 0.2) for _ in range(400)]
    mean = sum(values) / 400
    error = math.sqrt(sum((v - mean) ** 2 for v in values)) / 400
    assert half_width(result(values), "rouge_l") == pytest.approx(1.96 * error, rel=0.06)
    assert half_width(result(values), "rouge_l") == half_width(result(values), "rouge_l")


def test_measures_of_tokens_weigh_samples_by_their_tokens() -> None:
    heavy = result([1.0, 2.0, 3.0, 9.0], "cross_entropy", [1000, 1000, 1000, 1])
    light = result([1.0, 2.0, 3.0, 9.0], "cross_entropy", [1, 1, 1, 1])
    assert half_width(heavy, "cross_entropy") < 0.5 * half_width(light, "cross_entropy")


def test_a_difference_is_paired_by_sample() -> None:
    generator = random.Random(1)
    before = [generator.gauss(5, 3) for _ in range(100)]
    after = [value - 0.1 + generator.gauss(0, 0.05) for value in before]
    low, high = difference(result(before), result(after), "rouge_l")
    assert -0.12 < low < -0.1 < high < -0.08 or low < -0.09 < high < 0


@pytest.mark.parametrize("of_each", [{}, {"rouge_l": []}, {"rouge_l": [0.1, 0.2]}])
def test_too_few_or_unknown_samples_have_no_interval(of_each: dict[str, list[float]]) -> None:
    assert half_width({"of_each": of_each}, "rouge_l") is None
    assert difference({"of_each": of_each}, {"of_each": of_each}, "rouge_l") is None
    assert half_width({}, "rouge_l") is None


def test_samples_that_do_not_match_have_no_difference() -> None:
    assert difference(result([1.0] * 5), result([1.0] * 6), "rouge_l") is None
