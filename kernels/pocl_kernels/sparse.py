"""A teacher that is known by its K likeliest tokens: what an inference engine or a server hands over.

What stands in docs/mathematics.md under "Sparse teachers" is computed; the checks that need no look at the numbers are
here, those of ids and log-probabilities in ``eager/sparse.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from typing import Any

import torch
from torch import Tensor

from pocl_kernels.arguments import check_device, check_hidden, shared_vocab_size
from pocl_kernels.divergences import Divergence, require
from pocl_kernels.head import Head

TAILS = ("bucket", "renormalise", "zero", "uniform")
PADDING = -1


@dataclasses.dataclass(frozen=True, eq=False)
class SparseTeacher:
    """The teacher's K likeliest tokens at every position; stands where its hidden states do, without a head.

    Args:
        token_ids: ``[..., K]`` int64 or int32 ids in the student's vocabulary, in any order, none twice in a position.
            -1 is padding, for positions with fewer tokens; its log-probability is not read.
        log_probs: ``[..., K]`` natural logarithms of the teacher's probabilities at temperature 1, float32, float64,
            float16 or bfloat16; computed without gradient. They may sum to less than 1, and by rounding to 1e-4 more
            (16-bit ones to 2e-2).
        tail: what is assumed of the other V - K tokens. "bucket": they are one outcome, with all the probability that
            is missing, and the divergence is over K + 1 outcomes. "uniform": each of them has an equal share of what is
            missing. "renormalise": they have none, the K are scaled to sum to 1. "zero": they have none, and the K stay
            as they are.
        vocab_size: tokens of the teacher, where the student's head has more rows: those beyond are padding and take no
            probability. None: all rows of the student's head are tokens.

    Under a temperature the missing probability is taken as spread evenly over the tail, for "bucket" and "uniform"; the
    probabilities' powers 1 / T are then scaled to sum to 1. "zero" leaves a teacher that does not sum to 1, which has
    no temperature: it is refused unless that is 1. Reverse KL and others that are infinite where the teacher has no
    probability are refused with "renormalise" and "zero".

    Raises:
        ValueError: for shapes, dtypes or a tail that do not fit. The ids and log-probabilities of the rows that count
            are looked at by the loss.
    """

    token_ids: Tensor
    log_probs: Tensor
    tail: str = "bucket"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name, x in (("token_ids", self.token_ids), ("log_probs", self.log_probs)):
            if not isinstance(x, Tensor):
                raise ValueError(f"SparseTeacher.{name} is a {type(x).__name__}: it must be a tensor, [..., K]")
        ids, log_probs = self.token_ids, self.log_probs
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"SparseTeacher.token_ids are {ids.dtype}: they must be int64 or int32 token ids")
        if not log_probs.is_floating_point():
            raise ValueError(f"SparseTeacher.log_probs are {log_probs.dtype}: they must be floating point")
        if ids.shape != log_probs.shape or ids.dim() < 1:
            raise ValueError(
                f"SparseTeacher.token_ids have shape {tuple(ids.shape)}, log_probs {tuple(log_probs.shape)}: both must "
                "be the same [..., K]"
            )
        if ids.shape[-1] == 0:
            raise ValueError("SparseTeacher has K = 0 tokens a position: it needs at least one")
        if ids.device != log_probs.device:
            raise ValueError(
                f"SparseTeacher.token_ids are on {ids.device}, log_probs on {log_probs.device}: move both to one device"
            )
        if self.tail not in TAILS:
            near = difflib.get_close_matches(str(self.tail), TAILS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"SparseTeacher.tail={self.tail!r} must be one of {', '.join(TAILS)}{hint}")
        V = self.vocab_size
        if V is not None and not (isinstance(V, int) and not isinstance(V, bool) and V > 0):
            raise ValueError(f"SparseTeacher.vocab_size={V!r} must be a positive number of tokens, or None")


def check_sparse(hidden: Tensor, head: Head, teacher: SparseTeacher, teacher_head: Any, whole: bool) -> int | None:
    """The size of the shared vocabulary; None unless ``whole``: spread over processes, none of which knows it."""
    check_hidden("student", hidden, head)
    if teacher_head is not None:
        raise ValueError("teacher_head has no meaning with a SparseTeacher, which needs none: leave it out")
    ids = teacher.token_ids
    if ids.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"SparseTeacher has leading shape {tuple(ids.shape[:-1])}, student_hidden {tuple(hidden.shape[:-1])}: both "
            "models must see the same tokens"
        )
    check_device("SparseTeacher is", ids, hidden)
    if teacher.log_probs.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "SparseTeacher.log_probs require grad, but no gradient flows to the teacher: make them under "
            "torch.no_grad(), or pass log_probs.detach()"
        )
    if not whole:
        if teacher.vocab_size is not None:
            raise ValueError(
                f"SparseTeacher.vocab_size={teacher.vocab_size} with process_group: cut the student's head to the "
                "shared vocabulary, then shard it, and leave vocab_size out"
            )
        return None
    V = head.vocab_size if teacher.vocab_size is None else shared_vocab_size(head.vocab_size, teacher.vocab_size)
    if ids.shape[-1] > V:
        raise ValueError(f"SparseTeacher has K = {ids.shape[-1]} tokens a position, the vocabulary {V}")
    return V


def check_tail(teacher: SparseTeacher, divergence: Divergence, temperature: Any, vocab_size: int | None) -> None:
    """Refuse a temperature of what has none, and divergences that are infinite over this tail."""
    if teacher.tail in ("bucket", "uniform"):
        return
    if teacher.tail == "zero":
        advice = (
            'temperature must be 1 with tail="zero", whose probabilities do not sum to 1: pass tail="bucket", or '
            '"renormalise", which tempers the K tokens alone'
        )
        if isinstance(temperature, Tensor) and temperature.dim():
            require(temperature == 1.0, advice, temperature)
        elif temperature != 1.0:
            raise ValueError(f"{advice}; got temperature={float(temperature):g}")
    if teacher.token_ids.shape[-1] == vocab_size:  # there may be no tail
        return
    values = divergence.value(*_without_teacher(-1.0))
    require(
        torch.isfinite(values),
        f"{type(divergence).__name__} is infinite where the teacher has no probability, as on all tokens but K with "
        f'tail={teacher.tail!r}: pass tail="bucket" or "uniform"',
        values,
    )


@functools.cache
def shares_tail(kind: type[Divergence], tail: str) -> bool:
    """Whether the tail's tokens share one slope, each by its part of the tail; else each has its own.

    Where the teacher has no probability, an f-divergence is in proportion to q: its sum over the tail is that of one
    outcome with all of the tail's q. Looked up once a class, at parameters that are nothing special.
    """
    if tail in ("bucket", "uniform"):
        return tail == "bucket"
    fields = len(dataclasses.fields(kind))
    divergence = kind.from_parameters([0.29 + 0.08 * i for i in range(fields)])
    ratios = []
    for l in (-0.5, -3.0, -7.0):
        inputs = _without_teacher(l)
        q = math.exp(l)
        ratios.append((float(divergence.value(*inputs)) / q, float(divergence.slope(*inputs)) / q))
    return all(
        not math.isfinite(x) or math.isclose(x, first, rel_tol=1e-9, abs_tol=1e-12)
        for row in ratios
        for x, first in zip(row, ratios[0], strict=True)
    )


def _without_teacher(l: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(l, dtype=torch.float64), torch.tensor(-torch.inf, dtype=torch.float64)
