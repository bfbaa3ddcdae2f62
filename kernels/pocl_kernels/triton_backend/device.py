"""Functions that the kernels share: the head's transform, and log-sum-exps that need one exponential an entry.

Only exp, log and arithmetic: nothing that needs a vendor's library. -inf is a legal logit (a masked token); NaN
propagates. Buffers have rows of ``16 * stride16`` entries, V of them meaningful: the factor tells the compiler that
rows stay aligned to 16 entries and that a load up to the row's end may be 128 bits wide, whatever V is.
"""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x by the hardware's power of two; results below 2^-126 may be flushed to 0."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x):
    """Polynomial near 0 (Cephes), by an exponential elsewhere; about 2 ulp."""
    a = tl.abs(x)
    y = x * x
    p = ((((-5.70498872745e-3 * y + 2.06390887954e-2) * y - 5.37397155531e-2) * y) + 1.33314422036e-1) * y
    near = (p - 3.33332819422e-1) * y * x + x
    far = 1.0 - 2.0 / (exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def cap(z, softcap):
    """Gemma's soft cap; ``softcap`` None: none. z - z is NaN where z is infinite: a broken logit stays broken."""
    if softcap is not None:
        z = softcap * tanh(z / softcap) + (z - z)
    return z


@triton.jit
def row_of(x, places, which, n, row, stride, UNIT: tl.constexpr):
    """Where a row of ``x`` begins: ``stride`` units apart, or where ``places`` ``[3, n]`` says (``logits.py``)."""
    if places is None:
        return x + row * stride * UNIT
    else:
        return x + tl.load(places + which * n + row) * UNIT


@triton.jit
def load_logits(row, bias, cols, V, width, scale, softcap):
    """Entries ``cols`` of one row of projections, after the head's transform; -inf beyond V."""
    z = tl.load(row + cols, mask=cols < width, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + cols, mask=cols < width, other=0.0)
    return tl.where(cols < V, cap(z * scale, softcap), -float("inf"))


@triton.jit
def load_logit(row, bias, col, scale, softcap):
    """One entry of one row, after the head's transform."""
    z = tl.load(row + col).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + col)
    return cap(z * scale, softcap)


@triton.jit
def jacobian(z, scale, softcap):
    """Derivative of the transformed logit ``z`` with respect to the projection."""
    if softcap is not None:
        t = z / softcap
        return scale * (1.0 - t * t)
    else:
        return scale


@triton.jit
def phi_series(x):
    """phi(x) and phi(-x), phi(x) = e^x - 1 - x, for |x| < 1/2: cosh(x) - 1 plus and minus sinh(x) - x."""
    y = x * x
    even = y * (0.5 + y * (1.0 / 24.0 + y * (1.0 / 720.0 + y * (1.0 / 40320.0))))
    odd = x * y * (1.0 / 6.0 + y * (1.0 / 120.0 + y * (1.0 / 5040.0)))
    return even + odd, even - odd


@triton.jit
def ratio_terms(a, b, x):
    """``b - a``, ``a phi(x)`` and ``b phi(-x)`` for b = a e^x: none cancels near x = 0, none overflows far from it."""
    forward, backward = phi_series(x)
    near = tl.abs(x) < 0.5
    rest = tl.where(near, a * (x + forward), b - a)
    f = tl.where(a == 0.0, b, tl.where(near, a * forward, (b - a) - a * x))
    r = tl.where(b == 0.0, a, tl.where(near, b * backward, (a - b) + b * x))
    return rest, f, r


@triton.jit
def times_log(p, log_p):
    """``p log_p``, p in proportion to e^log_p: 0 where that is -inf."""
    return p * tl.maximum(log_p, -1e30)


@triton.jit
def by_fours(x, BLOCK: tl.constexpr):
    """Sums of four neighbours, which are one thread's own: a running sum of them takes a quarter of its registers."""
    return tl.sum(tl.reshape(x, [BLOCK // 4, 4]), 1)


@triton.jit
def add_exp(m, S, z, rate):
    """Lane by lane: maximum and ``sum exp(rate (z - maximum))`` with one more entry, by one exponential."""
    d = z - m
    e = tl.where(z == m, 1.0, exp(-tl.abs(d) * rate))  # equal: also where both are -inf
    return tl.where(d > 0.0, S * e + 1.0, S + e)


@triton.jit
def join_exp(m, S, rate):
    """The lanes' sums as one: the common maximum, and the sum above it."""
    m_all = tl.max(m, 0)
    return m_all, tl.sum(S * exp((m - m_all) * rate), 0)


@triton.jit
def rounded(g, gradient, CUT: tl.constexpr = True):
    """``g`` in the dtype of the tile. What float16 cannot hold is cut at its end; infinite and NaN stay. With ``CUT``
    false it is infinite, as a loss scaler expects of a final gradient.
    """
    if CUT and gradient.dtype.element_ty == tl.float16:
        cut = tl.minimum(tl.maximum(g, -65504.0), 65504.0)
        g = tl.where(tl.abs(g) < float("inf"), cut, g)
    return g.to(gradient.dtype.element_ty)


@triton.jit
def log_probabilities(z, maximum, S, log_S, inv_T):
    """Log-probabilities and probabilities. The latter by the sum: to round its log moves all of a row's one way."""
    u = (z - maximum) * inv_T
    return u - log_S, exp(u) * (1.0 / S)


@triton.jit
def anchor(max_s, max_t, log_s, log_t, z_t, inv_T):
    """``shift`` for ``l - r = (z_s - z_t) / T - shift``, exact where both models are close; and l, r and l - r of the
    anchor: the student's most probable token, to which the teacher gives the logit ``z_t``. Slopes are relative to it.
    """
    shift = (max_s - max_t) * inv_T - (log_t - log_s)
    return shift, -log_s, (z_t - max_t) * inv_T - log_t, (max_s - z_t) * inv_T - shift


@triton.jit
def projection_gradient(z, q, slope, c, slope_coefficient, q_1, ce_weight, is_label, w, scale, softcap):
    """``w J [A (slope - q c) + B (q_1 - 1[label])]``; ``q_1``: at temperature 1, or None."""
    # Without weight an infinite slope is nothing, nor is a row.
    g = tl.where(slope_coefficient == 0.0, 0.0, slope_coefficient * (slope - q * c))
    if q_1 is not None:
        g += ce_weight * (q_1 - tl.where(is_label, 1.0, 0.0))
    return tl.where(w == 0.0, 0.0, w * jacobian(z, scale, softcap) * g)


@triton.jit
def cross_entropy_gradient(q, lse, is_label, smoothing, share, z_loss):
    """``(1 + 2 z_loss lse) q - (1 - smoothing) 1[label] - share``, share = smoothing / V of the whole vocabulary."""
    rise = tl.where(z_loss == 0.0, 1.0, 1.0 + 2.0 * z_loss * lse)
    return rise * q - tl.where(is_label, 1.0 - smoothing, 0.0) - share
