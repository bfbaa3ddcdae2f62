"""The rule behind memory="auto"."""

from typing import Any

import pytest
import torch

from pocl_kernels.api import memory_mode

LONG: dict[str, Any] = {"gpu": True, "trains_weight": True, "rows": 4096, "chunk_rows": 1000.0}
SHORT = LONG | {"chunk_rows": 255.0}


@pytest.mark.parametrize(
    ("reduction", "case", "mode"),
    [
        ("mean", LONG, "fast"),
        ("sum", LONG, "fast"),
        ("none", LONG, "low"),
        ("mean", SHORT, "low"),
        ("mean", SHORT | {"chunk_rows": 256.0}, "fast"),
        ("mean", SHORT | {"gpu": False}, "fast"),
        ("mean", SHORT | {"trains_weight": False}, "fast"),
        ("mean", SHORT | {"rows": 255}, "fast"),  # all rows in one chunk
    ],
)
def test_auto_is_low_for_single_tokens_and_for_short_chunks_on_a_gpu(
    reduction: str, case: dict[str, Any], mode: str
) -> None:
    assert memory_mode(reduction, "auto", **case) == mode


def test_without_gradients_nothing_need_wait() -> None:
    with torch.no_grad():
        assert memory_mode("none", "auto", **LONG) == "fast"


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_named_mode_is_taken(memory: str) -> None:
    assert memory_mode("mean", memory, **SHORT) == memory
