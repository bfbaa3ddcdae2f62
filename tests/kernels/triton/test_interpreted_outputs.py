"""What a loss says beside itself, with Triton's kernels in the interpreter."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import pocl_kernels
from tests.kernels import test_cross_entropy as cross_entropy
from tests.kernels.cases import make_case
from tests.kernels.test_frozen_head import check_frozen
from tests.kernels.test_outputs import check_masks, check_outputs, half_right


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, chunks of rows and vocabulary tiles, none of them even."""
    for kernel in ("divergence_rows", "cross_entropy_rows", "tile_statistics", "tile_values", "tile_gradient"):
        monkeypatch.setattr(f"pocl_kernels.triton_backend.{kernel}.BLOCK", 256)
    monkeypatch.setattr("pocl_kernels.triton_backend.low.tile_shape", lambda rows, *_: (min(rows, 3), 512))


def triton(memory: str) -> Any:
    return functools.partial(pocl_kernels.fused_linear_divergence, backend="triton", memory=memory)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("divergence", ["fkl", "jsd"])
def test_entropies_and_accuracy_are_those_of_full_logits(divergence: str, memory: str) -> None:
    case = half_right(make_case(6, 1031, bias=True))
    check_outputs(triton(memory), case, divergence, "mean")
    if memory == "low":
        check_outputs(triton(memory), case.to(torch.float64), divergence, "none", 1e-12)


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_a_teacher_that_is_sure_has_no_entropy_and_one_that_masks_has_less(memory: str) -> None:
    with torch.no_grad():
        check_masks(triton(memory))


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (memory, x)
        for memory in ("fast", "low")
        for x in cross_entropy.OPTIONS[:5]
        if (memory, x.get("reduction")) != ("fast", "none")
    ],
    ids=str,
)
def test_cross_entropy_with_every_option(memory: str, options: dict[str, Any]) -> None:
    loss = functools.partial(pocl_kernels.fused_linear_cross_entropy, backend="triton", memory=memory)
    case = cross_entropy.half_right(make_case(6, 1031, bias=True))
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, 3e-3)):
        cross_entropy.check(loss, case.to(dtype), tolerance, **options)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_frozen_head_has_no_gradient_buffer(memory: str) -> None:
    for loss in (pocl_kernels.fused_linear_divergence, pocl_kernels.fused_linear_cross_entropy):
        check_frozen(loss, backend="triton", memory=memory)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_no_float16_tile_of_a_heavy_z_loss_overflows(memory: str) -> None:
    loss = functools.partial(pocl_kernels.fused_linear_cross_entropy, backend="triton", memory=memory)
    cross_entropy.check(loss, make_case(5, 67, dtype=torch.bfloat16, spread=9.0), 3e-3, z_loss=300.0)
