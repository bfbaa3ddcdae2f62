"""The gradient of one vocabulary tile's projections, from logits made anew and each row's state.

    dL/dz_s = w [A (slope - q c) + B (softmax(z_s) - 1[label])] J        (``divergence_rows.py`` has the symbols)

Shapes as in ``tile_statistics.py``; state [STATES, n]; gradient [n, W], in place of the student's tile or another
dtype. Without a teacher it is the cross-entropy's alone. 4 + 4 bytes an entry read, and the gradient's size written.
"""

import triton
import triton.language as tl

from pocl_kernels.triton_backend.cost import Cost
from pocl_kernels.triton_backend.device import (
    anchor,
    cross_entropy_gradient,
    exp,
    jacobian,
    load_logits,
    log_probabilities,
    projection_gradient,
    rounded,
    row_of,
)
from pocl_kernels.triton_backend.state import MAX_S, MAX_T, SLOPE_SUM, SUM_1, SUM_S, SUM_T, TOP_T

BLOCK = 2048


# Chunks start anywhere in the per-row tensors: their alignment must not decide what is compiled.
@triton.jit(
    do_not_specialize=["V", "stride16", "n", "first"], do_not_specialize_on_alignment=["labels", "row_scale", "state"]
)
def tile_gradient(
    student,
    teacher,  # None: cross-entropy alone
    gradient,
    bias_s,
    bias_t,
    labels,  # [n] or None
    row_scale,
    state,
    V,
    stride16,
    n,
    first,
    scale_s,
    softcap_s,
    scale_t,
    softcap_t,
    inv_T,
    slope_coefficient,
    ce_weight,
    uniforms,
    smoothing,  # of the cross-entropy alone; so are the next
    share,  # smoothing / V of the whole vocabulary
    z_loss,
    term: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_TOKEN: tl.constexpr = False,  # inv_T, slope_coefficient and uniforms point to one a row
    places=None,  # [3, n] int64: where rows begin, in units of entries; None: stride16 units apart
    UNIT: tl.constexpr = 16,  # 1: rows that are not aligned
):
    row = tl.program_id(0).to(tl.int64)
    step = n.to(tl.int64)
    width = stride16 * UNIT
    student = row_of(student, places, 0, step, row, stride16, UNIT)
    gradient = row_of(gradient, places, 2, step, row, stride16, UNIT)
    state += row
    w = tl.load(row_scale + row).to(tl.float32)
    if BY_TOKEN:
        inv_T = tl.load(inv_T + row)
        slope_coefficient = tl.load(slope_coefficient + row)
    max_s = tl.load(state + MAX_S * step)
    S_1 = tl.load(state + SUM_1 * step)
    label = -1
    if labels is not None:
        label = tl.load(labels + row).to(tl.int32) - first
    max_t = 0.0
    S_s = 1.0
    S_t = 1.0
    c = 0.0
    z_t = 0.0
    if teacher is not None:
        teacher = row_of(teacher, places, 1, step, row, stride16, UNIT)
        S_s = tl.load(state + SUM_S * step)
        S_t = tl.load(state + SUM_T * step)
        max_t = tl.load(state + MAX_T * step)
        c = tl.load(state + SLOPE_SUM * step)
        z_t = tl.load(state + TOP_T * step)
    log_s = tl.log(S_s)
    log_t = tl.log(S_t)
    shift, l0, r0, d0 = anchor(max_s, max_t, log_s, log_t, z_t, inv_T)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        zs = load_logits(student, bias_s, cols, V, width, scale_s, softcap_s)
        if teacher is None:
            q_1 = exp(zs - max_s) * (1.0 / S_1)
            g = cross_entropy_gradient(q_1, max_s + tl.log(S_1), cols == label, smoothing, share, z_loss)
            g = w * jacobian(zs, scale_s, softcap_s) * g
        else:
            zt = load_logits(teacher, bias_t, cols, V, width, scale_t, softcap_t)
            l, q = log_probabilities(zs, max_s, S_s, log_s, inv_T)
            r, p = log_probabilities(zt, max_t, S_t, log_t, inv_T)
            slope = term(l, r, q, p, (zs - zt) * inv_T - shift, l0, r0, d0, uniforms, row)[1]
            q_1 = exp(zs - max_s) * (1.0 / S_1) if labels is not None else None
            g = projection_gradient(
                zs, q, slope, c, slope_coefficient, q_1, ce_weight, cols == label, w, scale_s, softcap_s
            )
        g = rounded(tl.where(cols < V, g, 0.0), gradient, places is None)
        tl.store(gradient + cols, g, mask=cols < width)


def cost(rows: int, width: int, *, teacher: bool, labels: bool, gradient_bytes: int, logit_bytes: int = 4) -> Cost:
    """Bytes and flops of one launch; the definition's own arithmetic comes on top."""
    moved = rows * (width * (logit_bytes * (2 if teacher else 1) + gradient_bytes) + 4 + 4 * (7 if teacher else 2))
    flops = rows * width * ((12 if teacher else 2) + (4 if labels else 0))
    return Cost(moved + (8 * rows if labels else 0), flops)
