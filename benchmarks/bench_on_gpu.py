"""`bench_gpu` as part of all benchmarks: `make bench-gpu`."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.bench_gpu import LEAST_MS, LEAST_RUNS, SHAPES, Clock, eager, ours
from benchmarks.problems import Problem, floor, make_problem

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["floor", "fast", "low", "eager"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_forward_and_backward_on_a_gpu(benchmark: Any, shape: Sequence[int], name: str) -> None:
    problem = make_problem(*shape, device="cuda")
    problem = Problem(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in vars(problem).items()})
    function = {"floor": floor, "fast": ours("fast", 1024), "low": ours("low"), "eager": eager}[name]

    def synchronised() -> None:
        function(problem)
        torch.cuda.synchronize()

    median = Clock().interleaved({name: synchronised})[name]
    rounds = max(LEAST_RUNS, math.ceil(LEAST_MS / statistics.median(median)))
    benchmark.pedantic(synchronised, rounds=rounds, iterations=1, warmup_rounds=1)
