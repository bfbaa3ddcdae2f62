"""What the benchmarks of the loss compute, on a CPU and on a GPU: inputs, the floor, and what an implementation is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Loss

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


class ReusedFloor:
    """The same products into buffers that a run before has made: no page is new, which no loss can have that gives its
    gradients away.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        rows, (vocabulary, size) = int(problem.valid.sum()), problem.student_weight.shape
        like = problem.student_weight
        self.student, self.teacher = (like.new_empty(rows, vocabulary) for _ in range(2))
        self.grad_hidden, self.grad_weight = like.new_empty(rows, size), torch.empty_like(like)

    def __call__(self) -> None:
        problem = self.problem
        hidden = problem.student_hidden[problem.valid]
        torch.mm(hidden, problem.student_weight.T, out=self.student)
        torch.mm(problem.teacher_hidden[problem.valid], problem.teacher_weight.T, out=self.teacher)
        torch.mm(self.student, problem.student_weight, out=self.grad_hidden)
        torch.mm(self.student.T, hidden, out=self.grad_weight)


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


def key(result: dict[str, Any]) -> str:
    """The name under which the result of a shape is filed."""
    student, teacher = result["hidden"]
    return f"N={result['tokens']} V={result['vocabulary']} H={student}<-{teacher} {result['dtype']}"
