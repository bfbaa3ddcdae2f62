"""Sparse teachers in eager PyTorch: the rows for float64, for processes that share a vocabulary and for machines
without a compiler; and what every backend does with the K tokens of a row, ``[n, K]`` numbers in float64.

The divergence is over *outcomes*: the K tokens and, where the tail's tokens share one slope, the tail as the last. Its
gradient at a token of the tail is then one number a row times e^z. docs/mathematics.md has the derivation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocl_kernels.eager.rows import SUB_BLOCK_ELEMENTS, local_labels, through_transform, transform
from pocl_kernels.parallel import VocabularyGroup
from pocl_kernels.plan import ACCURACY, CROSS_ENTROPY, DIVERGENCE, ENTROPY, RESULTS, TEACHER_ENTROPY, Plan
from pocl_kernels.scalar import weighted
from pocl_kernels.sparse import PADDING
from pocl_kernels.targets import Targets


class Mass(NamedTuple):
    """What the student's logits of the tail sum to, below their maximum: float64 ``[n]``."""

    largest: Tensor  # -inf: there is no tail, or all of it is masked
    total: Tensor  # sum e^((z - largest) / T)
    total_1: Tensor  # sum e^(z - largest)
    entropy: Tensor  # of the softmax over the tail alone, at T; 0 where there is none


class Student(NamedTuple):
    """The student's log-probabilities of the outcomes, float64."""

    l: Tensor  # [n, K + 1], the last of the tail as a whole
    l_1: Tensor  # [n, K + 1] at temperature 1
    largest: Tensor  # [n] of all logits
    log_total_1: Tensor  # [n] log sum e^(z - largest)
    l_largest: Tensor  # [n] log-probability of the tail's likeliest token
    anchor: tuple[Tensor, Tensor]  # [n, 1] each: l and r of the likeliest outcome, to which slopes are relative


class Outcomes(NamedTuple):
    """Rows, once all is known; float64. ``top`` and ``tail`` are of ``A D + B CE``, without the row's weight.

    By a logit of the tail the gradient is ``tail e^((z - largest) / T) + label e^(z - largest) - B 1[label]``. Where
    each token has a slope of its own, its first part is ``A (slope - q slopes)`` instead.
    """

    results: Tensor  # [n, RESULTS]
    top: Tensor  # [n, K] gradient by the logits of the K tokens
    tail: Tensor  # [n]
    label: Tensor  # [n]
    slopes: Tensor  # [n] their sum


def student_of(z: Tensor, mass: Mass, targets: Targets, plan: Plan) -> Student:
    """From the logits of the K tokens ``[n, K]`` and the tail's mass. A plan's numbers, one a token, are columns."""
    rate = 1.0 / plan.temperature
    largest = torch.maximum(mass.largest, z.amax(1))[:, None]
    below = torch.cat([z, mass.largest[:, None]], 1) - largest

    def log_softmax(rate: Any, total: Tensor) -> tuple[Tensor, Tensor]:
        u = below * rate
        u = torch.cat([u[:, :-1], u[:, -1:] + total.log()[:, None]], 1)
        log_total = u.logsumexp(1, keepdim=True)
        return u - log_total, log_total

    l, log_total = log_softmax(rate, mass.total)
    l_1, log_total_1 = log_softmax(1.0, mass.total_1)
    l_largest = below[:, -1:] * rate - log_total
    # Each token of the tail has the same r, so of them the likeliest stands for all.
    peaks = torch.cat([l[:, :-1], l_largest], 1) if targets.each else l
    l0, top = peaks.max(1, keepdim=True)
    anchor = l0, targets.log_probs.gather(1, top)
    return Student(l, l_1, largest.squeeze(1), log_total_1.squeeze(1), l_largest.squeeze(1), anchor)


def outcomes_of(
    student: Student,
    mass: Mass,
    targets: Targets,
    plan: Plan,
    labels: Tensor | None,  # [n]
    z_label: Tensor | None,  # [n]
    of_tail: Tensor | None = None,  # [2, n] sums of values and slopes over the tail, if each token has its own
    slope_sum: float | None = None,  # known beforehand: a float sum of many equal terms is off by more than they are
) -> Outcomes:
    """Losses and gradients. A plan's numbers, one a token, are columns."""
    assert plan.divergence is not None
    l, r, there, q = student.l, targets.log_probs, targets.there, student.l.exp()
    values = torch.where(there, plan.divergence.value(l, r), 0.0)
    slopes = torch.where(there, plan.divergence.relative_slope(l, r, *student.anchor), 0.0)
    D, c = values.sum(1), slopes.sum(1)
    if of_tail is not None:
        D, c = D + of_tail[0], c + of_tail[1] if slope_sum is None else torch.full_like(c, slope_sum)
    results = torch.zeros(len(l), RESULTS, dtype=l.dtype, device=l.device)
    results[:, DIVERGENCE] = D
    results[:, ENTROPY] = -weighted(q, l).sum(1) + q[:, -1] * mass.entropy
    results[:, TEACHER_ENTROPY] = targets.entropy
    A = torch.as_tensor(plan.slope_coefficient, dtype=l.dtype, device=l.device)
    gradient = weighted(A, slopes - q * c[:, None])
    tail = torch.where(mass.total > 0, gradient[:, -1] / mass.total, 0.0)
    top, label = gradient[:, :-1], torch.zeros_like(tail)
    if labels is not None:
        assert z_label is not None
        results[:, CROSS_ENTROPY] = (student.largest - z_label) + student.log_total_1
        results[:, ACCURACY] = (z_label >= student.largest).to(l.dtype)
        if plan.ce_weight > 0:
            B = plan.ce_weight
            is_label = targets.ids == labels[:, None]
            top = top + B * (student.l_1[:, :-1].exp() - is_label.to(l.dtype))
            label = B * torch.where(mass.total_1 > 0, student.l_1[:, -1].exp() / mass.total_1, 0.0)
    return Outcomes(results, top, tail, label, c)


