"""What a sparse teacher says of the rows that count: looked at, tempered and laid out for every backend.

A few numbers a row, ``[n, K]``, in float64: 1 less the sum of the K probabilities is all that is known of the tail, and
is often small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocl_kernels.divergences import require
from pocl_kernels.plan import Inputs, Plan
from pocl_kernels.scalar import weighted
from pocl_kernels.sparse import PADDING, shares_tail

EXCESS, EXCESS_16_BIT = 1e-4, 2e-2  # by which the sum of rounded probabilities may exceed 1


class Targets(NamedTuple):
    """What the teacher says of some rows, tempered, in float64."""

    ids: Tensor  # [n, K] int64, of the whole vocabulary; PADDING where there is none
    log_probs: Tensor  # [n, K + 1]: of the K tokens; of the tail as a whole or, if ``each``, of one of its tokens
    tail: Tensor  # [n] int64: how many tokens it has
    each: bool  # every token of the tail has a slope of its own

    def at(self, rows: Any) -> Targets:
        return Targets(self.ids[rows], self.log_probs[rows], self.tail[rows], self.each)

    @property
    def there(self) -> Tensor:
        """Which of the K + 1 outcomes there are; the last only where it is one."""
        last = (self.tail > 0) & (not self.each)
        return torch.cat([self.ids != PADDING, last[:, None]], 1)

    @property
    def entropy(self) -> Tensor:
        """Of the teacher over the outcomes or, if ``each``, over all tokens; nats."""
        terms = -weighted(self.log_probs.exp(), self.log_probs)
        return terms[:, :-1].sum(1) + terms[:, -1] * (self.tail if self.each else 1)


def targets_of(inputs: Inputs, plan: Plan, rows: Any, V: int) -> Targets:
    """The teacher at some rows, all of which count, over V tokens in all; ``plan`` is that of these rows.

    Raises:
        ValueError: for ids outside the vocabulary or twice in a row, for numbers that are no log-probabilities, and for
            rows of padding alone. On a GPU the device raises.
    """
    assert inputs.token_ids is not None
    assert inputs.log_probs is not None
    assert plan.divergence is not None
    ids, given = inputs.token_ids[rows].long(), inputs.log_probs[rows]
    counts = (inputs.row_scale[rows] != 0)[:, None]
    there = ids != PADDING
    _check_ids(ids, there, counts, V)
    there &= counts  # a row without weight, which a GPU keeps, may say anything
    ids, log_probs = torch.where(there, ids, PADDING), torch.where(there, given.double(), -torch.inf)
    _check_log_probs(log_probs, counts, given.dtype, plan.tail)
    tail, each = V - there.sum(1), not shares_tail(type(plan.divergence), plan.tail)
    count = tail.clamp(min=1).double().log()
    missing = torch.full_like(count, -torch.inf)
    if plan.tail in ("bucket", "uniform"):
        least = hidden_mass(log_probs, given.dtype)
        missing = torch.where(tail > 0, torch.maximum(1.0 - log_probs.exp().sum(1), least).log(), missing)
    T = plan.temperature[:, None] if plan.by_token else plan.temperature
    one, top = (missing - count)[:, None] / T, log_probs / T
    whole = one + count[:, None]
    result = torch.cat([top, one if each else whole], 1)
    if plan.tail != "zero":
        result = result - torch.cat([top, whole], 1).logsumexp(1, keepdim=True)
    return Targets(ids, result, tail, each)


def hidden_mass(log_probs: Tensor, dtype: torch.dtype) -> Tensor:
    """Probability that rounding may hide, ``[n]``: what the tail has at least.

    Half an ulp of every log-probability in ``dtype``, and half an ulp of 1, in float32 at least. With a tail of exactly
    0 a reverse KL would be infinite for a teacher that is merely sure.
    """
    eps = torch.finfo(dtype).eps
    one = min(eps, torch.finfo(torch.float32).eps)
    rounded: Tensor = weighted(log_probs.exp(), -log_probs).sum(1)
    return eps / 2 * rounded + one / 2


def _check_ids(ids: Tensor, there: Tensor, counts: Tensor, V: int) -> None:
    inside = ((ids >= 0) & (ids < V)) | ~there | ~counts
    require(inside, f"SparseTeacher.token_ids must be in [0, {V}), or {PADDING} for padding", ids)
    ordered = ids.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING) & counts
    require(~twice, "SparseTeacher.token_ids must not name a token twice in a position", ordered[:, 1:])
    message = "SparseTeacher.token_ids: a position that counts must have a token that is not padding"
    require(there.any(1, keepdim=True) | ~counts, message, ids[:, :1])


def _check_log_probs(log_probs: Tensor, counts: Tensor, dtype: torch.dtype, tail: str) -> None:
    excess = EXCESS if dtype.itemsize > 2 else EXCESS_16_BIT
    require(~torch.isnan(log_probs), "SparseTeacher.log_probs must not be NaN", log_probs)
    require(log_probs <= excess, "SparseTeacher.log_probs must be logarithms of probabilities, at most 0", log_probs)
    total = log_probs.exp().sum(1, keepdim=True)
    message = f"SparseTeacher.log_probs: a position's probabilities must sum to 1 at most ({excess:g} for rounding)"
    require(total <= 1.0 + excess, message, total)
    if tail == "renormalise":
        message = "SparseTeacher.log_probs: probabilities that are to be scaled to 1 must not sum to 0"
        require((total > 0) | ~counts, message, total)
