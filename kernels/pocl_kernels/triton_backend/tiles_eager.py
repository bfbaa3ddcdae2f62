"""The three tile kernels in eager PyTorch, for float64: the same sums and states, written over by the same rules."""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_kernels.divergences import Divergence
from pocl_kernels.scalar import phi_series, weighted
from pocl_kernels.triton_backend.state import (
    LABEL,
    LOG_1,
    LOG_S,
    LOG_T,
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
    VALUE,
)


def transform(z: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """A head's transform after the projection."""
    z = scale * (z if bias is None else z + bias[: z.shape[1]])
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def statistics(
    zs: Tensor, zt: Tensor | None, labels: Tensor | None, first: int, inv_T: float, kl: bool, sums: Tensor
) -> None:
    """``tile_statistics.py`` on transformed logits ``[n, width]``."""
    if labels is not None:
        label = labels - first
        here = (label >= 0) & (label < zs.shape[1])
        picked = zs.gather(1, label.clamp(0, zs.shape[1] - 1)[:, None]).squeeze(1)
        sums[LABEL.value] = torch.where(here, picked, sums[LABEL.value])
    zs, raised = _shift(zs, sums, MAX_S.value)
    d_s, u = raised * inv_T, zs * inv_T
    b, keep_s = u.exp(), (-d_s).exp()
    S_s, S_t = sums[SUM_S.value].clone(), sums[SUM_T.value].clone()
    sums[SUM_U.value] = keep_s * (sums[SUM_U.value] - d_s * S_s) + weighted(b, u).sum(1)
    sums[SUM_S.value] = keep_s * S_s + b.sum(1)
    sums[SUM_1.value] = (-raised).exp() * sums[SUM_1.value] + zs.exp().sum(1)
    if zt is None:
        return
    zt, raised = _shift(zt, sums, MAX_T.value)
    d_t, v = raised * inv_T, zt * inv_T
    a, keep_t = v.exp(), (-d_t).exp()
    sums[SUM_T.value] = keep_t * S_t + a.sum(1)
    if kl:
        E, F, R = sums[SUM_E.value].clone(), sums[SUM_F.value].clone(), sums[SUM_R.value].clone()
        moved, moved_f, moved_r = _ratio_terms(keep_t, keep_s, d_t - d_s)
        rest, f, r = (x.sum(1) for x in _ratio_terms(a, b, u - v))
        sums[SUM_F.value] = keep_t * F + moved * E + moved_f * S_t + f
        sums[SUM_R.value] = keep_s * R + moved * E + moved_r * S_s + r
        sums[SUM_E.value] = keep_s * E + moved * S_t + rest


def values(zs: Tensor, zt: Tensor, state: Tensor, divergence: Divergence, inv_T: float, sums: Tensor) -> None:
    """``tile_values.py`` on transformed logits."""
    l, r = _log_probabilities(zs, zt, state, inv_T)
    sums[VALUE.value] += divergence.value(l, r).sum(1)
    sums[SLOPE.value] += divergence.slope(l, r).sum(1)


def slopes(zs: Tensor, zt: Tensor, state: Tensor, divergence: Divergence, inv_T: float) -> Tensor:
    """``slope - q c`` of each entry."""
    l, r = _log_probabilities(zs, zt, state, inv_T)
    return divergence.slope(l, r) - l.exp() * state[SLOPE_SUM.value][:, None]


def cross_entropy_gradient(zs: Tensor, labels: Tensor, first: int, state: Tensor) -> Tensor:
    """``softmax(z_s) - 1[label]`` of each entry."""
    g = ((zs - state[MAX_S.value][:, None]) - state[LOG_1.value][:, None]).exp()
    return g - (torch.arange(first, first + zs.shape[1], device=zs.device) == labels[:, None]).to(g.dtype)


def _log_probabilities(zs: Tensor, zt: Tensor, state: Tensor, inv_T: float) -> tuple[Tensor, Tensor]:
    l = (zs - state[MAX_S.value][:, None]) * inv_T - state[LOG_S.value][:, None]
    r = (zt - state[MAX_T.value][:, None]) * inv_T - state[LOG_T.value][:, None]
    return l, r


def _shift(z: Tensor, sums: Tensor, maximum: int) -> tuple[Tensor, Tensor]:
    """Logits below the new maximum, which is kept, and by how much it rose."""
    old, new = sums[maximum], torch.maximum(sums[maximum], z.amax(1))
    raised = torch.where(old == -torch.inf, 0.0, new - old)
    sums[maximum] = new
    return z - torch.where(new == -torch.inf, 0.0, new)[:, None], raised


def _ratio_terms(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``b - a``, ``a phi(x)``, ``b phi(-x)`` for b = a e^x."""
    near = x.abs() < 0.5
    forward = phi_series(x)
    rest = torch.where(near, a * (x + forward), b - a)
    f = torch.where(a == 0, b, torch.where(near, a * forward, (b - a) - a * x))
    r = torch.where(b == 0, a, torch.where(near, b * phi_series(-x), (a - b) + b * x))
    return rest, f, r
