"""One vocabulary tile of both models' projections, merged into each row's sums (``state.py`` says what they are).

Shapes: student, teacher [n, W], W = 16 stride16 >= V, the tile's width; sums [SUMS, n], read and written; labels [n]
count from the vocabulary's start, ``first`` is the tile's. One program a row, every entry read once, no atomics: the
result does not depend on timing. 4 + 4 bytes an entry.

Each block of a row shifts by the maximum so far, so that no exponential overflows; sums are kept lane by lane.
"""

import triton
import triton.language as tl

from pocl_kernels.triton_backend.cost import Cost
from pocl_kernels.triton_backend.device import by_fours, exp, load_logit, load_logits, ratio_terms, row_of, times_log
from pocl_kernels.triton_backend.state import (
    LABEL,
    MAX_S,
    MAX_T,
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
)

BLOCK = 1024  # more live sums than elsewhere: 4 lanes a thread


@triton.jit
def rise(old, new):
    """By how much a maximum rises; 0 from -inf, where nothing has been summed yet."""
    return tl.where(old == -float("inf"), 0.0, new - old)


@triton.jit
def below(z, maximum):
    """``z - maximum``, and -inf while all entries are masked."""
    return z - tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def lanes(pointer, BLOCK: tl.constexpr):
    """A sum so far in the first of BLOCK lanes, the others empty."""
    return tl.where(tl.arange(0, BLOCK) == 0, tl.load(pointer), 0.0)


