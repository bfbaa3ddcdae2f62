"""The engines that every law is held on: each kind of kernel in each memory mode.

``POCL_TEST_ENGINES`` replaces the choice, a comma-separated list of names in :data:`ENGINES`: a process that has set up
another backend (Triton's interpreter, say) runs the same laws with it.
"""

import dataclasses
import os
from typing import Any

import pytest

import pocl_kernels
from pocl_kernels.cpu import compiler


@dataclasses.dataclass(frozen=True)
class Engine:
    """One way to compute a loss: call it like :func:`pocl_kernels.fused_linear_divergence`."""

    name: str
    memory: str
    compiled: bool = False
    arguments: tuple[tuple[str, Any], ...] = ()

    def options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        # Gradients of single tokens need the upstream gradient: "fast" refuses them and "auto" takes "low".
        memory = "auto" if arguments.get("reduction") == "none" and self.memory == "fast" else self.memory
        return {"memory": memory, **dict(self.arguments)} | arguments

    def __call__(self, *tensors: Any, **arguments: Any) -> Any:
        return pocl_kernels.fused_linear_divergence(*tensors, **self.options(arguments))

    def cross_entropy(self, *tensors: Any, **arguments: Any) -> Any:
        return pocl_kernels.fused_linear_cross_entropy(*tensors, **self.options(arguments))


ENGINES = {
    engine.name: engine
    for memory in ("fast", "low")
    for engine in (
        Engine(f"compiled-{memory}", memory, compiled=True),
        Engine(f"eager-{memory}", memory),
        Engine(f"triton-{memory}", memory, arguments=(("backend", "triton"),)),
    )
}
CHOSEN = os.environ.get("POCL_TEST_ENGINES", "compiled-fast,compiled-low,eager-fast,eager-low").split(",")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        for item in items:  # NumPy, which interprets, warns where a masked lane holds -inf - -inf; a GPU does not
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"))


@pytest.fixture(params=CHOSEN)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    chosen = ENGINES[request.param]
    if chosen.compiled:
        if compiler.compiler() is None:
            pytest.skip("this machine has no C compiler")
        native = compiler.load

        def load(*arguments: Any) -> Any:
            function = native(*arguments)
            assert function is not None, "the kernel did not compile, so that the eager path would be tested instead"
            return function

        load.cache_info = native.cache_info  # type: ignore[attr-defined]
        monkeypatch.setattr(compiler, "load", load)
    else:
        monkeypatch.setattr(compiler, "load", lambda *_: None)
    return chosen
