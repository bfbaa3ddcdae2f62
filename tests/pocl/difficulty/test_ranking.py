"""The ranking against an example worked by hand, and its laws."""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from pocl.difficulty import CROSS_ENTROPY, RESPONSE_LENGTH, ROUGE_L, Criterion, rank
from pocl.difficulty.ranking import _exact_sums, ordinal_ranks


def _scores(cross_entropy: list[float], rouge: list[float], **more: Any) -> Dataset:
    ids = list(range(100, 100 + len(rouge)))
    return Dataset.from_dict({"sample_id": ids, "cross_entropy": cross_entropy, "rouge_l": rouge, **more})


def test_a_criterion_that_is_the_same_for_all_samples_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    rank(_scores([2.0, 1.0, 3.0], [0.0, 0.0, 0.0]), num_subsets=1)
    rank(_scores([2.0, 1.0, 3.0], [0.0, 0.0, 0.1]), num_subsets=1)
    rank(_scores([2.0], [0.0]), num_subsets=1)
    (record,) = caplog.records
    assert "rouge_l (0): the same for all 3 samples" in record.getMessage()
    caplog.clear()
    rank(_scores([2.0, 2.0], [0.5, 0.5]), num_subsets=1)
    assert caplog.messages[0].startswith("rouge_l (0.5), cross_entropy (2): the same for all 2 samples")
    assert len(caplog.messages) == 1


def test_five_samples_with_ties_rank_as_worked_by_hand() -> None:
    # ROUGE-L descending: 0.9 (sample 1), then the two 0.5 in their order (0, 3), 0.2 (2), 0.0 (4)
    # cross-entropy ascending: 1.0 (3), the two 2.0 in their order (0, 1), 3.0 (4), 4.0 (2)
    ranked = rank(_scores([2.0, 2.0, 4.0, 1.0, 3.0], [0.5, 0.9, 0.2, 0.5, 0.0]), num_subsets=2)
    assert ranked["rank_rouge_l"][:] == [2, 1, 4, 3, 5]
    assert ranked["rank_cross_entropy"][:] == [2, 3, 5, 1, 4]
    pairs = [(2, 2), (1, 3), (4, 5), (3, 1), (5, 4)]
    assert ranked["rrf_score"][:] == [1 / (60 + a) + 1 / (60 + b) for a, b in pairs]
    # 1/61 + 1/63 > 2/62: samples 1 and 3 tie before sample 0; samples 2 and 4 tie behind it; ties keep their order
    assert ranked["rank"][:] == [3, 1, 4, 2, 5]
    assert ranked["subset"][:] == [1, 0, 1, 0, 1]  # parts of floor(5 / 2), the remainder in the last


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30), st.booleans())
def test_ordinal_ranks_are_a_stable_permutation(values: list[float], descending: bool) -> None:
    ranks = ordinal_ranks(values, direction="descending" if descending else "ascending")
    assert sorted(ranks) == list(range(1, len(values) + 1))
    for i in range(len(values)):
        for j in range(i):
            first_is_easier = values[j] > values[i] if descending else values[j] < values[i]
            assert (ranks[j] < ranks[i]) == (first_is_easier or values[i] == values[j])


def test_samples_with_the_same_ranks_under_other_criteria_tie_exactly() -> None:
    # ranks (1, 2, 7), (7, 1, 2), (2, 7, 1): added one after another, their sums differ in the last bit
    table = {"a": [1, 7, 2, 3, 4, 5, 6], "b": [2, 1, 7, 3, 4, 5, 6], "c": [7, 2, 1, 3, 4, 5, 6]}
    scores = Dataset.from_dict({"sample_id": range(7), **table})
    ranked = rank(scores, criteria=[Criterion(c) for c in table], num_subsets=1)
    assert len(set(ranked["rrf_score"][:3])) == 1
    assert ranked["rank"][:] == [2, 3, 4, 1, 5, 6, 7]


