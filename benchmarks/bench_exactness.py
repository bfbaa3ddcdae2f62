"""How exact the losses are, and how much scratch memory they take, at the size of real models.

    python -m benchmarks.bench_exactness            # both parts (minutes on a CPU)
    python -m benchmarks.bench_exactness --only scratch
    python -m benchmarks.bench_exactness --save

    unrelated   relative norm error of loss, dh and dW against float64, float32 inputs, student and teacher unrelated
    sharp       the same at V = 1003 and 8009, logits of deviation 5, T from 0.5 to 4: the worst, over plain PyTorch's
    grid        sharp and flat, near and far, T from 0.5 to 4, both memory modes, on the CPU and through the Triton
                kernels (in their interpreter, where there is no GPU): the worst, over max(3e-6, plain PyTorch's)
    near        the same with a student at KL 1e-4 from its teacher, pooled over seeds, over plain PyTorch's error
    bf16        bfloat16 inputs, over the error of float32 PyTorch on the same inputs, pooled over seeds
    scratch     peak memory of forward and backward beyond inputs and gradients, both memory modes, V = 151,936

The inputs are those of the kernel tests (`tests/kernels/cases.py`): logits with a Zipf unigram that both models know.
"""

import argparse
import functools
import itertools
import math
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch

if not torch.cuda.is_available():  # before a kernel is imported
    os.environ["TRITON_INTERPRET"] = "1"

import pocl_kernels
from benchmarks.measure import give_back_freed_memory, machine, peak_bytes, save_results
from tests.kernels.cases import NAMES, Case, Solution, make_case, oracle, pytorch, solve

PARTS = ("unrelated", "sharp", "grid", "near", "bf16", "scratch")
VOCABULARY, ROWS, HIDDEN = 49152, 64, (576, 576)
SEEDS = range(3)
SEEDS_OF_TIES = range(12)  # TVD's slope is a sign: near the teacher a few ties decide a row's error
QUANTITIES = ("loss", "hidden", "weight")
REPEATS = 3
FLOOR = 3e-6  # below it no divergence need be
TOKENS, LARGE_VOCABULARY = (512, 2048, 8192), 151936


def unrelated() -> dict[str, Any]:
    """Largest over temperatures of the error of each divergence."""
    out: dict[str, Any] = {}
    case = make_case(ROWS, VOCABULARY, hidden=HIDDEN)
    for name in NAMES:
        call = {"divergence": name, "temperature": 2.0, "ce_weight": 0.3}
        errors = solve(pocl_kernels.fused_linear_divergence, case, **call).errors(oracle(case, **call))
        out[name] = {quantity: errors[quantity] for quantity in QUANTITIES}
        oracle.cache_clear()
    return out


def sharp() -> dict[str, Any]:
    """Over vocabularies and temperatures the errors whose ratio to PyTorch's is worst, of both."""
    out: dict[str, Any] = {}
    for name in NAMES:
        found = []
        for vocabulary, temperature in itertools.product((1003, 8009), (0.5, 0.7, 1.0, 2.0, 4.0)):
            case, call = (
                make_case.__wrapped__(24, vocabulary, spread=5.0),
                {"divergence": name, "temperature": temperature},
            )
            truth = oracle.__wrapped__(case, **call)
            ours = solve(pocl_kernels.fused_linear_divergence, case, **call).errors(truth)
            plain = pytorch.__wrapped__(case, **call).errors(truth)
            found.append({q: (ours[q], plain[q]) for q in QUANTITIES})
        out[name] = {q: max((x[q] for x in found), key=lambda e: e[0] / e[1]) for q in QUANTITIES}
    return out


def grid() -> dict[str, Any]:
    """By backend and divergence: of each quantity the worst of ours over what is allowed, and where."""
    out: dict[str, Any] = {}
    places = tuple(itertools.product((5.0, 1.0), (None, 1e-4), (0.5, 1.0, 2.0, 4.0), ("fast", "low")))
    for backend in ("cpu", "triton"):
        for name in NAMES:
            worst: dict[str, tuple[float, str]] = {}
            for spread, near, temperature, memory in places:
                errors, plain = _over_seeds(name, spread, near, temperature, backend, memory)
                where = f"spread {spread:g}, {'near' if near else 'far'}, T = {temperature:g}, {memory}"
                for q in QUANTITIES:
                    over = pooled(errors, q) / max(FLOOR, pooled(plain, q))
                    worst[q] = max(worst.get(q, (0.0, "")), (over, where))
            out.setdefault(backend, {})[name] = worst
    return out


def _over_seeds(name: str, spread: float, near: float | None, temperature: float, backend: str, memory: str) -> Any:
    """Errors of ours and of plain PyTorch at a place of the grid, of each seed."""
    both: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for seed in SEEDS_OF_TIES if near and name == "tvd" else SEEDS:
        case, call = make_case(16, 1003, spread=spread, near=near, seed=seed), {"divergence": name}
        truth = oracle(case, temperature=temperature, **call)
        ours = functools.partial(pocl_kernels.fused_linear_divergence, backend=backend, memory=memory)
        both[0].append(solve(ours, case, temperature=temperature, **call).errors(truth))
        both[1].append(pytorch(case, temperature=temperature, **call).errors(truth))
    return both


