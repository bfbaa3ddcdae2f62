"""What the tests of sparse teachers share: the K likeliest tokens of a case's teacher, and the oracle's answers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pocl_kernels import Divergence, SparseTeacher, reference
from tests.kernels.cases import Case, Solution, by_name, solve


def teacher_log_probs(case: Case) -> Tensor:
    """``[N, V]`` at temperature 1, float64."""
    return reference.log_probabilities(case.teacher_hidden, case.teacher_head, 1.0, case.student_head.vocab_size)


def top_k(log_probs: Tensor, K: int, tail: str = "bucket", *, ragged: bool = True) -> SparseTeacher:
    """The K likeliest tokens in float32; ``ragged``: fewer in every third row."""
    best = log_probs.topk(K, -1)
    ids = best.indices.clone()
    if ragged:
        ids[::3, (K + 1) // 2 :] = -1
    return SparseTeacher(ids, best.values.float(), tail)


def sparse(case: Case, K: int, tail: str = "bucket", **how: Any) -> Case:
    """The case with its teacher known by K tokens alone."""
    return taught_by(case, top_k(teacher_log_probs(case), K, tail, **how))


def taught_by(case: Case, teacher: SparseTeacher) -> Case:
    return case.replace(teacher_hidden=teacher, teacher_head=None)


def double(case: Case) -> Case:
    """The student in float64; the teacher's numbers as they are."""
    head = case.student_head
    bias = None if head.bias is None else head.bias.double()
    return case.replace(
        student_hidden=case.student_hidden.double(),
        student_head=dataclasses.replace(head, weight=head.weight.double(), bias=bias),
    )


@functools.lru_cache(maxsize=256)
def oracle(case: Case, *, divergence: str | Divergence = "fkl", **arguments: Any) -> Solution:
    """The float64 reference on the same numbers."""
    name, parameters = by_name(divergence)
    call = functools.partial(reference.fused_linear_divergence, divergence=name, **parameters)
    return solve(call, double(case), **arguments)


def rows_of(case: Case, part: slice) -> Case:
    """The case at some of its positions."""
    teacher = case.teacher_hidden
    assert isinstance(teacher, SparseTeacher)
    few = SparseTeacher(teacher.token_ids[part], teacher.log_probs[part], teacher.tail, teacher.vocab_size)
    return taught_by(
        case.replace(student_hidden=case.student_hidden[part], labels=case.labels[part]),
        few,
    )


def one_by_one(
    case: Case,
    kind: Callable[[float], str | Divergence],
    numbers: Sequence[float],
    temperatures: Sequence[float],
    **call: Any,
) -> Solution:
    """Sums over the oracle's answers to one position each."""
    parts = [
        oracle.__wrapped__(rows_of(case, slice(i, i + 1)), divergence=kind(x), temperature=t, reduction="sum", **call)
        for i, (x, t) in enumerate(zip(numbers, temperatures, strict=True))
    ]
    fields = {f.name: [getattr(p, f.name) for p in parts] for f in dataclasses.fields(Solution)}
    sums = {name: None if x[0] is None else sum(x) for name, x in fields.items() if name != "hidden"}
    return Solution(hidden=torch.cat(fields["hidden"]), **sums)  # type: ignore[arg-type]
