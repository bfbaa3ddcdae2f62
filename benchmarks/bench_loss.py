"""The fused distillation loss, forward and backward, against its floor and against plain PyTorch.

    python -m benchmarks.bench_loss                                          # two default shapes
    python -m benchmarks.bench_loss --peers all --divergences all --save
    python -m benchmarks.bench_loss --sweep --save                           # seven vocabularies, all peers
    python -m benchmarks.bench_loss --tokens 4096 --vocab 151936 --peers trl,liger

The floor is the four matrix products over valid rows that no exact method can save (student logits, teacher logits,
gradient of the hidden states, gradient of the weight) and nothing else; with buffers reused from run to run it has no
page faults either, which every loss has that gives its gradients away. Half of the labels are ignored, as in a batch
of prompts and responses. Every implementation is checked against float64 before it is timed, and every timed run
follows an untimed one of the same implementation. Where PyTorch sees a GPU, the table is that of `bench_gpu` in
bfloat16; `CUDA_VISIBLE_DEVICES=` measures the CPU all the same.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import pocl
from benchmarks.measure import interleaved, machine, peak_bytes, progress_bar, save_results
from benchmarks.peers import PEERS, available
from benchmarks.problems import (
    TEMPERATURE,
    Implementation,
    Problem,
    ReusedFloor,
    floor,
    key,
    make_problem,
    through_autograd,
)

SHAPES = ((1024, 49152, 576, 576), (512, 151936, 896, 1536))  # tokens, vocabulary, student's and teacher's hidden size
REUSED = "floor, buffers reused"
SMALL = (512, 32000, 256, 256)  # for make bench
SWEEP = tuple((512, vocabulary, 576, 576) for vocabulary in (32000, 49152, 65536, 128256, 151936, 202048, 262144))


def eager(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Full logits and autograd."""
    hidden = problem.student_hidden.detach().requires_grad_()
    weight = problem.student_weight.detach().requires_grad_()
    valid = problem.valid
    student = torch.log_softmax(hidden[valid] @ weight.T / TEMPERATURE, -1)
    teacher = torch.log_softmax(problem.teacher_hidden[valid] @ problem.teacher_weight.T / TEMPERATURE, -1)
    loss = TEMPERATURE**2 * torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def chunked(problem: Problem, rows: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """What a good afternoon gives: chunks of rows, the gradient by hand, operations in place."""
    valid = problem.valid
    index = valid.nonzero()[:, 0]
    grad_hidden = torch.zeros_like(problem.student_hidden)
    grad_weight = torch.zeros_like(problem.student_weight)
    loss = torch.zeros((), dtype=problem.student_hidden.dtype)
    for i in index.split(rows):
        hidden = problem.student_hidden[i]
        student = torch.mm(hidden, problem.student_weight.T).div_(TEMPERATURE)
        student.sub_(student.logsumexp(-1, keepdim=True))
        teacher = torch.mm(problem.teacher_hidden[i], problem.teacher_weight.T).div_(TEMPERATURE)
        teacher.sub_(teacher.logsumexp(-1, keepdim=True))
        probabilities = teacher.exp()
        loss += torch.dot(probabilities.view(-1), teacher.sub_(student).view(-1)) * (TEMPERATURE**2 / len(index))
        gradient = student.exp_().sub_(probabilities).mul_(TEMPERATURE / len(index))
        grad_hidden[i] = gradient @ problem.student_weight
        grad_weight.addmm_(gradient.T, hidden)
    return loss, grad_hidden, grad_weight


def fused(problem: Problem, divergence: str = "fkl") -> tuple[Tensor, Tensor, Tensor]:
    """Ours."""
    hidden = problem.student_hidden.detach().requires_grad_()
    weight = problem.student_weight.detach().requires_grad_()
    out = pocl.fused_linear_divergence(
        hidden,
        weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        labels=problem.labels,
        divergence=divergence,
        temperature=TEMPERATURE,
    )
    out.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return out.loss.detach(), hidden.grad, weight.grad


# The forward KL in each of them, so that one result is right for all.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "pocl": fused,
    "chunked loop in eager torch": chunked,
    "eager torch, full logits": eager,
}


