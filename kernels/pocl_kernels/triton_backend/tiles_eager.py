"""The three tile kernels in eager PyTorch, for float64: the same sums and states, written over by the same rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pocl_kernels.divergences import Divergence
from pocl_kernels.scalar import weighted
from pocl_kernels.triton_backend.state import (
    LABEL,
    MAX_S,
    MAX_T,
    SLOPE,
    SLOPE_SUM,
    SUM_1,
    SUM_E,
    SUM_F,
    SUM_R,
    SUM_S,
    SUM_T,
    SUM_U,
    SUM_W,
    SUM_Z,
    TOP,
    VALUE,
    anchor,
    log_sum_exp,
    raise_maxima,
    ratio_terms,
)


def transform(z: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """A head's transform after the projection."""
    z = scale * (z if bias is None else z + bias[: z.shape[1]])
    return z if softcap is None else softcap * torch.tanh(z / softcap) + (z - z)


def statistics(
    zs: Tensor, zt: Tensor | None, labels: Tensor | None, first: int, rate: Any, kl: bool, sums: Tensor
) -> None:
    """``tile_statistics.py`` on transformed logits ``[n, width]``; ``rate`` is 1 / T."""
    if labels is not None:
        label = labels - first
        here = (label >= 0) & (label < zs.shape[1])
        picked = zs.gather(1, label.clamp(0, zs.shape[1] - 1)[:, None]).squeeze(1)
        sums[LABEL.value] = torch.where(here, picked, sums[LABEL.value])
    if zt is not None:
        largest, at = zs.max(1, keepdim=True)
        rises = largest.squeeze(1) > sums[MAX_S.value]
        sums[TOP.value] = torch.where(rises, zt.gather(1, at).squeeze(1), sums[TOP.value])
    maxima = torch.stack([zs.amax(1), sums[MAX_T.value] if zt is None else zt.amax(1)])
    raise_maxima(sums, torch.maximum(maxima, sums[: SUM_S.value]), rate)
    logits, zs = zs, _below(zs, sums[MAX_S.value])
    column = _column(rate)
    u = zs * column
    b = u.exp()
    sums[SUM_U.value] += weighted(b, u).sum(1)
    sums[SUM_S.value] += b.sum(1)
    sums[SUM_1.value] += zs.exp().sum(1)
    if zt is None:
        sums[SUM_Z.value] += logits.sum(1)
        return
    v = _below(zt, sums[MAX_T.value]) * column
    a = v.exp()
    sums[SUM_T.value] += a.sum(1)
    sums[SUM_W.value] += weighted(a, v).sum(1)
    if kl:
        for row, term in zip((SUM_E, SUM_F, SUM_R), ratio_terms(a, b, u - v), strict=True):
            sums[row.value] += term.sum(1)


def values(zs: Tensor, zt: Tensor, state: Tensor, divergence: Divergence, rate: Any, sums: Tensor) -> None:
    """``tile_values.py`` on transformed logits."""
    l, r = _log_probabilities(zs, zt, state, rate)
    divergence = _columns(divergence)
    sums[VALUE.value] += divergence.value(l, r).sum(1)
    sums[SLOPE.value] += divergence.relative_slope(l, r, *_anchor(state, rate)).sum(1)


def slopes(zs: Tensor, zt: Tensor, state: Tensor, divergence: Divergence, rate: Any) -> Tensor:
    """``slope - q c`` of each entry."""
    l, r = _log_probabilities(zs, zt, state, rate)
    return _columns(divergence).relative_slope(l, r, *_anchor(state, rate)) - l.exp() * state[SLOPE_SUM.value][:, None]


def cross_entropy_gradient(
    zs: Tensor,
    labels: Tensor,
    first: int,
    state: Tensor,
    smoothing: float = 0.0,
    share: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """``(1 + 2 z_loss lse) softmax(z_s) - (1 - smoothing) 1[label] - share`` of each entry."""
    g = ((zs - state[MAX_S.value][:, None]) - state[SUM_1.value].log()[:, None]).exp()
    g = g * (1.0 + weighted(2.0 * z_loss, log_sum_exp(state)[:, None])) - share
    is_label = torch.arange(first, first + zs.shape[1], device=zs.device) == labels[:, None]
    return g - (1.0 - smoothing) * is_label.to(g.dtype)


def _log_probabilities(zs: Tensor, zt: Tensor, state: Tensor, rate: Any) -> tuple[Tensor, Tensor]:
    l = (zs - state[MAX_S.value][:, None]) * _column(rate) - state[SUM_S.value].log()[:, None]
    r = (zt - state[MAX_T.value][:, None]) * _column(rate) - state[SUM_T.value].log()[:, None]
    return l, r


def _anchor(state: Tensor, rate: Any) -> tuple[Tensor, Tensor]:
    l0, r0 = anchor(state, rate)
    return l0[:, None], r0[:, None]


def _column(x: Any) -> Any:
    return x[:, None] if isinstance(x, Tensor) and x.dim() else x


def _columns(divergence: Divergence) -> Divergence:
    return divergence.from_parameters([_column(x) for x in divergence.parameters()])


def _below(z: Tensor, maximum: Tensor) -> Tensor:
    return z - torch.where(maximum == -torch.inf, 0.0, maximum)[:, None]
