"""Intervals cover what they claim, over seeds and test samples, and say when they cannot tell."""

import numpy as np
import pytest

from pocl.compare.statistics import estimate, student_t

# Standard deviations of seeds, samples and rest: which one rules differs from metric to metric.
REGIMES = {"seeds": (1, 0, 0.1), "samples": (0.1, 1, 0.5), "rest": (0, 0, 1), "all": (0.15, 1, 1), "even": (0.1, 0, 1)}


def tables(regime: str, count: int, seeds: int = 5, samples: int = 100) -> np.ndarray:
    a, b, e = REGIMES[regime]
    draw = np.random.default_rng(7).normal
    shape = (count, seeds, samples)
    return a * draw(size=(count, seeds, 1)) + b * draw(size=(count, 1, samples)) + e * draw(size=shape)


@pytest.mark.parametrize("regime", REGIMES)
def test_of_500_comparisons_without_a_difference_93_to_97_percent_are_covered(regime: str) -> None:
    covered = sum(not estimate(table).told for table in tables(regime, 500))
    assert 465 <= covered <= 485


def test_a_bootstrap_over_five_seeds_would_not_cover() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for table in tables("seeds", 300):
        seeds = generator.multinomial(5, [0.2] * 5, size=300) / 5
        samples = generator.multinomial(100, [0.01] * 100, size=300) / 100
        low, high = np.quantile(((seeds @ table) * samples).sum(1), (0.025, 0.975))
        covered += low <= 0 <= high
    assert covered < 0.9 * 300


def test_a_family_of_comparisons_is_covered_as_a_whole() -> None:
    """Five arms against one plain arm: their differences share its noise."""
    draw = np.random.default_rng(3).normal
    plain, arms = draw(size=(500, 1, 5, 100)), draw(size=(500, 5, 5, 100))
    plain += 0.2 * draw(size=(500, 1, 5, 1))
    arms += 0.2 * draw(size=(500, 5, 5, 1))
    wrong = sum(any(estimate(table, comparisons=5).told for table in family) for family in arms - plain)
    assert wrong <= 0.07 * 500


def test_a_difference_is_told_and_the_mean_weighs_the_samples() -> None:
    table = tables("rest", 1)[0] + np.linspace(0, 2, 100)
    weights = np.linspace(1, 3, 100)
    found = estimate(table, weights)
    assert found.mean == pytest.approx((table.mean(0) * weights).sum() / weights.sum())
    assert found.told
    assert found.more_seeds == 0
    assert estimate(table, np.full(100, 4.0)).half == pytest.approx(estimate(table).half)


def test_one_seed_has_no_interval() -> None:
    found = estimate(tables("rest", 1)[0][:1])
    assert found.half is None
    assert not found.told
    assert found.more_seeds is None


def test_how_many_more_seeds_would_tell_is_about_right() -> None:
    table = tables("seeds", 1)[0]
    table += 0.5 - table.mean()
    found = estimate(table)
    assert not found.told
    assert found.more_seeds is not None
    noise = np.random.default_rng(1).normal(size=(400, 5 + found.more_seeds, 1)) * table.mean(1).std(ddof=1)
    told = sum(estimate(0.5 + np.broadcast_to(each, (*each.shape[:1], 100))).told for each in noise)
    assert 0.3 < told / 400 < 0.8


def test_where_the_samples_rule_no_number_of_seeds_tells() -> None:
    table = np.random.default_rng(2).normal(size=(1, 40)) + 0.001 * np.random.default_rng(3).normal(size=(5, 40))
    assert estimate(table + 0.05 - table.mean()).more_seeds is None


def test_equal_arms_differ_by_nothing() -> None:
    found = estimate(np.zeros((3, 10)))
    assert (found.mean, found.half, found.told) == (0.0, 0.0, False)


@pytest.mark.parametrize(
    ("table", "weights"),
    [(np.zeros((0, 3)), None), (np.zeros((2, 1)), None), (np.full((2, 3), np.nan), None), (np.ones((2, 3)), [1, 2])],
)
def test_tables_that_tell_nothing_are_refused(table: np.ndarray, weights: list[float] | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        estimate(table, None if weights is None else np.array(weights))


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (4, 2.7764), (30, 2.0423), (4.7, 2.6207), (1000, 1.9623)]
)
def test_quantiles_of_students_t_are_those_of_the_tables(freedom: float, quantile: float) -> None:
    assert student_t(0.975, freedom) == pytest.approx(quantile, abs=2e-4)
