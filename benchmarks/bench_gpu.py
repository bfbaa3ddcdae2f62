"""The fused losses and their kernels on a GPU: time over the floor, memory, and the bandwidth that the kernels reach.

    python -m benchmarks.bench_gpu                               # three shapes in bf16, peers that are installed
    python -m benchmarks.bench_gpu --dtype float32 --divergences all --save
    python -m benchmarks.bench_gpu --kernels                     # the row and tile kernels alone
    make bench-gpu                                               # as part of all benchmarks

CUDA events around single runs, the cache of the GPU flushed before each, implementations in turn, at least 300 ms for
each figure and at least 7 runs. The floor is the four matrix products over valid rows with full logits, by the vendor's
library, in the dtype of the models. Half of the labels are ignored. Every implementation is checked before it is timed,
against our float64 path on some rows. Peak memory is what a call allocates beyond its inputs, gradients included.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pocl
from benchmarks.measure import machine, peak_bytes, save_results
from benchmarks.peers import PEERS, available
from benchmarks.problems import TEMPERATURE, Problem, floor, key, make_problem, through_autograd

# tokens, vocabulary, student's and teacher's hidden size
SHAPES = ((8192, 32000, 2048, 4096), (8192, 128256, 2048, 4096), (4096, 151936, 896, 3584))
LEAST_MS, LEAST_RUNS = 300.0, 7
WORKSPACES_MB = (256, 1024, 4096)


class Clock:
    """Times on the GPU's own clock, from a cold cache."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self._flush = torch.empty(4 * max(properties.L2_cache_size, 2**25), dtype=torch.int8, device="cuda")

    def once(self, function: Callable[[], Any]) -> float:
        """Milliseconds of one run."""
        self._flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def interleaved(self, functions: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Milliseconds of every run, A B C A B C ..., after one warm-up each."""
        for function in functions.values():
            function()
        torch.cuda.synchronize()
        samples: dict[str, list[float]] = {name: [] for name in functions}
        waiting = dict(functions)
        while waiting:
            for name, function in list(waiting.items()):
                samples[name].append(self.once(function))
                if len(samples[name]) >= LEAST_RUNS and sum(samples[name]) >= LEAST_MS:
                    del waiting[name]
        return samples


def ours(memory: str, workspace_mb: float | None = None, divergence: str = "fkl") -> Callable[[Problem], Any]:
    """Forward and backward of our loss."""

    def run(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        hidden = problem.student_hidden.detach().requires_grad_()
        weight = problem.student_weight.detach().requires_grad_()
        out = pocl.fused_linear_divergence(
            hidden, weight, problem.teacher_hidden, problem.teacher_weight, labels=problem.labels,
            divergence=divergence, temperature=TEMPERATURE, memory=memory, workspace_mb=workspace_mb,
        )  # fmt: skip
        out.loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return out.loss.detach(), hidden.grad, weight.grad

    return run


def eager(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Full logits in the models' dtype, softmax in float32, autograd."""

    def loss(
        hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor, T: float
    ) -> Tensor:
        valid = labels != -100
        student = torch.log_softmax((hidden[valid] @ weight.T).float() / T, -1)
        target = torch.log_softmax((teacher[valid] @ teacher_weight.T).float() / T, -1)
        return T**2 * torch.nn.functional.kl_div(student, target, log_target=True, reduction="batchmean")

    return through_autograd(loss)(problem)


def error(function: Callable[[Problem], Any], problem: Problem) -> float:
    """Largest relative error of loss, hidden and weight gradient on the first rows, against float64."""
    few = min(256, problem.labels.shape[0])
    fields = {
        "student_hidden": problem.student_hidden[:few],
        "teacher_hidden": problem.teacher_hidden[:few],
        "labels": problem.labels[:few],
    }
    part = Problem(**(vars(problem) | fields))
    exact = ours("fast")(Problem(**{k: v.double() if v.is_floating_point() else v for k, v in vars(part).items()}))
    found = function(part)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def compare(shape: Sequence[int], dtype: torch.dtype, peers: list[str], divergences: list[str]) -> dict[str, Any]:
    """Check, time and print all implementations of one shape."""
    tokens, vocabulary, student, teacher = shape
    problem = make_problem(tokens, vocabulary, student, teacher, device="cuda")
    problem = Problem(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in vars(problem).items()})
    functions: dict[str, Callable[[Problem], Any]] = {
        **{f"pocl fast, {mb} MiB": ours("fast", mb) for mb in WORKSPACES_MB},
        "pocl low": ours("low"),
        "pocl auto": ours("auto"),
        **{
            f"pocl fast, {WORKSPACES_MB[-1]} MiB, {name}": ours("fast", WORKSPACES_MB[-1], name) for name in divergences
        },
        "eager torch, full logits": eager,
        **{title: through_autograd(loss) for title, loss in available(peers).items()},
    }
    errors, failed = {}, {}
    for name, function in list(functions.items()):
        try:
            function(problem)
            if not any(name.endswith(d) for d in divergences):
                errors[name] = error(function, problem)
        except (torch.OutOfMemoryError, RuntimeError) as problem_of_theirs:
            failed[name] = str(problem_of_theirs).splitlines()[0]
            del functions[name]
        torch.cuda.empty_cache()
    runs = {"floor": lambda: floor(problem)} | {n: (lambda f=f: f(problem)) for n, f in functions.items()}
    samples = Clock().interleaved(runs)
    base = statistics.median(samples["floor"])
    print(f"\n{tokens} tokens, half of them ignored; vocabulary {vocabulary}; hidden {student} <- {teacher}; {dtype}")
    print(f"{'':34}{'median':>11}{'spread':>9}{'/ floor':>9}{'peak':>11}{'error':>10}")
    rows: dict[str, Any] = {}
    for name, times in samples.items():
        median, spread = statistics.median(times), (max(times) - min(times)) / 2 / statistics.median(times)
        peak = peak_bytes(runs[name])
        rows[name] = {"seconds": [t / 1e3 for t in times], "peak_bytes": peak, "error": errors.get(name)}
        line = f"{name:34}{median:>8.2f} ms{100 * spread:>7.1f} %{median / base:>9.2f}{(peak or 0) / 2**20:>7.0f} MiB"
        print(f"{line}{errors[name]:>10.1e}" if name in errors else line)
    for name, reason in failed.items():
        print(f"{name:34} failed: {reason[:80]}")
    settings = {"tokens": tokens, "vocabulary": vocabulary, "hidden": [student, teacher], "dtype": str(dtype)[6:]}
    return settings | {"rows": rows, "failed": failed}


