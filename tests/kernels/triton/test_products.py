"""A device whose products cannot take 16-bit factors into float32: said once, and multiplied in float32."""

import warnings
from typing import Any

import pytest
import torch

import pocl_kernels
from pocl_kernels.triton_backend import gemm
from tests.kernels.cases import assert_close, make_case, oracle, solve

DEVICE = torch.device("meta")  # no CPU, and it is everywhere


@pytest.fixture(autouse=True)
def _nothing_tried_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_TAKES_16_BIT", {})


def test_products_that_a_build_lacks_are_told_once_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> None:
        raise RuntimeError("Expected out tensor to have dtype bfloat16, but got float instead")

    monkeypatch.setattr(torch, "addmm", lacking)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answers = [gemm.takes_16_bit(DEVICE, dtype) for dtype in (torch.bfloat16, torch.float16) for _ in range(3)]
    assert not any(answers)
    assert len(said) == 2
    for warning, dtype in zip(said, ("torch.bfloat16", "torch.float16"), strict=True):
        assert warning.category is RuntimeWarning
        assert f"cannot add products of {dtype} factors to a float32 buffer on meta" in str(warning.message)
        assert "many times slower. Install torch 2.10 or newer" in str(warning.message)


def test_a_full_memory_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(torch, "addmm", full)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            gemm.takes_16_bit(DEVICE, torch.bfloat16)
    assert gemm._TAKES_16_BIT == {}


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_16_bit_models_are_then_as_exact_as_in_float32(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(*tensors: Any, **arguments: Any) -> Any:
        return pocl_kernels.fused_linear_divergence(*tensors, backend="triton", memory=memory, **arguments)

    asked = []
    monkeypatch.setattr(gemm, "takes_16_bit", lambda device, dtype: bool(asked.append(dtype)))
    case = make_case(5, 603, bias=True, dtype=torch.bfloat16)
    call = dict(divergence="jsd", temperature=2.0, ce_weight=0.3)
    result, truth = solve(loss, case, **call), oracle(case, **call)
    assert asked
    assert float(result.loss) == pytest.approx(float(truth.loss), rel=2e-6)
    assert_close(result, truth, 3e-3)  # gradients are returned in bf16
