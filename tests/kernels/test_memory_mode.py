"""The rule behind memory="auto", and the workspace that serves where none is given."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pocl_kernels import Head, modes
from pocl_kernels.modes import MIN_GPU_ROWS, default_workspace_mb, held_rows, memory_mode
from pocl_kernels.plan import Gradients

V, H = 128_256, 4096
NONE = Gradients(False, False, False)


def rows_of(rows: int, workspace_mb: float, *, sizes: tuple[int, int] = (H, H), V: int = V) -> int:
    """As the call asks, on tensors without memory."""
    models = []
    for size, wanted in zip(sizes, (Gradients(True, True, False), NONE), strict=True):
        hidden, weight = (torch.empty(n, size, dtype=torch.bfloat16, device="meta") for n in (rows, V))
        models.append((hidden, Head(weight), wanted))
    return held_rows(models, workspace_mb)


@pytest.mark.parametrize(
    ("reduction", "short", "mode"),
    [("mean", False, "fast"), ("sum", False, "fast"), ("none", False, "low"), ("mean", True, "low")],
)
def test_auto_is_low_for_single_tokens_and_where_few_rows_have_room(reduction: str, short: bool, mode: str) -> None:
    assert memory_mode(reduction, "auto", short_chunks=lambda: short) == mode


def test_without_gradients_nothing_need_wait() -> None:
    with torch.no_grad():
        assert memory_mode("none", "auto", short_chunks=lambda: False) == "fast"


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_named_mode_is_taken(memory: str) -> None:
    assert memory_mode("mean", memory, short_chunks=lambda: True) == memory


def test_the_rule_sees_the_rows_that_a_group_will_have() -> None:
    # Too few of Llama's vocabulary in 256 MiB, which once passed for 261.
    assert rows_of(8192, 256) < MIN_GPU_ROWS <= rows_of(8192, 1024)
    assert rows_of(8192, 4096) == 8192
    assert rows_of(100, 256) == 100  # all there are


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_only_a_trained_head_on_a_gpu_makes_auto_low(gpu: bool, trained: bool) -> None:
    device: Any = SimpleNamespace(type="cuda" if gpu else "cpu", index=0)
    weight = torch.empty(V, H, dtype=torch.bfloat16, device="meta", requires_grad=trained)
    real = torch.empty(8192, H, dtype=torch.bfloat16, device="meta")
    hidden: Any = SimpleNamespace(shape=real.shape, device=device, dtype=real.dtype, requires_grad=True)
    mode, workspace = modes.mode_and_workspace("mean", "auto", 128.0, hidden, Head(weight), None)
    assert (mode, workspace) == ("low" if gpu and trained else "fast", 128.0)


@pytest.mark.parametrize(("gigabytes", "fast"), [(80, 8192.0), (24, 24 * 1024 / 10), (2, 256.0)])
def test_the_default_workspace_suits_the_card(gigabytes: int, fast: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "_total_memory", lambda _: gigabytes * 2**30)
    assert default_workspace_mb("auto", torch.device("cuda", 0)) == fast
    assert default_workspace_mb("low", torch.device("cuda", 0)) == fast / 16
    assert default_workspace_mb("auto", torch.device("cpu")) == 256.0
