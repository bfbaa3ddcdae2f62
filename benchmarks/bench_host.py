"""What a call of the fused loss costs the host, beyond the products and kernels that it starts.

    python -m benchmarks.bench_host [--save]

The products, the row kernels and the pass over the weight's gradient are replaced by nothing, so that what is left is
Python, PyTorch's dispatcher and Triton's launcher: on a GPU this time is hidden behind the device's as long as it is
shorter. A launch is timed with the driver's own launch replaced, so that no GPU is needed. 64 tokens of bf16 models on
the Triton path, of float32 models on the CPU path. Microseconds, the median of many calls and half of their spread.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # the launcher itself, before a kernel is imported

import torch

import pocl_kernels
from benchmarks.measure import machine, save_results
from benchmarks.targets import HOST_LIMITS
from pocl_kernels import operators

ROWS, VOCABULARY, HIDDEN = 64, 256, 16
CALLS = 200


def microseconds(function: Callable[[], Any], calls: int = CALLS) -> list[float]:
    """Of each of some calls, after some that are not timed."""
    samples = []
    for number in range(calls + calls // 5):
        start = time.perf_counter()
        function()
        if number >= calls // 5:
            samples.append(1e6 * (time.perf_counter() - start))
    return sorted(samples)


def call(dtype: torch.dtype) -> Callable[[], Any]:
    """Forward and backward of a loss with labels."""
    hidden, teacher = (torch.randn(ROWS, HIDDEN, dtype=dtype) for _ in range(2))
    weight, teacher_weight = (torch.randn(VOCABULARY, HIDDEN, dtype=dtype) for _ in range(2))
    labels = torch.randint(VOCABULARY, (ROWS,))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def run() -> None:
        out = pocl_kernels.fused_linear_divergence(hidden, weight, teacher, teacher_weight, labels=labels)
        torch.autograd.grad(out.loss, leaves)

    return run


def nothing(*_: Any, **__: Any) -> None:
    """A mock of the standard library would take microseconds to remember that it was called."""


def always(*_: Any) -> bool:
    return True


@contextlib.contextmanager
def triton_path() -> Iterator[None]:
    """Tensors of the CPU take the way of a GPU's, without products and with kernels that do nothing."""
    from pocl_kernels.triton_backend import backend, gemm

    with (
        mock.patch.object(operators, "is_triton", always),
        mock.patch.object(gemm, "multiply", nothing),
        mock.patch.object(backend, "_divergence", nothing),
    ):
        yield


@contextlib.contextmanager
def cpu_path() -> Iterator[None]:
    """The CPU backend without products and with rows that do nothing."""
    from pocl_kernels.cpu import backend

    def skip(*_: Any, out: Any = None, **__: Any) -> Any:
        return out

    with (
        mock.patch.object(backend, "_multiply", nothing),
        mock.patch.object(backend, "in_parallel", nothing),
        mock.patch.object(torch, "mm", skip),
        mock.patch.object(torch.Tensor, "addmm_", lambda tensor, *_, **__: tensor),
    ):
        yield


def launch() -> Callable[[], Any]:
    """One launch of the largest kernel as the backend asks for it, up to the driver."""
    import triton
    from triton.backends.compiler import GPUTarget

    from pocl_kernels.plan import Plan
    from pocl_kernels.triton_backend import backend, steps

    plan = Plan(pocl_kernels.JSD(), 2.0, 4.0, 0.1, -100, 1.0, None, 1.0, None, 256.0)
    task = steps.divergence_task(plan)
    tile = steps.Tile(slice(0, VOCABULARY), *(torch.zeros(ROWS, VOCABULARY) for _ in range(2)), None, None)
    gradient = torch.zeros(ROWS, VOCABULARY, dtype=torch.float16)
    labels, scale, results = torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS), torch.zeros(ROWS, 3)
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
    )
    triton.runtime.driver._active = driver
    nothing = SimpleNamespace(
        launch_metadata=lambda *_: None, run=lambda *_: None, function=0, packed_metadata=b"", result=lambda: nothing
    )

    def compiled(self: Any, key: str, signature: Any, device: int, *_: Any) -> Any:
        return self.device_caches[device][0].setdefault(key, nothing)

    triton.runtime.jit.JITFunction._do_compile = compiled
    return lambda: backend._divergence(tile, gradient, labels, scale, task, results)


def measure() -> dict[str, list[float]]:
    """Microseconds of everything in :data:`HOST_LIMITS`."""
    torch.set_num_threads(1)
    found = {}
    with triton_path():
        found["a call, Triton path"] = microseconds(call(torch.bfloat16))
    with cpu_path():
        found["a call, CPU path"] = microseconds(call(torch.float32))
    found["a launch"] = microseconds(launch())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="file the result under benchmarks/results")
    options = parser.parse_args()
    print(machine())
    found = measure()
    for name, samples in found.items():
        median, spread = statistics.median(samples), (samples[-len(samples) // 10] - samples[len(samples) // 10]) / 2
        print(f"{name:24}{median:>9.0f} us  +- {spread:>4.0f}   target {HOST_LIMITS[name]:.0f}")
    if options.save:
        print(f"filed in {save_results('host', {'host': found})}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
