"""The row kernels in eager PyTorch, for float64 on every device and for machines without a C compiler.

The temporaries of a definition are a dozen times its input, so rows go through in sub-blocks of about 4 MB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_kernels.parallel import VocabularyGroup
from pocl_kernels.plan import (
    ACCURACY,
    CROSS_ENTROPY,
    DIVERGENCE,
    ENTROPY,
    LOG_SUM_EXP,
    LOSS,
    RESULTS,
    TEACHER_ENTROPY,
    Plan,
)
from pocl_kernels.scalar import weighted

SUB_BLOCK_ELEMENTS = 1 << 20


def divergence_rows(
    zs: Tensor,  # [n, V], overwritten by the gradient if want_grad
    zt: Tensor,  # [n, V], overwritten
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    labels: Tensor | None,  # [n]
    row_scale: Tensor,  # [n]
    plan: Plan,
    want_grad: bool,
    out: Tensor,  # [n, RESULTS]
    group: VocabularyGroup | None = None,
) -> None:
    """As ``cpu/divergence_rows.c``, whole rows at a time. With a group, V is this process's share of the vocabulary."""
    assert plan.divergence is not None
    step = max(1, SUB_BLOCK_ELEMENTS // (zs.shape[1] if group is None else group.largest))
    for first in range(0, zs.shape[0], step):
        part = slice(first, first + step)
        own = plan.at((part, None), zs.dtype)  # columns
        assert own.divergence is not None
        z = transform(zs[part], bias_s, plan.student_scale, plan.student_softcap)
        y = transform(zt[part], bias_t, plan.teacher_scale, plan.teacher_softcap)
        l = _log_softmax(z / own.temperature, group)
        r = _log_softmax(y / own.temperature, group)
        q, slope = l.exp(), own.divergence.relative_slope(l, r, *_anchor(l, r, group))
        sums = torch.zeros(z.shape[0], RESULTS + 2, dtype=z.dtype, device=z.device)  # and sums of slopes and of q
        sums[:, DIVERGENCE] = own.divergence.value(l, r).sum(-1)
        sums[:, ENTROPY] = -weighted(q, l).sum(-1)
        sums[:, TEACHER_ENTROPY] = -weighted(r.exp(), r).sum(-1)
        sums[:, RESULTS] = slope.sum(-1)
        sums[:, RESULTS + 1] = q.sum(-1)
        if labels is not None:
            l1 = _log_softmax(z, group)
            index, inside = local_labels(labels[part], z.shape[1], group)
            sums[:, CROSS_ENTROPY] = -torch.where(inside, l1.gather(-1, index).squeeze(-1), 0.0)
        if group is not None:
            group.sum(sums)
        if labels is not None:
            sums[:, ACCURACY] = (-sums[:, CROSS_ENTROPY] >= _largest(l1, group)).to(z.dtype)
        out[part] = sums[:, :RESULTS]
        if not want_grad:
            continue
        # Not q sums to one but q / sum q: a rounded normaliser moves a whole row, and would its gradient. An infinite
        # slope without weight is nothing.
        coefficient = (
            own.slope_coefficient if plan.by_token else torch.tensor(own.slope_coefficient, dtype=torch.float64).to(z)
        )
        gradient = weighted(coefficient, slope - q * (sums[:, RESULTS, None] / sums[:, RESULTS + 1, None]))
        if labels is not None and plan.ce_weight > 0:
            gradient += l1.exp() * plan.ce_weight
            gradient.scatter_add_(-1, index, -plan.ce_weight * inside[:, None].to(gradient.dtype))
        gradient = weighted(row_scale[part, None], gradient)
        through_transform(gradient, z, plan.student_scale, plan.student_softcap)
        zs[part] = gradient


def cross_entropy_rows(
    z: Tensor,  # [n, V], overwritten by the gradient if want_grad
    bias: Tensor | None,
    labels: Tensor,  # [n]
    row_scale: Tensor,  # [n]
    plan: Plan,
    want_grad: bool,
    out: Tensor,  # [n, RESULTS]
    group: VocabularyGroup | None = None,
) -> None:
    """As ``cpu/cross_entropy_rows.c``. With a group, V is this process's share of the vocabulary."""
    scale, softcap, smoothing = plan.student_scale, plan.student_softcap, plan.label_smoothing
    own, largest_share, V = z.shape[1], *((z.shape[1],) * 2 if group is None else (group.largest, group.total))
    step = max(1, SUB_BLOCK_ELEMENTS // largest_share)
    for first in range(0, z.shape[0], step):
        part = slice(first, first + step)
        x = transform(z[part], bias, scale, softcap)
        largest = _largest(x, group)
        below = x - largest[:, None]
        index, inside = local_labels(labels[part], own, group)
        sums = torch.stack(
            [below.exp().sum(-1), torch.where(inside, below.gather(-1, index).squeeze(-1), 0.0), below.sum(-1)], 1
        )
        log_sum, label, mean = (sums if group is None else group.sum(sums)).unbind(1)
        log_sum, mean = log_sum.log(), mean / V
        lse = largest + log_sum
        rows = out[part]
        rows[:, CROSS_ENTROPY] = log_sum - label
        rows[:, LOSS] = (log_sum - label) + weighted(smoothing, label - mean) + weighted(plan.z_loss, lse * lse)
        rows[:, LOG_SUM_EXP] = lse
        rows[:, ACCURACY] = (label >= 0.0).to(x.dtype)
        if want_grad:
            gradient = (below - log_sum[:, None]).exp_() * (1.0 + weighted(2.0 * plan.z_loss, lse[:, None]))
            gradient -= smoothing / V
            gradient.scatter_add_(-1, index, (smoothing - 1.0) * inside[:, None].to(gradient.dtype))
            gradient = weighted(row_scale[part, None], gradient)
            through_transform(gradient, x, scale, softcap)
            z[part] = gradient


def _log_softmax(u: Tensor, group: VocabularyGroup | None) -> Tensor:
    if group is None:
        return torch.log_softmax(u, dim=-1)
    largest = group.maximum(u.amax(-1, keepdim=True))
    total = group.sum((u - largest).exp().sum(-1, keepdim=True))
    return (u - largest) - total.log()


def _largest(l: Tensor, group: VocabularyGroup | None) -> Tensor:
    return l.amax(-1) if group is None else group.maximum(l.amax(-1))


def _anchor(l: Tensor, r: Tensor, group: VocabularyGroup | None) -> tuple[Tensor, Tensor]:
    """l and r of the student's most probable token, to which all slopes are relative: ``[n, 1]`` each."""
    l0, top = l.max(-1, keepdim=True)
    r0 = r.gather(-1, top)
    if group is not None:
        own, l0 = l0, group.maximum(l0.clone())
        r0 = group.maximum(torch.where(own == l0, r0, -torch.inf))
    return l0, r0


def local_labels(labels: Tensor, V: int, group: VocabularyGroup | None) -> tuple[Tensor, Tensor]:
    """Column of each label ``[n, 1]`` and whether this process has it ``[n]``; exactly one process must."""
    index = labels if group is None else labels - group.offset
    inside = (index >= 0) & (index < V)
    if group is not None:
        owners = group.sum(inside.to(torch.int32))
        if (owners != 1).any():
            bad = labels[owners != 1][0].item()
            raise ValueError(f"labels contain {bad}, which no process's share of the vocabulary holds")
    return index.clamp(0, V - 1)[:, None], inside


def transform(z: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    if bias is not None:
        z = z + bias
    if scale != 1.0:
        z = z * scale
    # z - z is NaN where z is infinite: a cap must not make a broken logit look sound.
    return z if softcap is None else softcap * torch.tanh(z / softcap) + (z - z)


def through_transform(gradient: Tensor, z: Tensor, scale: float, softcap: float | None) -> None:
    """In place: from the gradient of the transformed logits ``z`` to that of the projection."""
    if softcap is not None:
        gradient *= 1.0 - (z / softcap) ** 2
    if scale != 1.0:
        gradient *= scale
