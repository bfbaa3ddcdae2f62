"""Sharp rows, and numbers of one a token, through the Triton kernels (`../test_sharp.py`, `../test_by_token.py`)."""

import pytest
import torch

import pocl_kernels
from pocl_kernels import JSD, MixedKL
from tests.kernels.cases import assert_close, make_case, oracle, solve


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("divergence", ["skew_fkl", "alpha", "tvd", "jsd"])
def test_the_sharpest_rows_keep_their_digits(divergence: str, memory: str) -> None:
    case = make_case(12, 403, spread=10.0)
    call = dict(divergence=divergence, temperature=0.5)
    truth = oracle(case, **call)
    result = solve(pocl_kernels.fused_linear_divergence, case, backend="triton", memory=memory, **call)
    assert result.errors(truth)["hidden"] <= 1e-5  # plain PyTorch: 0.6 for TVD


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
