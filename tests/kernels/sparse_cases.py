"""What the tests of sparse teachers share: the K likeliest tokens of a case's teacher, and the oracle's answers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

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