@pytest.mark.parametrize(("count", "subsets"), [(11, 4), (8, 4), (5, 5), (7, 1)])
def test_parts_are_floor_n_over_k_and_the_last_takes_the_rest(count: int, subsets: int) -> None:
    values = [float(i) for i in range(count)]
    ranked = rank(_scores(values, values[::-1]), num_subsets=subsets)
    sizes = [ranked["subset"][:].count(s) for s in range(subsets)]
    assert sizes == [count // subsets] * (subsets - 1) + [count - (subsets - 1) * (count // subsets)]
    assert ranked["subset"][:] == sorted(ranked["subset"][:])


def test_quantile_parts_keep_equal_scores_together() -> None:
    lengths = [1, 1, 1, 2, 3, 4, 5, 6]
    criteria = [Criterion("num_tokens"), Criterion("cross_entropy", "descending")]
    scores = _scores([float(x) for x in lengths], [0.0] * 8, num_tokens=lengths)
    tied = rank(scores, criteria=criteria, partition="quantile", num_subsets=2)
    for a in range(8):
        for b in range(8):
            if tied["rrf_score"][a] == tied["rrf_score"][b]:
                assert tied["subset"][a] == tied["subset"][b]
    assert set(tied["subset"][:]) == {0, 1}


@pytest.mark.parametrize(("count", "subsets"), [(11, 4), (9, 4), (8, 3)])
def test_quantile_parts_without_ties_differ_by_one_at_most(count: int, subsets: int) -> None:
    values = [float(i) for i in range(count)]
    ranked = rank(_scores(values, [0.0] * count), criteria=[CROSS_ENTROPY], partition="quantile", num_subsets=subsets)
    sizes = [ranked["subset"][:].count(s) for s in range(subsets)]
    assert max(sizes) - min(sizes) <= 1


def test_a_quantile_without_samples_is_refused() -> None:
    # two criteria that contradict each other: mirrored samples tie, and of three parts of two samples one stays empty
    criteria = [CROSS_ENTROPY, Criterion("rouge_l", "ascending")]
    with pytest.raises(ValueError, match="leaves subset 1 empty"):
        rank(_scores([1.0, 2.0], [2.0, 1.0]), criteria=criteria, partition="quantile", num_subsets=2)


def test_weight_and_direction_of_a_criterion_decide() -> None:
    scores = _scores([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], num_tokens=[3, 2, 1])
    assert rank(scores, criteria=[CROSS_ENTROPY], num_subsets=1)["rank"][:] == [1, 2, 3]
    assert rank(scores, criteria=[RESPONSE_LENGTH], num_subsets=1)["rank"][:] == [3, 2, 1]
    heavy = [CROSS_ENTROPY, {"column": "rouge_l", "direction": "descending", "weight": 5.0}]
    assert rank(scores, criteria=heavy, num_subsets=1)["rank"][:] == [3, 2, 1]


def test_ranking_again_replaces_the_columns() -> None:
    once = rank(_scores([1.0, 2.0], [0.5, 0.4]), num_subsets=2)
    assert rank(once, num_subsets=2).to_dict() == once.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_subsets": 3}, r"between 1 and the number of samples \(2\), got 3; use fewer stages"),
        ({"num_subsets": 0}, "got 0"),
        ({"k": -1}, "k must be finite and not negative, got -1"),
        ({"criteria": []}, "criteria is empty"),
        ({"criteria": [ROUGE_L, ROUGE_L]}, "name a column twice"),
        ({"criteria": [Criterion("perplexity")]}, "lack the columns perplexity"),
        ({"criteria": [{"column": "rouge_l", "direction": "up"}]}, "direction of criterion 'rouge_l' must be one of"),
        ({"criteria": [{"column": "rouge_l", "weight": 0.0}]}, "weight of criterion 'rouge_l' must be positive"),
        ({"partition": "size"}, "partition must be one of count, quantile, got 'size'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank(_scores([1.0, 2.0], [0.5, 0.4]), **{"num_subsets": 2, **options})


def _ranks_by_hand(values: Sequence[float], direction: str) -> list[int]:
    order = sorted(range(len(values)), key=lambda i: values[i], reverse=direction == "descending")
    return [order.index(i) + 1 for i in range(len(values))]


def _rank_by_hand(
    columns: Sequence[Sequence[float]], criteria: Sequence[Criterion], k: float, n: int
) -> dict[str, Any]:
    """The ranking one sample at a time, as the formula reads."""
    ranks = [_ranks_by_hand(values, c.direction) for values, c in zip(columns, criteria, strict=True)]
    fused = [
        math.fsum(c.weight / (k + r[i]) for c, r in zip(criteria, ranks, strict=True)) for i in range(len(ranks[0]))
    ]
    final = _ranks_by_hand(fused, "descending")
    size = len(final) // n
    first = {score: min(r for r, s in zip(final, fused, strict=True) if s == score) for score in fused}
    return {
        "rank": final,
        "rrf_score": fused,
        "count": [min((r - 1) // size, n - 1) for r in final],
        "quantile": [(first[score] - 1) * n // len(fused) for score in fused],
    }


@given(
    st.integers(1, 5).flatmap(
        lambda width: st.tuples(
            st.lists(
                st.tuples(*[st.sampled_from([0.0, -0.0, 0.5, 1e-300, 7.0]) | st.floats(-9, 9)] * width),
                min_size=1,
                max_size=40,
            ),
            st.lists(st.sampled_from([1.0, 0.3, 5.0, 1e9, 1e-9]), min_size=width, max_size=width),
            st.lists(st.sampled_from(["ascending", "descending"]), min_size=width, max_size=width),
        )
    ),
    st.sampled_from([60, 0, 0.1, 1e6]),
    st.integers(1, 4),
)
def test_whole_columns_rank_to_the_bit_as_one_sample_after_another(drawn: Any, k: float, n: int) -> None:
    rows, weights, directions = drawn
    criteria = [Criterion(f"c{i}", d, w) for i, (d, w) in enumerate(zip(directions, weights, strict=True))]
    columns = [list(values) for values in zip(*rows, strict=True)]
    wanted, n = _rank_by_hand(columns, criteria, k, min(n, len(rows))), min(n, len(rows))
    scores = Dataset.from_dict({c.column: values for c, values in zip(criteria, columns, strict=True)})
    ranked = rank(scores, k=k, criteria=criteria, num_subsets=n)
    assert ranked["rank"][:] == wanted["rank"]
    assert ranked["rrf_score"][:] == wanted["rrf_score"]
    assert ranked["subset"][:] == wanted["count"]
    if set(wanted["quantile"]) == set(range(n)):
        assert (
            rank(scores, k=k, criteria=criteria, num_subsets=n, partition="quantile")["subset"][:] == wanted["quantile"]
        )


def test_sums_that_double_precision_cannot_order_are_rounded_once() -> None:
    ranks = np.random.default_rng(0).integers(1, 50, size=(7, 2000))
    terms = [1 / (0.1 + of_one) for of_one in ranks]
    found = _exact_sums(terms)
    assert found.tolist() == [math.fsum(column) for column in zip(*[t.tolist() for t in terms], strict=True)]
    assert found.tolist() != sum(terms).tolist()  # else plain addition would do


def test_rows_that_were_selected_rank_as_rows_that_were_copied() -> None:
    whole = _scores([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4])
    chosen = whole.select([3, 1, 2])
    assert rank(chosen, num_subsets=2).to_dict() == rank(Dataset.from_dict(chosen.to_dict()), num_subsets=2).to_dict()


def test_many_scores_rank_without_an_object_for_each() -> None:
    draw = np.random.default_rng(0)
    columns = {"sample_id": np.arange(200_000), "cross_entropy": draw.random(200_000), "rouge_l": draw.random(200_000)}
    scores = Dataset(pa.table(columns), fingerprint="scores")
    started = time.process_time()
    rank(scores)
    assert time.process_time() - started < 1.5  # about 0.1 s; a Python object for each value costs 4 s


@pytest.mark.parametrize("values", [["a", "b"], [[1.0], [2.0]]])
def test_a_criterion_that_is_no_number_is_refused(values: list[Any]) -> None:
    with pytest.raises(ValueError, match="criterion 'rouge_l' must be a column of numbers"):
        rank(_scores([1.0, 2.0], values), num_subsets=2)


def test_a_value_that_is_not_finite_names_its_sample() -> None:
    with pytest.raises(ValueError, match="'cross_entropy' is not finite for sample 101"):
        rank(_scores([1.0, float("nan")], [0.5, 0.4]), num_subsets=2)