def against_pytorch(near: float | None, dtype: torch.dtype) -> dict[str, Any]:
    """Pooled errors of ours and of full float32 logits with autograd, for each divergence."""
    out: dict[str, Any] = {}
    for name in NAMES:
        ours: list[dict[str, float]] = []
        plain: list[dict[str, float]] = []
        for seed in SEEDS_OF_TIES if near and name == "tvd" else SEEDS:
            case = make_case.__wrapped__(ROWS, VOCABULARY, hidden=HIDDEN, near=near, dtype=dtype, seed=seed)
            truth = oracle.__wrapped__(case, divergence=name)
            runs: tuple[Callable[[Case], Solution], ...] = (
                functools.partial(solve, pocl_kernels.fused_linear_divergence, divergence=name),
                functools.partial(pytorch.__wrapped__, divergence=name),
            )
            for errors, run in zip((ours, plain), runs, strict=True):
                errors.append(run(case).errors(truth))
        out[name] = {q: (pooled(ours, q), pooled(plain, q)) for q in QUANTITIES}
    return out


def pooled(errors: list[dict[str, float]], quantity: str) -> float:
    return math.sqrt(sum(error[quantity] ** 2 for error in errors) / len(errors))


def scratch() -> dict[str, Any]:
    """MiB beyond inputs and gradients by memory mode and number of rows; the hidden size is small to leave room."""
    out: dict[str, Any] = {}
    give_back_freed_memory()
    for memory in ("fast", "low"):
        for tokens in TOKENS:
            size = 32
            g = torch.Generator().manual_seed(0)
            hidden = torch.randn(tokens, size, generator=g).requires_grad_()
            weight = torch.randn(LARGE_VOCABULARY, size, generator=g).requires_grad_()
            teacher, head = torch.randn(tokens, size, generator=g), torch.randn(LARGE_VOCABULARY, size, generator=g)

            def run(
                hidden: Any = hidden, weight: Any = weight, memory: str = memory, rest: Any = (teacher, head)
            ) -> None:
                pocl_kernels.fused_linear_divergence(
                    hidden, weight, *rest, divergence="jsd", memory=memory
                ).loss.backward()

            peaks = []
            for _ in range(1 + REPEATS):  # in the first, libraries allocate what they keep for good
                hidden.grad = weight.grad = None
                peaks.append(peak_bytes(run))
            found = [peak for peak in peaks[1:] if peak is not None]
            if found:
                gradients = 4 * (hidden.numel() + weight.numel())
                out.setdefault(memory, {})[str(tokens)] = (statistics.median(found) - gradients) / 2**20
    return out


def show(part: str, result: dict[str, Any]) -> None:
    titles = {
        "unrelated": f"relative norm error, unrelated models, float32, V = {VOCABULARY}",
        "sharp": "sharp and unlike, V = 1003 and 8009, T = 0.5 to 4, float32: worst error (and over PyTorch's)",
        "grid": "sharp and flat, near and far, T = 0.5 to 4, both modes: worst error over max(3e-6, PyTorch's)",
        "near": "student at KL 1e-4, float32: error (and over PyTorch's)",
        "bf16": "bfloat16 inputs: error (and over float32 PyTorch's)",
        "scratch": f"scratch in MiB, V = {LARGE_VOCABULARY}, by rows",
    }
    print(f"\n{titles[part]}")
    if part == "scratch":
        for memory, values in result.items():
            print(f"{memory:10}" + "".join(f"{tokens:>10}: {value:6.1f}" for tokens, value in values.items()))
        return
    if part == "grid":
        for backend, errors in result.items():
            for name, worst in errors.items():
                at = max(worst.values())[1]
                cells = "".join(f"{q} {worst[q][0]:5.2f}   " for q in QUANTITIES)
                print(f"{backend:8}{name:12}{cells}worst at {at}")
        return
    print(f"{'':10}" + "".join(f"{'d' + q if q != 'loss' else q:>20}" for q in QUANTITIES))
    for name, errors in result.items():
        cells = [errors[q] if isinstance(errors[q], tuple) else (errors[q], None) for q in QUANTITIES]
        print(f"{name:10}" + "".join(f"{a:>12.1e}" + (f" ({a / b:4.2f})" if b else "" * 7) for a, b in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="may be given several times")
    parser.add_argument("--save", action="store_true", help="file the result under benchmarks/results")
    options = parser.parse_args()
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "unrelated": unrelated,
        "sharp": sharp,
        "grid": grid,
        "near": lambda: against_pytorch(1e-4, torch.float32),
        "bf16": lambda: against_pytorch(None, torch.bfloat16),
        "scratch": scratch,
    }
    print(machine())
    results = {}
    for part in options.only or PARTS:
        results[part] = makers[part]()
        show(part, results[part])
    if options.save:
        print(f"\nsaved in {save_results('exactness', results)}")


if __name__ == "__main__":
    main()
