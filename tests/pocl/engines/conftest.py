"""A vLLM that is not there, and a model that it can run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pocl.engines import LocalEngine, VLLMEngine

FAKE = Path(__file__).parent / "fake_vllm"


@pytest.fixture(scope="module")
def fake_vllm() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FAKE)
        patch.setenv("PYTHONPATH", str(FAKE))
        patch.delenv("POCL_VLLM_PYTHON", raising=False)
        patch.setenv("RANK", "0")
        yield patch


@pytest.fixture(scope="module")
def folder(make_tiny_folder: Callable[..., Path]) -> Path:
    """A model without layers."""
    return make_tiny_folder(num_layers=0, seed=3)


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalEngine:
    from pocl.models import load_causal_lm

    return LocalEngine(load_causal_lm(folder))


@pytest.fixture(scope="module")
def vllm(folder: Path, fake_vllm: Any) -> Iterator[VLLMEngine]:
    with VLLMEngine(folder, dtype="float32") as engine:
        yield engine


@pytest.fixture
def misbehaving(fake_vllm: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes the fake misbehave, as its docstring says."""
    with pytest.MonkeyPatch.context() as patch:
        yield lambda how: patch.setenv("FAKE_VLLM", how)
