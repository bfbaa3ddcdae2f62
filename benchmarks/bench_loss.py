"""The fused distillation loss, forward and backward, against its floor and against plain PyTorch.

    python -m benchmarks.bench_loss                                          # two default shapes
    python -m benchmarks.bench_loss --peers trl,liger,authors --divergences all --save
    python -m benchmarks.bench_loss --tokens 512 --vocab 151936 --student 896 --teacher 1536

The floor is the four matrix products over valid rows that no exact method can save (student logits, teacher logits,
gradient of the hidden states, gradient of the weight) and nothing else. Half of the labels are ignored, as in a batch
of prompts and responses. Every implementation is checked against float64 before it is timed.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import pocl
from benchmarks.measure import interleaved, machine, peak_bytes, save_results
from benchmarks.peers import PEERS, Loss, available

SHAPES = ((1024, 49152, 576, 576), (512, 151936, 896, 1536))  # tokens, vocabulary, student's and teacher's hidden size
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Problem:
    """Tensors of one case: hidden states [N, H], heads [V, H], labels [N] of which half are ignored."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @property
    def valid(self) -> Tensor:
        return self.labels != -100


def make_problem(tokens: int, vocabulary: int, student: int, teacher: int, *, device: str = "cpu") -> Problem:
    """A student near its teacher: their hidden states share the leading directions, whose sizes fall off."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shared = min(student, teacher)
    spectrum = torch.arange(1, max(student, teacher) + 1).rsqrt()
    teacher_hidden = normal(tokens, teacher) * spectrum[:teacher]
    teacher_weight = normal(vocabulary, teacher)
    student_hidden = 0.1 * normal(tokens, student) * spectrum[:student]
    student_hidden[:, :shared] += teacher_hidden[:, :shared]
    student_weight = 0.1 * normal(vocabulary, student)
    student_weight[:, :shared] += teacher_weight[:, :shared]
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.randperm(tokens, generator=generator)[: tokens // 2]] = -100
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    return Problem(*(tensor.to(device) for tensor in tensors))


def floor(problem: Problem) -> None:
    """The four matrix products over the valid rows alone, whole, as plain PyTorch does them."""
    hidden, teacher = problem.student_hidden[problem.valid], problem.teacher_hidden[problem.valid]
    logits = hidden @ problem.student_weight.T
    teacher @ problem.teacher_weight.T
    logits @ problem.student_weight
    logits.T @ hidden


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


Implementation = Callable[[Problem], tuple[Tensor, Tensor, Tensor]]


def through_autograd(loss: Loss) -> Implementation:
    """A peer's loss as an implementation."""

    def run(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        hidden = problem.student_hidden.detach().requires_grad_()
        weight = problem.student_weight.detach().requires_grad_()
        value = loss(hidden, weight, problem.teacher_hidden, problem.teacher_weight, problem.labels, TEMPERATURE)
        value.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return value.detach(), hidden.grad, weight.grad

    return run


# The forward KL in each of them, so that one result is right for all.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "pocl": fused,
    "chunked loop in eager torch": chunked,
    "eager torch, full logits": eager,
}


def gradient_error(found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]) -> float:
    """Largest error of loss, hidden gradient and weight gradient, each relative to the norm of the expected."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def report(shape: tuple[int, int, int, int], runs: int, peers: list[str], divergences: list[str]) -> dict[str, Any]:
    """Check, time and print all implementations of one shape; returns what was printed."""
    problem = make_problem(*shape)
    exact = eager(Problem(*(t.double() if t.is_floating_point() else t for t in vars(problem).values())))
    implementations = IMPLEMENTATIONS | {title: through_autograd(loss) for title, loss in available(peers).items()}
    errors = {name: gradient_error(function(problem), exact) for name, function in implementations.items()}
    del exact
    wrong = {name: error for name, error in errors.items() if not error < 1e-2}
    if wrong:
        raise RuntimeError(f"these do not compute the forward KL of the others: {wrong}")
    functions: dict[str, Callable[[], Any]] = {"floor": lambda: floor(problem)}
    functions |= {name: (lambda f=function: f(problem)) for name, function in implementations.items()}  # type: ignore[misc]
    functions |= {f"pocl, {name}": (lambda d=name: fused(problem, d)) for name in divergences}  # type: ignore[misc]
    timings = interleaved(functions, runs)
    tokens, vocabulary, student, teacher = shape
    print(f"\n{tokens} tokens, half of them ignored; vocabulary {vocabulary}; hidden {student} <- {teacher}; float32")
    print(f"{'':30}{'median':>10}{'spread':>9}{'/ floor':>9}{'peak':>10}{'error':>11}")
    rows = {}
    for name, timing in timings.items():
        peak = peak_bytes(functions[name])
        ratio = timing.median / timings["floor"].median
        rows[name] = {"seconds": timing.samples, "over_floor": ratio, "peak_bytes": peak, "error": errors.get(name)}
        line = f"{name:30}{timing.median:>8.3f} s{100 * timing.spread:>7.1f} %{ratio:>9.2f}"
        line += " " * 10 if peak is None else f"{peak / 2**20:>6.0f} MiB"
        print(f"{line}{errors[name]:>11.1e}" if name in errors else line)
    return {"tokens": tokens, "vocabulary": vocabulary, "hidden": [student, teacher], "rows": rows}


@pytest.mark.parametrize("name", ["floor", *IMPLEMENTATIONS])
def test_forward_and_backward(benchmark: Any, name: str) -> None:
    problem = make_problem(*SHAPES[0])
    function: Callable[[Problem], Any] = floor if name == "floor" else IMPLEMENTATIONS[name]
    benchmark.pedantic(function, args=(problem,), rounds=3, iterations=1, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="rows of hidden states")
    parser.add_argument("--vocab", type=int, help="rows of both heads")
    parser.add_argument("--student", type=int, help="the student's hidden size")
    parser.add_argument("--teacher", type=int, help="the teacher's hidden size")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--peers", default="", help=f"comma-separated, of {', '.join(PEERS)} (default: none)")
    parser.add_argument("--divergences", default="", help="comma-separated names to time beside fkl, or all")
    parser.add_argument(
        "--save", action="store_true", help="file the result under benchmarks/results by hardware and day"
    )
    options = parser.parse_args()
    given = (options.tokens, options.vocab, options.student, options.teacher)
    if any(given) and not all(given):
        parser.error("give --tokens, --vocab, --student and --teacher together, or none of them")
    print(machine())
    peers = [name for name in options.peers.split(",") if name]
    divergences = [name for name in options.divergences.split(",") if name]
    if divergences == ["all"]:
        divergences = [name for name in pocl.DIVERGENCES if name != "fkl"]
    shapes = (given,) if all(given) else SHAPES
    results = [report(shape, options.runs, peers, divergences) for shape in shapes]
    if options.save:
        print(f"\nsaved in {save_results('loss', results)}")


if __name__ == "__main__":
    main()
