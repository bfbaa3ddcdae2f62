"""The row kernels in eager PyTorch: for float64 and for machines without a C compiler. Same contract, same results.

The temporaries of a definition are a dozen times its input, so rows go through in sub-blocks of about 4 MB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_kernels.plan import Plan
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
    out: Tensor,  # [n, 3]: divergence, cross-entropy, entropy
) -> None:
    """See ``divergence_rows.c``: the same three passes, whole rows at a time."""
    step = max(1, SUB_BLOCK_ELEMENTS // zs.shape[1])
    for first in range(0, zs.shape[0], step):
        part = slice(first, first + step)
        z = _transform(zs[part], bias_s, plan.student_scale, plan.student_softcap)
        y = _transform(zt[part], bias_t, plan.teacher_scale, plan.teacher_softcap)
        l = torch.log_softmax(z / plan.temperature, dim=-1)
        r = torch.log_softmax(y / plan.temperature, dim=-1)
        q = l.exp()
        out[part, 0] = plan.divergence.value(l, r).sum(-1)
        out[part, 2] = -weighted(q, l).sum(-1)
        if labels is not None:
            l1 = torch.log_softmax(z, dim=-1)
            index = labels[part, None]
            out[part, 1] = -l1.gather(-1, index).squeeze(-1)
        if not want_grad:
            continue
        slope = plan.divergence.slope(l, r)
        gradient = (slope - q * slope.sum(-1, keepdim=True)) * plan.slope_coefficient
        if labels is not None:
            gradient += l1.exp() * plan.ce_weight
            gradient.scatter_add_(-1, index, torch.full_like(index, -plan.ce_weight, dtype=gradient.dtype))
        gradient *= row_scale[part, None]
        _through_transform(gradient, z, plan.student_scale, plan.student_softcap)
        zs[part] = gradient


def cross_entropy_rows(
    z: Tensor,  # [n, V], overwritten by the gradient if want_grad
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    labels: Tensor,  # [n]
    row_scale: Tensor,  # [n]
    want_grad: bool,
    out: Tensor,  # [n]
) -> None:
    """See ``cross_entropy_rows.c``."""
    step = max(1, SUB_BLOCK_ELEMENTS // z.shape[1])
    for first in range(0, z.shape[0], step):
        part = slice(first, first + step)
        x = _transform(z[part], bias, scale, softcap)
        index = labels[part, None]
        l = torch.log_softmax(x, dim=-1)
        out[part] = -l.gather(-1, index).squeeze(-1)
        if want_grad:
            gradient = l.exp_()
            gradient.scatter_add_(-1, index, torch.full_like(index, -1.0, dtype=gradient.dtype))
            gradient *= row_scale[part, None]
            _through_transform(gradient, x, scale, softcap)
            z[part] = gradient


def _transform(z: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    if bias is not None:
        z = z + bias
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _through_transform(gradient: Tensor, z: Tensor, scale: float, softcap: float | None) -> None:
    """In place: from the gradient of the transformed logits ``z`` to that of the projection."""
    if softcap is not None:
        gradient *= 1.0 - (z / softcap) ** 2
    if scale != 1.0:
        gradient *= scale
