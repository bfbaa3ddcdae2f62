"""Sharp rows, and numbers of one a token, through the Triton kernels (`../test_sharp.py`, `../test_by_token.py`)."""

import math

import pytest
import torch

import pocl_kernels
from pocl_kernels import JSD, MixedKL
from pocl_kernels.triton_backend import state
from tests.kernels.cases import assert_close, make_case, oracle, solve


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("divergence", ["skew_fkl", "alpha", "tvd", "jsd"])
def test_the_sharpest_rows_keep_their_digits(divergence: str, memory: str) -> None:
    case = make_case(12, 403, spread=10.0)
    call = dict(divergence=divergence, temperature=0.5)
    truth = oracle(case, **call)
    result = solve(pocl_kernels.fused_linear_divergence, case, backend="triton", memory=memory, **call)
    assert result.errors(truth)["hidden"] <= 1e-5  # plain PyTorch: 0.6 for TVD


@pytest.mark.parametrize("divergence", ["rkl", "jeffreys", "mixed_kl"])
def test_sums_of_slopes_made_another_way_are_as_exact(divergence: str) -> None:
    # Seen before: 2 (rkl) to 6 times the error of "fast", which sums the very slopes that it subtracts the sum from.
    case, call = make_case(8, 403, spread=1.0, near=1e-4), dict(divergence=divergence, temperature=4.0)
    truth = oracle(case, **call)
    fast, low = (
        solve(pocl_kernels.fused_linear_divergence, case, backend="triton", memory=memory, **call).errors(truth)
        for memory in ("fast", "low")
    )
    assert low["hidden"] <= 1.05 * fast["hidden"]


def test_the_anchors_slope_where_normalisers_are_far_apart() -> None:
    # Their difference is rounded to one of them, so that its share no longer knows the other.
    sums = state.empty_sums(1, torch.float32, torch.device("cpu"))
    sums[[state.MAX_T.value, state.TOP.value]] = 0.0
    sums[state.SUM_S.value], sums[state.SUM_T.value], sums[state.SUM_E.value] = 1.0, 1e8, 1.0 - 1e8
    found = state.slope_at_anchor(sums, 1.0, (0.0, 1.0))
    assert float(found) == pytest.approx(math.log(1e8))


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("kind", [JSD, MixedKL])
def test_every_token_keeps_its_own_numbers(kind: type, memory: str) -> None:
    rows = 5
    case = make_case(rows, 67).replace(labels=torch.tensor([3, -100, 5, 66, 0]))
    numbers, temperature = torch.linspace(0.2, 0.8, rows), torch.linspace(0.7, 2.0, rows)
    call = dict(divergence=kind(numbers), temperature=temperature, reduction="sum", ce_weight=0.2)
    result = solve(pocl_kernels.fused_linear_divergence, case, backend="triton", memory=memory, **call)
    for i in (0, 2, 3, 4):
        one = case.rows(slice(i, i + 1))
        alone = dict(divergence=kind(float(numbers[i])), temperature=float(temperature[i]))
        truth = oracle(one, reduction="sum", ce_weight=0.2, **alone)
        torch.testing.assert_close(result.hidden[i : i + 1].double(), truth.hidden, rtol=1e-5, atol=1e-6)  # type: ignore[index]
    again = solve(pocl_kernels.fused_linear_divergence, case, memory=memory, **call)
    assert_close(result, again, 3e-6)
