"""What the low-memory mode knows of each row: sums that merge over vocabulary tiles, and the state that they amount to.

With the running maxima M_s, M_t of the logits, u = (z_s - M_s) / T, v = (z_t - M_t) / T, a = e^v, b = e^u and x = u -
v, the log-ratio of b to a, the sums of a row are

    S_s = sum b     S_t = sum a     S_1 = sum e^(z_s - M_s)     U = sum b u     W = sum a v
    E = sum (b - a)     F = sum a phi(x)     R = sum b phi(-x)               phi(x) = e^x - 1 - x >= 0

The last three give KL(p, q) and KL(q, p) in one pass over the vocabulary. With eps = E / S_t, so that S_s = S_t (1 +
eps),

    KL(p, q) = F / S_t - (eps - ln(1 + eps))         KL(q, p) = R / S_s - (eps' - ln(1 + eps')),   eps' = -E / S_s

and neither cancels: no term of F or R is negative, and an error of eps enters by its square. When a tile raises the
maxima by T d_s and T d_t, the sums move to the new shift in the same form, with k = d_t - d_s:

    E <- e^-d_s E + e^-d_t expm1(k) S_t
    F <- e^-d_t (F + expm1(k) E + phi(k) S_t)        R <- the same with d_s, -k, -E, S_s
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from pocl_kernels.parallel import VocabularyGroup
from pocl_kernels.plan import STATE_ROWS
from pocl_kernels.scalar import phi_series, weighted

# Rows of the sums, [SUMS, n]; constexprs, so that the kernels may name them.
MAX_S = tl.constexpr(0)
MAX_T = tl.constexpr(1)
SUM_S = tl.constexpr(2)
SUM_T = tl.constexpr(3)
SUM_1 = tl.constexpr(4)
SUM_U = tl.constexpr(5)
SUM_W = tl.constexpr(6)
SUM_E = tl.constexpr(7)
SUM_F = tl.constexpr(8)
SUM_R = tl.constexpr(9)
LABEL = tl.constexpr(10)  # the label's logit
SUM_Z = tl.constexpr(11)  # the student's logits themselves, where there is no teacher: for label smoothing
TOP = tl.constexpr(12)  # the teacher's logit where the student's is largest: the anchor's, see device.py
SUMS = 13

# Rows of the state, [STATES, n]: the first five of the sums, and
SLOPE_SUM = tl.constexpr(5)
TOP_T = tl.constexpr(6)
STATES = STATE_ROWS

# Rows of the second pass, [2, n].
VALUE = tl.constexpr(0)
SLOPE = tl.constexpr(1)


def empty_sums(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The sums over no entries."""
    sums = torch.zeros(SUMS, rows, dtype=dtype, device=device)
    sums[: SUM_S.value] = sums[TOP.value] = -torch.inf
    return sums


def raise_maxima(sums: Tensor, maxima: Tensor, rate: Any) -> None:
    """Shift the sums, in place, to higher maxima ``[2, n]`` of both models' logits. ``rate`` is 1 / T."""
    old = sums[: SUM_S.value]
    raised = torch.where(old == -torch.inf, 0.0, maxima - old)
    d_s, d_t = raised * rate
    keep_s, keep_t = (-d_s).exp(), (-d_t).exp()
    S_s, S_t, S_1, U, W, E, F, R = sums[SUM_S.value : LABEL.value].clone()
    moved, moved_f, moved_r = ratio_terms(keep_t, keep_s, d_t - d_s)
    shifted = {
        SUM_S: keep_s * S_s,
        SUM_T: keep_t * S_t,
        SUM_1: (-raised[0]).exp() * S_1,
        SUM_U: keep_s * (U - d_s * S_s),
        SUM_W: keep_t * (W - d_t * S_t),
        SUM_E: keep_s * E + moved * S_t,
        SUM_F: keep_t * F + moved * E + moved_f * S_t,
        SUM_R: keep_s * R + moved * E + moved_r * S_s,
    }
    for row, value in shifted.items():
        sums[row.value] = value
    sums[: SUM_S.value] = maxima