# Chunks start anywhere in the per-row tensors: their alignment must not decide what is compiled.
@triton.jit(do_not_specialize=["V", "stride16", "n", "first"], do_not_specialize_on_alignment=["labels", "sums"])
def tile_statistics(
    student,
    teacher,  # None: the student alone, for its cross-entropy
    bias_s,
    bias_t,
    labels,  # [n] or None
    sums,
    V,
    stride16,
    n,
    first,
    scale_s,
    softcap_s,
    scale_t,
    softcap_t,
    inv_T,
    KL: tl.constexpr,  # E, F and R as well
    TOP_TOO: tl.constexpr,  # the teacher's logit where the student's is largest as well
    BLOCK: tl.constexpr,
    BY_TOKEN: tl.constexpr = False,  # inv_T, slope_coefficient and uniforms point to one a row
    places=None,  # [3, n] int64: where rows begin, in units of entries; None: stride16 units apart
    UNIT: tl.constexpr = 16,  # 1: rows that are not aligned
):
    row = tl.program_id(0).to(tl.int64)
    step = n.to(tl.int64)
    width = stride16 * UNIT
    student = row_of(student, places, 0, step, row, stride16, UNIT)
    sums += row
    if BY_TOKEN:
        inv_T = tl.load(inv_T + row)
    if labels is not None:
        label = tl.load(labels + row).to(tl.int32) - first
        if (label >= 0) & (label < V):
            tl.store(sums + LABEL * step, load_logit(student, bias_s, label, scale_s, softcap_s))

    m_s = tl.load(sums + MAX_S * step)
    S_s = lanes(sums + SUM_S * step, BLOCK)
    S_1 = lanes(sums + SUM_1 * step, BLOCK // 4)
    U = lanes(sums + (SUM_U if teacher is not None else SUM_Z) * step, BLOCK // 4)  # or the logits' own sum
    m_t = m_s
    S_t = S_s
    W = U
    E = U
    F = U
    R = U
    if teacher is not None:
        teacher = row_of(teacher, places, 1, step, row, stride16, UNIT)
        m_t = tl.load(sums + MAX_T * step)
        S_t = lanes(sums + SUM_T * step, BLOCK)
        W = lanes(sums + SUM_W * step, BLOCK // 4)
    if KL:
        E = lanes(sums + SUM_E * step, BLOCK // 4)
        F = lanes(sums + SUM_F * step, BLOCK // 4)
        R = lanes(sums + SUM_R * step, BLOCK // 4)

    top_s = tl.full([BLOCK], -float("inf"), tl.float32)
    top_t = top_s
    if TOP_TOO:
        here = tl.arange(0, BLOCK) == 0
        top_s = tl.where(here, m_s, top_s)
        top_t = tl.where(here, tl.load(sums + TOP * step), top_t)

    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        zs = load_logits(student, bias_s, cols, V, width, scale_s, softcap_s)
        raw_s = zs
        new_s = tl.maximum(m_s, tl.max(zs, 0))
        raised = rise(m_s, new_s)
        m_s = new_s
        zs = below(zs, m_s)
        d_s = raised * inv_T
        keep_s = exp(-d_s)
        u = zs * inv_T
        b = exp(u)
        if KL:
            zt = load_logits(teacher, bias_t, cols, V, width, scale_t, softcap_t)
            new_t = tl.maximum(m_t, tl.max(zt, 0))
            d_t = rise(m_t, new_t) * inv_T
            m_t = new_t
            keep_t = exp(-d_t)
            v = below(zt, m_t) * inv_T
            a = exp(v)
            moved, moved_f, moved_r = ratio_terms(keep_t, keep_s, d_t - d_s)
            F = keep_t * F + moved * E + moved_f * by_fours(S_t, BLOCK)
            R = keep_s * R + moved * E + moved_r * by_fours(S_s, BLOCK)
            E = keep_s * E + moved * by_fours(S_t, BLOCK)
            rest, f, r = ratio_terms(a, b, u - v)
            E += by_fours(rest, BLOCK)
            F += by_fours(f, BLOCK)
            R += by_fours(r, BLOCK)
            W = keep_t * (W - d_t * by_fours(S_t, BLOCK)) + by_fours(times_log(a, v), BLOCK)
            S_t = keep_t * S_t + a
        elif teacher is not None:
            zt = load_logits(teacher, bias_t, cols, V, width, scale_t, softcap_t)
            new_t = tl.maximum(m_t, tl.max(zt, 0))
            d_t = rise(m_t, new_t) * inv_T
            m_t = new_t
            keep_t = exp(-d_t)
            v = below(zt, m_t) * inv_T
            a = exp(v)
            W = keep_t * (W - d_t * by_fours(S_t, BLOCK)) + by_fours(times_log(a, v), BLOCK)
            S_t = keep_t * S_t + a
        if TOP_TOO:
            top_t = tl.where(raw_s > top_s, zt, top_t)
            top_s = tl.maximum(top_s, raw_s)
        if teacher is not None:
            U = keep_s * (U - d_s * by_fours(S_s, BLOCK)) + by_fours(times_log(b, u), BLOCK)
        else:
            U += by_fours(tl.where(cols < V, raw_s, 0.0), BLOCK)
        S_s = keep_s * S_s + b
        S_1 = exp(-raised) * S_1 + by_fours(exp(zs), BLOCK)

    tl.store(sums + MAX_S * step, m_s)
    tl.store(sums + SUM_S * step, tl.sum(S_s, 0))
    tl.store(sums + SUM_1 * step, tl.sum(S_1, 0))
    tl.store(sums + (SUM_U if teacher is not None else SUM_Z) * step, tl.sum(U, 0))
    if teacher is not None:
        tl.store(sums + MAX_T * step, m_t)
        tl.store(sums + SUM_T * step, tl.sum(S_t, 0))
        tl.store(sums + SUM_W * step, tl.sum(W, 0))
    if TOP_TOO:
        tl.store(sums + TOP * step, tl.max(tl.where(top_s == m_s, top_t, -float("inf")), 0))
    if KL:
        tl.store(sums + SUM_E * step, tl.sum(E, 0))
        tl.store(sums + SUM_F * step, tl.sum(F, 0))
        tl.store(sums + SUM_R * step, tl.sum(R, 0))


def cost(rows: int, width: int, *, teacher: bool, kl: bool, logit_bytes: int = 4) -> Cost:
    """Bytes and flops of one launch: the logits once, the row's sums twice."""
    sums = 4 + (3 if teacher else 0) + (3 if kl else 0)
    moved = rows * width * logit_bytes * (2 if teacher else 1) + rows * (2 * 4 * sums + 8)
    return Cost(moved, rows * width * (14 + (9 if teacher else 0) + (30 if kl else 0)))