@dataclass(frozen=True)
class Launch:
    """One kernel on tensors that exist, and what it must at least move."""

    name: str
    run: Callable[[], Any]
    bytes: int
    flops: int


def launches(rows: int, vocabulary: int, divergence: str) -> list[Launch]:
    """The row kernels, and the tile kernels on a tile of the same size."""
    from pocl_kernels.plan import Plan
    from pocl_kernels.triton_backend import (
        backend,
        cross_entropy_rows,
        divergence_rows,
        state,
        steps,
        tile_gradient,
        tile_statistics,
        tile_values,
    )
    from pocl_kernels.triton_backend.layout import padded
    from pocl_kernels.triton_backend.terms import slope_sum

    plan = Plan(pocl.DIVERGENCES[divergence](), TEMPERATURE, TEMPERATURE**2, 0.1, -100, 1.0, None, 1.0, None, 256.0)
    task = steps.divergence_task(plan)
    generator = torch.Generator("cuda").manual_seed(0)

    def logits() -> Tensor:
        unigram = -torch.log(torch.arange(vocabulary, device="cuda") + 10.0)
        z = torch.empty(rows, padded(vocabulary), device="cuda")[:, :vocabulary]
        return z.copy_(unigram + 2 * torch.randn(rows, vocabulary, device="cuda", generator=generator))

    columns = slice(0, vocabulary)
    tile = steps.Tile(columns, logits(), logits(), None, None)
    alone = steps.Tile(columns, tile.student, None, None, None)
    gradient = torch.empty(rows, padded(vocabulary), dtype=torch.float16, device="cuda")[:, :vocabulary]
    labels = torch.randint(vocabulary, (rows,), device="cuda", generator=generator)
    weights, results = torch.ones(rows, device="cuda"), torch.empty(rows, 3, device="cuda")
    sums, second = state.empty_sums(rows, torch.float32, labels.device), torch.zeros(2, rows, device="cuda")
    steps.statistics(tile, labels, 0, task, True, sums)
    here = state.state_of(sums)
    assert task.divergence is not None
    kl, known = task.divergence.kl_weights is not None, slope_sum(task.divergence) is not None
    ce = steps.cross_entropy_task(1.0, None)
    return [
        Launch(
            f"divergence_rows {divergence} -> fp16",
            lambda: backend._divergence(tile, gradient, labels, weights, task, results),
            *divergence_rows.cost(rows, vocabulary, labels=True, slope_sum_known=known, gradient_bytes=2),
        ),
        Launch(
            f"divergence_rows {divergence}",
            lambda: backend._divergence(tile, None, labels, weights, task, results),
            *divergence_rows.cost(rows, vocabulary, labels=True, slope_sum_known=known, gradient_bytes=None),
        ),
        Launch(
            "cross_entropy_rows -> fp16",
            lambda: backend._cross_entropy(alone, gradient, labels, weights, ce, results),
            *cross_entropy_rows.cost(rows, vocabulary, gradient_bytes=2),
        ),
        Launch(
            f"tile_statistics {divergence}",
            lambda: steps.statistics(tile, labels, 0, task, kl, sums),
            *tile_statistics.cost(rows, vocabulary, teacher=True, kl=kl),
        ),
        Launch(
            f"tile_values {divergence}",
            lambda: steps.values(tile, here, task, second),
            *tile_values.cost(rows, vocabulary),
        ),
        Launch(
            f"tile_gradient {divergence} -> fp16",
            lambda: steps.gradient(tile, gradient, labels, 0, weights, here, task),
            *tile_gradient.cost(rows, vocabulary, teacher=True, labels=True, gradient_bytes=2),
        ),
    ]


