"""Rows of student and teacher projections -> divergence, cross-entropy, entropies, accuracy, and the gradient.

    u = z_s / T, v = z_t / T;  l = u - lse(u), r = v - lse(v);  D = sum value(l, r), c = sum slope(l, r)
    dL/dz_s = w [A (slope - q c) + B (softmax(z_s) - 1[label])] J,   A = slope_coefficient, B = ce_weight,  J =
    dz_s/dprojection

Shapes: student, teacher [n, W], W = 16 stride16 >= V; gradient [n, W], in place of the student's rows or another dtype;
labels, row_scale [n]; results [n, 5]: D, cross-entropy, the student's entropy, the teacher's, whether no token is
likelier than the label. One program a row, sums kept lane by lane in float32.

Three passes over a row: (1) both normalisers, and the student's at temperature 1 for the cross-entropy; (2) D, c and
the entropies; (3) the gradient. Where c is known beforehand (``SLOPE_SUM``; the forward KL's is -1) pass 3 is part of
pass 2. Pass 2 goes backwards, as pass 1 left the end of the row in the GPU's cache and pass 2 leaves the beginning.
Bytes an entry: 4 + 4 a pass, and the gradient's size; see :func:`cost`.
"""

import triton
import triton.language as tl

from pocl_kernels.triton_backend.cost import Cost
from pocl_kernels.triton_backend.device import (
    add_exp,
    anchor,
    by_fours,
    exp,
    join_exp,
    load_logit,
    load_logits,
    log_probabilities,
    projection_gradient,
    rounded,
    times_log,
)

BLOCK = 2048


