"""The gradient of one vocabulary tile's projections from a sparse teacher, by each row's state.

    dL/dz_j = w J [t e^((z_j - M) / T) + b e^(z_j - M) - B 1[label]]     a token of the tail, t and b the row's
    dL/dz_k = w g_k                                                      one of the K tokens, g [n, K]

Without a shared slope the first term is ``A (slope - q c)``. Shapes as in ``sparse_statistics.py``; state [STATES, n];
gradient [n, W], in place of the tile or another dtype; g has the Jacobian J in it. 4 bytes an entry read, and the
gradient's size written: a cross-entropy's traffic.
"""

import triton
import triton.language as tl

from pocl_kernels.triton_backend.cost import Cost
from pocl_kernels.triton_backend.device import exp, jacobian, load_logits, rounded
from pocl_kernels.triton_backend.sparse_device import BY_LABEL, D0, L0, MAX, R0, SLOPES, TAIL, places_of
from pocl_kernels.triton_backend.sparse_values import tail_entry
from pocl_kernels.triton_backend.tile_statistics import below

BLOCK = 2048


# Chunks start anywhere in the per-row tensors: their alignment must not decide what is compiled.
@triton.jit(
    do_not_specialize=["V", "stride16", "n", "first", "K"],
    do_not_specialize_on_alignment=["labels", "row_scale", "ids", "top", "state"],
)
def sparse_gradient(
    student,
    gradient,
    bias,
    ids,
    top,  # [n, K] gradients by the projections of the K tokens, for a weight of 1
    labels,  # [n] or None
    row_scale,
    state,
    V,
    stride16,
    n,
    first,
    K,
    scale,
    softcap,
    inv_T,
    slope_coefficient,
    ce_weight,
    uniforms,
    term: tl.constexpr,  # None: the tail shares one slope
    BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BY_TOKEN: tl.constexpr = False,  # inv_T, slope_coefficient and uniforms point to one a row
):
    row = tl.program_id(0).to(tl.int64)
    step = n.to(tl.int64)
    width = stride16 * 16
    student += row * stride16 * 16
    gradient += row * stride16 * 16
    state += row
    w = tl.load(row_scale + row).to(tl.float32)
    if BY_TOKEN:
        inv_T = tl.load(inv_T + row)
        slope_coefficient = tl.load(slope_coefficient + row)
    m = tl.load(state + MAX * step)
    label = -1
    by_label = 0.0
    if labels is not None:
        label = tl.load(labels + row).to(tl.int32) - first
        by_label = tl.load(state + BY_LABEL * step)
    tail = 0.0
    l0 = 0.0
    r0 = 0.0
    d0 = 0.0
    c = 0.0
    if term is None:
        tail = tl.load(state + TAIL * step)
    else:
        l0 = tl.load(state + L0 * step)
        r0 = tl.load(state + R0 * step)
        d0 = tl.load(state + D0 * step)
        c = tl.load(state + SLOPES * step)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        # What this makes of the K tokens is written over below.
        z = load_logits(student, bias, cols, V, width, scale, softcap)
        if term is None:
            g = tail * exp(below(z, m) * inv_T)
        else:
            l, r, q, p, d = tail_entry(z, m, inv_T, state, step)
            slope = term(l, r, q, p, d, l0, r0, d0, uniforms, row)[1]
            g = tl.where(slope_coefficient == 0.0, 0.0, slope_coefficient * (slope - q * c))
        if labels is not None:
            g += by_label * exp(below(z, m)) - tl.where(cols == label, ce_weight, 0.0)
        g = tl.where(w == 0.0, 0.0, w * jacobian(z, scale, softcap) * g)
        tl.store(gradient + cols, rounded(tl.where(cols < V, g, 0.0), gradient), mask=cols < width)
    tl.debug_barrier()
    for start in range(0, K, K_BLOCK):
        place, column, inside = places_of(ids, row, start, K, first, V, K_BLOCK)
        g = tl.load(top + place, mask=inside, other=0.0)
        tl.store(gradient + column, rounded(tl.where(w == 0.0, 0.0, w * g), gradient), mask=inside)


def cost(rows: int, width: int, K: int, *, labels: bool, gradient_bytes: int, logit_bytes: int = 4) -> Cost:
    """Bytes and flops of one launch; the definition's own arithmetic comes on top."""
    moved = rows * (width * (logit_bytes + gradient_bytes) + K * (8 + 4 + gradient_bytes) + 4 + 4 * 3)
    return Cost(moved + (8 * rows if labels else 0), rows * width * (5 + (4 if labels else 0)))