def ratio_terms(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``b - a``, ``a phi(x)`` and ``b phi(-x)`` for b = a e^x; the kernels' twin is in ``device.py``."""
    near = x.abs() < 0.5
    forward = phi_series(x)
    rest = torch.where(near, a * (x + forward), b - a)
    f = torch.where(a == 0, b, torch.where(near, a * forward, (b - a) - a * x))
    r = torch.where(b == 0, a, torch.where(near, b * phi_series(-x), (a - b) + b * x))
    return rest, f, r


def over_processes(sums: Tensor, group: VocabularyGroup, rate: Any) -> None:
    """From the sums over this process's share of the vocabulary, in place, those over all of it."""
    maxima = group.maximum(sums[: SUM_S.value].clone())
    own = torch.where(sums[MAX_S.value] == maxima[MAX_S.value], sums[TOP.value], -torch.inf)
    raise_maxima(sums, maxima, rate)
    sums[SUM_S.value : TOP.value] = group.sum(sums[SUM_S.value : TOP.value].contiguous())
    sums[TOP.value] = group.maximum(own)


def state_of(sums: Tensor) -> Tensor:
    """The state that the sums over the whole vocabulary amount to; the sum of the slopes is still 0."""
    state = sums[:STATES].clone()
    state[SLOPE_SUM.value] = 0.0
    state[TOP_T.value] = sums[TOP.value]
    return state


def cross_entropy(sums: Tensor) -> Tensor:
    """Of each row's label, at temperature 1."""
    return (sums[MAX_S.value] - sums[LABEL.value]) + sums[SUM_1.value].log()


def log_sum_exp(sums: Tensor) -> Tensor:
    """Of each row's student, at temperature 1; of sums or of a state."""
    return sums[MAX_S.value] + sums[SUM_1.value].log()


def smoothed_loss(sums: Tensor, smoothing: float, z_loss: float, V: int) -> Tensor:
    """The cross-entropy of each row, the labels smoothed over a vocabulary of V, and ``z_loss lse^2``."""
    spread = sums[LABEL.value] - sums[SUM_Z.value] / V
    loss: Tensor = cross_entropy(sums) + weighted(smoothing, spread) + weighted(z_loss, log_sum_exp(sums) ** 2)
    return loss


def accuracy(sums: Tensor) -> Tensor:
    """1 for each row whose label is a most probable token of the student, else 0."""
    return (sums[LABEL.value] >= sums[MAX_S.value]).to(sums.dtype)


def entropies(sums: Tensor) -> Tensor:
    """Of each row's student and teacher, tempered: ``[2, n]``. Both parts are positive."""
    S = sums[SUM_S.value : SUM_T.value + 1]
    return S.log() - sums[SUM_U.value : SUM_W.value + 1] / S


def anchor(state: Tensor, rate: Any) -> tuple[Tensor, Tensor]:
    """l and r of the student's most probable token, to which slopes are relative; the kernels' twin is in
    ``device.py``.
    """
    l0 = -state[SUM_S.value].log()
    return l0, (state[TOP_T.value] - state[MAX_T.value]) * rate - state[SUM_T.value].log()


def weighted_kl(sums: Tensor, weights: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """``D = a KL(p, q) + b KL(q, p)`` of each row and the sum of the slopes ``b q (l - r) - a p``, ``b KL(q, p) - a``;
    both in double precision, for what is still to be taken from them.
    """
    a, b = weights
    S_s, S_t, E, F, R = (sums[i.value].double() for i in (SUM_S, SUM_T, SUM_E, SUM_F, SUM_R))

    def excess(eps: Tensor) -> Tensor:
        return eps - torch.log1p(eps)

    # A part without weight must not enter: 0 * inf is not 0.
    forward = _times(a, F / S_t - excess(E / S_t))
    reverse = _times(b, R / S_s - excess(-E / S_s))
    return forward + reverse, reverse - a


def slope_at_anchor(sums: Tensor, rate: Any, weights: tuple[Any, Any]) -> Tensor:
    """``b (l - r) - a p / q`` of the anchor, in double precision: what relative slopes of a weighted KL have less than
    those above, for each unit of q.
    """
    a, b = weights
    largest_t, S_s, S_t, E, top_t = (sums[i.value].double() for i in (MAX_T, SUM_S, SUM_T, SUM_E, TOP))
    # Where both models are close S_s / S_t has lost what E, their difference, still knows.
    eps = E / S_t
    d = (largest_t - top_t) * rate - torch.where(eps.abs() < 0.5, eps.log1p(), (S_s / S_t).log())
    return _times(b, d) - _times(a, (-d).exp())


def _times(weight: Any, x: Tensor) -> Tensor:
    return weighted(torch.as_tensor(weight).to(x), x)
