"""What makes a kernel compile anew: a divergence's identity and the options of a head, never a number of a schedule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

import pocl_kernels
from pocl_kernels import JSD, Head, SkewForwardKL
from pocl_kernels.plan import Gradients, Inputs, Plan, Rows
from pocl_kernels.triton_backend import backend, launch, terms


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """The (kernel, cache key) pairs that a GPU would have to compile. Nothing is compiled and nothing runs."""
    seen: set[tuple[str, str]] = set()

    def hook(*, key: str, fn: Any, **_: Any) -> bool:
        seen.add((fn.name.rsplit(".", 1)[-1], key))
        return True  # "someone else compiles it": the launcher returns

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver, raising=False)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    # Triton 3.6 writes down for the hook what it would compile, and cannot write down a function among the constants.
    monkeypatch.setattr(triton.runtime.jit, "serialize_specialization_data", lambda *_: "", raising=False)
    return seen


def call(
    rows: int = 6,
    vocab: int = 100,
    *,
    divergence: Any = None,
    temperature: float = 2.0,
    ce_weight: float = 0.3,
    memory: str = "fast",
    softcap: float | None = None,
    wanted: bool = True,
) -> Rows:
    plan = Plan(
        divergence or SkewForwardKL(), temperature, (1 - ce_weight) * temperature**2, ce_weight, -100,
        1.0, softcap, 1.0, softcap, 64.0, memory=memory,
    )  # fmt: skip
    state = None
    labels = torch.randint(0, vocab, (rows,))
    inputs = Inputs(
        torch.randn(rows, 8), torch.randn(vocab, 8), None, torch.randn(rows, 8), torch.randn(vocab, 8), None, labels,
        torch.ones(rows),
    )  # fmt: skip
    if memory == "low" and wanted:
        state = backend.linear_divergence(inputs, plan, Gradients(False, False, False)).state
    return backend.linear_divergence(inputs._replace(state=state), plan, Gradients(*(wanted,) * 3))


@pytest.mark.parametrize(("memory", "kernels"), [("fast", 1), ("low", 3)])
def test_a_whole_schedule_compiles_each_kernel_once(
    compilations: set[tuple[str, str]], memory: str, kernels: int
) -> None:
    # Stages of a curriculum: temperature, label weight, skew, batch size and sequence length all change; 1 and 16 are
    # the numbers that Triton would treat apart.
    for step, rows in enumerate((1, 16, 6, 33, 128, 7)):
        for temperature in (1.0, 1.25, 2.0):
            for ce_weight in (0.0, 0.3, 1.0):
                divergence = SkewForwardKL(0.1 * step)
                call(rows, temperature=temperature, ce_weight=ce_weight, divergence=divergence, memory=memory)
    assert len(compilations) == kernels, sorted(name for name, _ in compilations)


@pytest.mark.parametrize(("memory", "kernels"), [("fast", 1), ("low", 3)])
def test_where_a_chunk_starts_compiles_nothing(
    compilations: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, memory: str, kernels: int
) -> None:
    monkeypatch.setattr("pocl_kernels.triton_backend.layout.MAX_CHUNK_ROWS", 1)
    monkeypatch.setattr("pocl_kernels.triton_backend.low.tile_shape", lambda rows, *_: (3, 48))
    call(rows=10, memory=memory)
    assert len(compilations) == kernels


def test_the_vocabulary_size_is_a_run_time_number(compilations: set[tuple[str, str]]) -> None:
    for vocab in (1, 16, 100, 2048):
        call(vocab=vocab)
    assert len(compilations) == 1


def test_what_is_compiled_in_does_compile_anew(compilations: set[tuple[str, str]]) -> None:
    call()
    for count, change in enumerate(({"divergence": JSD()}, {"softcap": 5.0}, {"wanted": False}), start=2):
        call(**change)
        assert len(compilations) == count


@pytest.mark.parametrize(("memory", "kernels"), [("fast", 1), ("low", 2)])
def test_cross_entropy_compiles_once_for_all_batches_and_settings(
    compilations: set[tuple[str, str]], memory: str, kernels: int
) -> None:
    settings = dict(memory=memory)
    for rows, vocab, smoothing, z_loss in ((1, 50, 0.0, 0.0), (16, 16, 0.1, 0.0), (9, 64, 1.0, 1.0), (9, 1, 0.5, 1e-4)):
        plan = Plan(
            None, 1.0, 0.0, 1.0, -100, 1.0, None, 1.0, None, 64.0, label_smoothing=smoothing, z_loss=z_loss, **settings
        )  # fmt: skip
        hidden, weight, labels = torch.randn(rows, 8), torch.randn(vocab, 8), torch.randint(0, vocab, (rows,))
        inputs = Inputs(hidden, weight, None, None, None, None, labels, torch.ones(rows))
        state = None
        if memory == "low":
            state = backend.linear_cross_entropy(inputs, plan, Gradients(False, False, False)).state
        backend.linear_cross_entropy(inputs._replace(state=state), plan, Gradients(True, True, False))
    assert len(compilations) == kernels


def test_divergences_with_the_same_code_share_one_function() -> None:
    assert terms.term_of(JSD(0.2)).function is terms.term_of(JSD(0.9)).function
    assert terms.term_of(JSD(0.2)).uniforms != terms.term_of(JSD(0.9)).uniforms
    assert terms.term_of(JSD()).function is not terms.term_of(SkewForwardKL()).function


def test_a_program_has_256_threads_on_every_kind_of_gpu() -> None:
    assert launch.options("cuda", 32)["num_warps"] == 8
    assert launch.options("hip", 64)["num_warps"] == 4


def test_triton_on_cpu_tensors_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        pocl_kernels.fused_linear_divergence(
            torch.randn(2, 4), Head(torch.randn(9, 4)), torch.randn(2, 4), torch.randn(9, 4), backend="triton"
        )