def sparse_rows(
    z: Tensor,  # [n, V], overwritten by the gradient if want_grad
    bias: Tensor | None,
    targets: Targets,
    labels: Tensor | None,  # [n]
    row_scale: Tensor,  # [n]
    plan: Plan,
    want_grad: bool,
    out: Tensor,  # [n, RESULTS]
    group: VocabularyGroup | None = None,
) -> None:
    """As ``cpu/sparse_rows.c``, whole rows at a time. With a group, V is this process's share of the vocabulary."""
    step = max(1, SUB_BLOCK_ELEMENTS // (z.shape[1] if group is None else group.largest))
    for first in range(0, len(z), step):
        part = slice(first, first + step)
        own, chosen, chosen_labels = plan.at((part, None)), targets.at(part), None if labels is None else labels[part]
        x = transform(z[part], bias, plan.student_scale, plan.student_softcap).double().clone()
        places = _places(chosen.ids, x.shape[1], group)
        label = None if chosen_labels is None else local_labels(chosen_labels, x.shape[1], group)
        top, z_label = _picked(x, places, label, group)
        x[places.rows, places.columns] = -torch.inf
        mass = _mass(x, 1.0 / own.temperature, group)
        below = x - _finite(mass.largest)[:, None]
        student = student_of(torch.where(chosen.ids == PADDING, -torch.inf, top), mass, chosen, own)
        tail = _tail_terms(below / own.temperature, student, places, chosen, own, group) if chosen.each else None
        outcomes = outcomes_of(student, mass, chosen, own, chosen_labels, z_label, None if tail is None else tail.sums)
        out[part] = outcomes.results.to(out.dtype)
        if not want_grad:
            continue
        if tail is None:
            gradient = outcomes.tail[:, None] * (below / own.temperature).exp()
        else:
            A = torch.as_tensor(own.slope_coefficient, dtype=x.dtype, device=x.device)
            gradient = weighted(A, tail.slopes - tail.q * outcomes.slopes[:, None])
        if label is not None and plan.ce_weight > 0:
            gradient += outcomes.label[:, None] * below.exp()
            gradient.scatter_add_(1, label[0], -plan.ce_weight * label[1][:, None].double())
        of_top = outcomes.top.clone()
        through_transform(gradient, x, plan.student_scale, plan.student_softcap)
        through_transform(of_top, top, plan.student_scale, plan.student_softcap)
        gradient[places.rows, places.columns] = of_top[places.inside]
        z[part] = weighted(row_scale[part, None], gradient).to(z.dtype)


class _Places(NamedTuple):
    """Where the K tokens of the rows lie in this process's share of the vocabulary."""

    nearest: Tensor  # [n, K] columns, any where ``inside`` is false
    inside: Tensor  # [n, K]
    rows: Tensor  # of those inside, one after the other
    columns: Tensor


def _places(ids: Tensor, V: int, group: VocabularyGroup | None) -> _Places:
    index = ids if group is None else ids - group.offset
    inside = (ids != PADDING) & (index >= 0) & (index < V)
    index = index.clamp(0, V - 1)
    return _Places(index, inside, inside.nonzero()[:, 0], index[inside])


def _picked(
    x: Tensor, places: _Places, label: tuple[Tensor, Tensor] | None, group: VocabularyGroup | None
) -> tuple[Tensor, Tensor | None]:
    """The logits of the K tokens ``[n, K]``, 0 for padding, and of the labels ``[n]``."""
    top = torch.where(places.inside, x.gather(1, places.nearest), 0.0)
    if label is not None:
        top = torch.cat([top, torch.where(label[1][:, None], x.gather(1, label[0]), 0.0)], 1)
    if group is not None:
        group.sum(top)
    return (top, None) if label is None else (top[:, :-1], top[:, -1])


def _mass(x: Tensor, rate: Any, group: VocabularyGroup | None) -> Mass:
    """Of logits ``[n, V]`` without those of the K tokens."""
    largest = x.amax(1)
    if group is not None:
        group.maximum(largest)
    below = x - _finite(largest)[:, None]
    e = (below * rate).exp()
    sums = torch.stack([e.sum(1), below.exp().sum(1), weighted(e, below * rate).sum(1)])
    total, total_1, spread = sums if group is None else group.sum(sums)
    return Mass(largest, total, total_1, torch.where(total > 0, total.log() - spread / total, 0.0))


def _finite(largest: Tensor) -> Tensor:
    return torch.where(largest == -torch.inf, 0.0, largest)


class _Tail(NamedTuple):
    """The tail's tokens where each has a slope of its own; 0 at the K tokens."""

    sums: Tensor  # [2, n] of values and of slopes, over all processes
    slopes: Tensor  # [n, V]
    q: Tensor  # [n, V]


def _tail_terms(
    below: Tensor, student: Student, places: _Places, targets: Targets, plan: Plan, group: VocabularyGroup | None
) -> _Tail:
    """``below``: ``(z - largest) / T``. A masked logit of the tail counts, so what does not is told by its place."""
    assert plan.divergence is not None
    l, r = below + student.l_largest[:, None], targets.log_probs[:, -1:]
    values, slopes = plan.divergence.value(l, r), plan.divergence.relative_slope(l, r, *student.anchor)
    values, slopes = (x.expand_as(l).clone() for x in (values, slopes))
    values[places.rows, places.columns] = slopes[places.rows, places.columns] = 0.0
    sums = torch.stack([values.sum(1), slopes.sum(1)])
    return _Tail(sums if group is None else group.sum(sums), slopes, l.exp())