def kernels(rows: int, vocabulary: int, divergences: list[str]) -> dict[str, Any]:
    """Bandwidth of each kernel beside that of a plain copy. Passes that find rows in the cache may exceed it."""
    clock = Clock()
    source, target = (torch.empty(rows, vocabulary, device="cuda") for _ in range(2))
    copy = Launch("copy", lambda: target.copy_(source), 2 * source.nbytes, 0)
    chosen = [copy] + [x for name in divergences for x in launches(rows, vocabulary, name)]
    unique = {launch.name: launch for launch in chosen}
    samples = clock.interleaved({name: launch.run for name, launch in unique.items()})
    print(f"\n{rows} rows, vocabulary {vocabulary}")
    print(f"{'':34}{'median':>11}{'spread':>9}{'GB/s':>9}{'GFLOP/s':>10}{'of copy':>9}")
    result, best = {}, 0.0
    for name, times in samples.items():
        median = statistics.median(times)
        bandwidth = unique[name].bytes / median / 1e6
        best = best or bandwidth
        spread = (max(times) - min(times)) / 2 / median
        rate = unique[name].flops / median / 1e6
        result[name] = {"ms": times, "gb_per_s": bandwidth, "gflop_per_s": rate}
        print(f"{name:34}{median:>8.3f} ms{100 * spread:>7.1f} %{bandwidth:>9.0f}{rate:>10.0f}{bandwidth / best:>9.2f}")
    return {"rows": rows, "vocabulary": vocabulary, "kernels": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("N", "V", "H_S", "H_T"), help="instead of the three")
    parser.add_argument("--divergences", default="", help="comma-separated names to time beside fkl, or all")
    parser.add_argument("--peers", default="", help=f"comma-separated, of {', '.join(PEERS)} (default: none)")
    parser.add_argument("--kernels", action="store_true", help="time the kernels alone")
    parser.add_argument(
        "--save", action="store_true", help="file the result under benchmarks/results by device and day"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "bench_gpu needs a CUDA or ROCm device, and PyTorch sees none\n")
    print(machine())
    names = [name for name in options.divergences.split(",") if name]
    names = [name for name in pocl.DIVERGENCES if name != "fkl"] if names == ["all"] else names
    shapes = [options.shape] if options.shape else SHAPES
    if options.kernels:
        measured = {
            f"N=1024 V={vocabulary}": kernels(1024, vocabulary, ["fkl", *(names or ["jsd"])])
            for _, vocabulary, *_ in shapes
        }
    else:
        peers = [name for name in options.peers.split(",") if name]
        tables = [compare(shape, getattr(torch, options.dtype), peers, names) for shape in shapes]
        measured = {key(table): table for table in tables}
    if options.save:
        print(f"\nfiled in {save_results('kernels-gpu' if options.kernels else 'loss-gpu', measured)}")


if __name__ == "__main__":
    main()
