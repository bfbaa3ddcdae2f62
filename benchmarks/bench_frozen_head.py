"""A head that is not trained (a student of LoRA's) against one that is: time, peak memory, and products counted.

    python -m benchmarks.bench_frozen_head
    python -m benchmarks.bench_frozen_head --tokens 256 --vocab 49152 --hidden 576 --save

Both heads go through the same loss, forward and backward, in turn. Products are counted from the shapes of every matrix
product that PyTorch ran, in units of valid tokens x vocabulary x hidden size: three without the weight's gradient, four
with it. Each is compared with the products alone of the same plan, its floor.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pocl
from benchmarks.measure import interleaved, machine, peak_bytes, save_results
from benchmarks.problems import TEMPERATURE, Problem, make_problem


def loss(problem: Problem, *, trained: bool, divergence: str = "fkl") -> Tensor:
    """Forward and backward of ours; the gradient of the hidden states."""
    hidden = problem.student_hidden.detach().requires_grad_()
    weight = problem.student_weight.detach().requires_grad_(trained)
    pocl.fused_linear_divergence(
        hidden,
        weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        labels=problem.labels,
        divergence=divergence,
        temperature=TEMPERATURE,
    ).loss.backward()
    assert hidden.grad is not None
    assert (weight.grad is not None) == trained
    return hidden.grad


def floor(problem: Problem, *, trained: bool) -> None:
    """The products that the loss cannot do without."""
    hidden, teacher = problem.student_hidden[problem.valid], problem.teacher_hidden[problem.valid]
    logits = hidden @ problem.student_weight.T
    teacher @ problem.teacher_weight.T
    logits @ problem.student_weight
    if trained:
        logits.T @ hidden


def multiplications(run: Callable[[], Any]) -> int:
    """Multiplications of all matrix products that PyTorch runs on this CPU meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as recorded:
        run()
    count = 0
    for event in recorded.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            count += left[0] * left[1] * right[1]
    return count


def compare(tokens: int, vocabulary: int, hidden: int, runs: int) -> dict[str, Any]:
    """Time, count and print both; returns what was printed."""
    problem = make_problem(tokens, vocabulary, hidden, hidden)
    functions: dict[str, Callable[[], Any]] = {}
    for trained, name in ((True, "trained"), (False, "frozen")):
        functions[f"floor, {name} head"] = lambda t=trained: floor(problem, trained=t)  # type: ignore[misc]
        functions[f"{name} head"] = lambda t=trained: loss(problem, trained=t)  # type: ignore[misc]
    unit = int(problem.valid.sum()) * vocabulary * hidden
    timings = interleaved(functions, runs)
    rows = {}
    print(f"{tokens} tokens, half of them ignored; vocabulary {vocabulary}; hidden {hidden} <- {hidden}; float32")
    print(f"{'':24}{'median':>10}{'spread':>9}{'/ floor':>9}{'peak':>10}{'products':>10}")
    for name, timing in timings.items():
        peak, products = peak_bytes(functions[name]), multiplications(functions[name]) / unit
        base = timings[name if name.startswith("floor") else f"floor, {name}"].median
        shown = " " * 10 if peak is None else f"{peak / 2**20:>6.0f} MiB"
        spread = f"{100 * timing.spread:>7.1f} %"
        print(f"{name:24}{timing.median:>8.3f} s{spread}{timing.median / base:>9.2f}{shown}{products:>10.2f}")
        rows[name] = {"seconds": timing.samples, "peak_bytes": peak, "products": products}
    return {"tokens": tokens, "vocabulary": vocabulary, "hidden": [hidden, hidden], "dtype": "float32", "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="rows, half of them ignored (default: 512)")
    parser.add_argument("--vocab", type=int, default=49152, help="rows of both heads (default: 49152)")
    parser.add_argument("--hidden", type=int, default=576, help="hidden size of both models (default: 576)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--save", action="store_true", help="file the result under benchmarks/results")
    options = parser.parse_args()
    print(machine())
    result = compare(options.tokens, options.vocab, options.hidden, options.runs)
    if options.save:
        print(f"filed in {save_results('frozen-head', {f'V = {options.vocab}': result})}")


if __name__ == "__main__":
    main()
