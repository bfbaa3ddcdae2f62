"""Sparse teachers: every divergence and tail against float64, and the laws that they obey."""

import functools
from typing import Any

import pytest
import torch

from pocl_kernels import DIVERGENCES
from pocl_kernels.sparse import TAILS
from tests.kernels.cases import INSTANCES, Case, assert_close, make_case, solve
from tests.kernels.sparse_cases import oracle, sparse

INFINITE = {"rkl", "jeffreys", "mixed_kl"}  # where the teacher has no probability
V = 311
EXACT = 1.5e-6


@functools.cache
def sparse_case(K: int, tail: str, **of_case: Any) -> Case:
    return sparse(make_case(12, V, **of_case), K, tail, ragged=K < V)


@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize("tail", TAILS)
def test_every_divergence_and_tail_equals_float64(engine: Any, tail: str, name: str) -> None:
    case, call = sparse_case(7, tail), {"divergence": INSTANCES[name], "ce_weight": 0.3}
    if tail in ("renormalise", "zero") and not finite_without_teacher(name):
        with pytest.raises(ValueError, match="is infinite where the teacher has no probability"):
            solve(engine, case, **call)
        return
    T = 1.0 if tail == "zero" else 2.0
    assert_close(solve(engine, case, temperature=T, **call), oracle(case, temperature=T, **call), EXACT)


def finite_without_teacher(name: str) -> bool:
    divergence = INSTANCES[name]
    divergence = DIVERGENCES[divergence]() if isinstance(divergence, str) else divergence
    return bool(torch.isfinite(divergence.value(torch.tensor(-1.0), torch.tensor(-torch.inf))))