def gradient_error(found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]) -> float:
    """Largest error of loss, hidden gradient and weight gradient, each relative to the norm of the expected."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def check(implementations: dict[str, Implementation], problem: Problem) -> tuple[dict[str, float], dict[str, str]]:
    """(error of each against float64, why those that do not run do not).

    Raises:
        RuntimeError: one computes something else.
    """
    double = Problem(*(t.double() if t.is_floating_point() else t for t in vars(problem).values()))
    exact = chunked(double, rows=64)  # full logits in float64 may not fit where every implementation does
    errors, failed = {}, {}
    for name, function in implementations.items():
        try:
            errors[name] = gradient_error(function(problem), exact)
        except RuntimeError as error:  # torch.compile without a compiler, a peer without memory
            failed[name] = (str(error).splitlines() or [type(error).__name__])[0]
    wrong = {name: error for name, error in errors.items() if not error < 1e-2}
    if wrong:
        raise RuntimeError(f"these do not compute the forward KL of the others: {wrong}")
    return errors, failed


def report(shape: tuple[int, int, int, int], runs: int, peers: list[str], divergences: list[str]) -> dict[str, Any]:
    """Check, time and print all implementations of one shape; returns what was printed."""
    tokens, vocabulary, student, teacher = shape
    problem = make_problem(*shape)
    implementations = IMPLEMENTATIONS | {title: through_autograd(loss) for title, loss in available(peers).items()}
    names = ["floor", REUSED, *implementations, *(f"pocl, {name}" for name in divergences)]
    with progress_bar(1 + len(names) * (runs + 1)) as advance:
        advance(f"V = {vocabulary}: checking against float64")
        errors, failed = check(implementations, problem)
        functions: dict[str, Callable[[], Any]] = {"floor": lambda: floor(problem), REUSED: ReusedFloor(problem)}
        functions |= {name: (lambda f=implementations[name]: f(problem)) for name in errors}  # type: ignore[misc]
        functions |= {f"pocl, {name}": (lambda d=name: fused(problem, d)) for name in divergences}  # type: ignore[misc]
        timings = interleaved(functions, runs, lambda name: advance(f"V = {vocabulary}: {name}"))
        peaks = {}
        for name, function in functions.items():
            advance(f"V = {vocabulary}: memory of {name}")
            peaks[name] = peak_bytes(function)
    print(f"\n{tokens} tokens, half of them ignored; vocabulary {vocabulary}; hidden {student} <- {teacher}; float32")
    print(f"{'':30}{'median':>10}{'spread':>9}{'/ floor':>9}{'peak':>10}{'error':>11}")
    rows = {}
    for name, timing in timings.items():
        peak, ratio = peaks[name], timing.median / timings["floor"].median
        rows[name] = {"seconds": timing.samples, "peak_bytes": peak, "error": errors.get(name)}
        line = f"{name:30}{timing.median:>8.3f} s{100 * timing.spread:>7.1f} %{ratio:>9.2f}"
        line += " " * 10 if peak is None else f"{peak / 2**20:>6.0f} MiB"
        print(f"{line}{errors[name]:>11.1e}" if name in errors else line)
    for name, reason in failed.items():
        print(f"{name:30}  does not run: {reason[:80]}")
    settings = {"tokens": tokens, "vocabulary": vocabulary, "hidden": [student, teacher], "dtype": "float32"}
    return settings | {"rows": rows, "failed": failed}


@pytest.mark.filterwarnings("default")  # what peers warn of is theirs
@pytest.mark.parametrize("name", ["floor", *IMPLEMENTATIONS, *PEERS])
def test_forward_and_backward(benchmark: Any, name: str) -> None:
    problem = make_problem(*SMALL)
    function: Callable[[Problem], Any] = floor if name == "floor" else IMPLEMENTATIONS.get(name, floor)
    if name in PEERS:
        _, loss, package = PEERS[name]
        pytest.importorskip(package)
        function = through_autograd(loss)
    benchmark.pedantic(function, args=(problem,), rounds=3, iterations=1, warmup_rounds=1)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with `shapes`, `peers` and `divergences` as lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = SHAPES[0]
    parser.add_argument(
        "--tokens", type=int, help=f"rows of hidden states, half of them ignored (default: {default[0]})"
    )
    parser.add_argument("--vocab", type=int, help=f"rows of both heads (default: {default[1]})")
    parser.add_argument("--student", type=int, help=f"the student's hidden size (default: {default[2]})")
    parser.add_argument("--teacher", type=int, help=f"the teacher's hidden size (default: {default[3]})")
    parser.add_argument("--sweep", action="store_true", help=f"vocabularies of {SWEEP[0][1]} to {SWEEP[-1][1]}")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument(
        "--peers", help=f"comma-separated, of {', '.join(PEERS)}, or all (default: none; of --sweep: all)"
    )
    parser.add_argument("--divergences", default="", help="comma-separated names to time beside fkl, or all")
    parser.add_argument("--save", action="store_true", help="file the result under benchmarks/results")
    options = parser.parse_args(arguments)
    given = (options.tokens, options.vocab, options.student, options.teacher)
    if any(value is not None and value < 2 for value in given) or options.runs < 1:
        parser.error("sizes are at least 2, and --runs at least 1")
    if options.sweep and any(given):
        parser.error("--sweep has shapes of its own: give it, or --tokens, --vocab, --student and --teacher")
    one = tuple(value or otherwise for value, otherwise in zip(given, default, strict=True))
    options.shapes = SWEEP if options.sweep else (one,) if any(given) else SHAPES
    if options.peers is None:
        options.peers = "all" if options.sweep else ""
    options.peers = list(PEERS) if options.peers == "all" else [name for name in options.peers.split(",") if name]
    others = [name for name in pocl.DIVERGENCES if name != "fkl"]
    options.divergences = [name for name in options.divergences.split(",") if name]
    options.divergences = others if options.divergences == ["all"] else options.divergences
    unknown = sorted(set(options.divergences) - set(others))
    if unknown:
        parser.error(f"--divergences: {', '.join(unknown)}; known beside fkl are {', '.join(others)}")
    try:
        available(options.peers)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    options = parse()
    print(machine())
    for shape in options.shapes:
        if torch.cuda.is_available():
            from benchmarks import bench_gpu

            result = bench_gpu.compare(shape, torch.bfloat16, options.peers, options.divergences)
        else:
            result = report(shape, options.runs, options.peers, options.divergences)
        if options.save:
            subject = "loss-gpu" if torch.cuda.is_available() else "loss"
            print(f"filed in {save_results(subject, {key(result): result})}")


if __name__ == "__main__":
    main()
