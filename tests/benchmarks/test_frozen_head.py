"""The count of products that the benchmark of frozen heads prints."""

import pytest

from benchmarks.bench_frozen_head import floor, loss, multiplications
from benchmarks.problems import make_problem


@pytest.mark.parametrize(("trained", "products"), [(False, 3), (True, 4)])
def test_a_frozen_head_saves_one_of_four_products(trained: bool, products: int) -> None:
    problem = make_problem(8, 129, 16, 16)
    expected = products * int(problem.valid.sum()) * 129 * 16
    assert multiplications(lambda: floor(problem, trained=trained)) == expected
    for divergence in ("fkl", "jsd"):
        assert multiplications(lambda name=divergence: loss(problem, trained=trained, divergence=name)) == expected