# Chunks start anywhere in the per-row tensors: their alignment must not decide what is compiled.
@triton.jit(do_not_specialize=["V", "stride16"], do_not_specialize_on_alignment=["labels", "row_scale", "results"])
def divergence_rows(
    student,
    teacher,
    gradient,  # None: no gradient
    bias_s,  # [W] float32 or None
    bias_t,
    labels,  # [n] or None: no cross-entropy
    row_scale,
    results,
    V,
    stride16,
    scale_s,
    softcap_s,  # None: none
    scale_t,
    softcap_t,
    inv_T,
    slope_coefficient,
    ce_weight,
    uniforms,
    term: tl.constexpr,
    SLOPE_SUM: tl.constexpr,  # None: not known beforehand
    BLOCK: tl.constexpr,
    BY_TOKEN: tl.constexpr = False,  # inv_T, slope_coefficient and uniforms point to one a row
):
    row = tl.program_id(0).to(tl.int64)
    width = stride16 * 16
    student += row * stride16 * 16
    teacher += row * stride16 * 16
    w = tl.load(row_scale + row).to(tl.float32)
    if BY_TOKEN:
        inv_T = tl.load(inv_T + row)
        slope_coefficient = tl.load(slope_coefficient + row)

    # Pass 1: normalisers.
    m_s = tl.full([BLOCK], -float("inf"), tl.float32)
    m_t = tl.full([BLOCK], -float("inf"), tl.float32)
    S_s = tl.zeros([BLOCK], tl.float32)
    S_t = tl.zeros([BLOCK], tl.float32)
    S_1 = tl.zeros([BLOCK], tl.float32)
    z_t = tl.full([BLOCK], -float("inf"), tl.float32)  # the teacher's logit where the student's is largest
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        zs = load_logits(student, bias_s, cols, V, width, scale_s, softcap_s)
        zt = load_logits(teacher, bias_t, cols, V, width, scale_t, softcap_t)
        S_s = add_exp(m_s, S_s, zs, inv_T)
        S_t = add_exp(m_t, S_t, zt, inv_T)
        if labels is not None:
            S_1 = add_exp(m_s, S_1, zs, 1.0)
        if SLOPE_SUM is None and gradient is not None:
            z_t = tl.where(zs > m_s, zt, z_t)
        m_s = tl.maximum(m_s, zs)
        m_t = tl.maximum(m_t, zt)
    # The label's logit is read before the sums are joined, where all warps wait for each other: soon after, a faster
    # one may overwrite it with its gradient.
    label = 0
    z_label = 0.0
    if labels is not None:
        label = tl.load(labels + row).to(tl.int32)
        z_label = load_logit(student, bias_s, label, scale_s, softcap_s)
    max_s, S_s = join_exp(m_s, S_s, inv_T)
    max_t, S_t = join_exp(m_t, S_t, inv_T)
    log_s = tl.log(S_s)
    log_t = tl.log(S_t)
    shift, l0, r0, d0 = anchor(max_s, max_t, log_s, log_t, tl.max(tl.where(m_s == max_s, z_t, -float("inf")), 0), inv_T)
    S_1 = join_exp(m_s, S_1, 1.0)[1]
    tl.store(results + row * 5 + 1, (max_s - z_label) + tl.log(S_1) if labels is not None else 0.0)
    tl.store(results + row * 5 + 4, tl.where(z_label >= max_s, 1.0, 0.0) if labels is not None else 0.0)

    # Pass 2: D, c and the entropy; the gradient too where it need not wait for c.
    D = tl.zeros([BLOCK], tl.float32)
    C = tl.zeros([BLOCK], tl.float32)
    H_s = tl.zeros([BLOCK // 4], tl.float32)
    H_t = tl.zeros([BLOCK // 4], tl.float32)
    last = tl.cdiv(width, BLOCK) - 1
    for block in range(0, last + 1):
        cols = (last - block) * BLOCK + tl.arange(0, BLOCK)
        inside = cols < V
        zs = load_logits(student, bias_s, cols, V, width, scale_s, softcap_s)
        zt = load_logits(teacher, bias_t, cols, V, width, scale_t, softcap_t)
        l, q = log_probabilities(zs, max_s, S_s, log_s, inv_T)
        r, p = log_probabilities(zt, max_t, S_t, log_t, inv_T)
        value, slope = term(l, r, q, p, (zs - zt) * inv_T - shift, l0, r0, d0, uniforms, row)
        D += tl.where(inside, value, 0.0)
        H_s -= by_fours(times_log(q, l), BLOCK)
        H_t -= by_fours(times_log(p, r), BLOCK)
        if SLOPE_SUM is None:
            C += tl.where(inside, slope, 0.0)
        elif gradient is not None:
            q_1 = exp(zs - max_s) * (1.0 / S_1) if labels is not None else None
            g = projection_gradient(
                zs, q, slope, SLOPE_SUM, slope_coefficient, q_1, ce_weight, cols == label, w, scale_s, softcap_s
            )
            g = rounded(tl.where(inside, g, 0.0), gradient)
            tl.store(gradient + row * stride16 * 16 + cols, g, mask=cols < width)
    tl.store(results + row * 5, tl.sum(D, 0))
    tl.store(results + row * 5 + 2, tl.sum(H_s, 0))
    tl.store(results + row * 5 + 3, tl.sum(H_t, 0))

    # Pass 3: the gradient.
    if gradient is not None and SLOPE_SUM is None:
        c = tl.sum(C, 0)
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            zs = load_logits(student, bias_s, cols, V, width, scale_s, softcap_s)
            zt = load_logits(teacher, bias_t, cols, V, width, scale_t, softcap_t)
            l, q = log_probabilities(zs, max_s, S_s, log_s, inv_T)
            r, p = log_probabilities(zt, max_t, S_t, log_t, inv_T)
            slope = term(l, r, q, p, (zs - zt) * inv_T - shift, l0, r0, d0, uniforms, row)[1]
            q_1 = exp(zs - max_s) * (1.0 / S_1) if labels is not None else None
            g = projection_gradient(
                zs, q, slope, c, slope_coefficient, q_1, ce_weight, cols == label, w, scale_s, softcap_s
            )
            g = rounded(tl.where(cols < V, g, 0.0), gradient)
            tl.store(gradient + row * stride16 * 16 + cols, g, mask=cols < width)


def cost(
    rows: int, V: int, *, labels: bool, slope_sum_known: bool, gradient_bytes: int | None, logit_bytes: int = 4
) -> Cost:
    """Bytes and flops of one launch. ``gradient_bytes``: of one entry, None without a gradient.

    Bytes: both logits a pass, the gradient once, five results, the weight and the label a row; passes beyond the first
    find part of a row in the cache, so this is an upper bound. Flops are the exponentials and the multiply-adds of the
    normalisers, entropies and gradient; the definition's own arithmetic comes on top.
    """
    passes = 2 if slope_sum_known or gradient_bytes is None else 3
    moved = rows * V * (passes * 2 * logit_bytes + (gradient_bytes or 0)) + rows * (5 * 4 + 4 + (8 if labels else 0))
    an_entry = 2 * 6 + 10 + (6 if labels else 0)
    if gradient_bytes is not None:
        an_entry += (4 if slope_sum_known else 8) + (4 if labels else 0)
    return Cost(moved, rows * V * an_entry)
