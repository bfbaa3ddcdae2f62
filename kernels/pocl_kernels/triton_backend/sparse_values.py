"""One vocabulary tile's share of the divergence and of the slopes over a sparse teacher's tail, where every token of it
has a slope of its own: the teacher gives all of them the same probability.

    l = (z - M) / T + l_top;   D += sum value(l, r),  c += sum slope(l, r)          r is one number a row

Shapes as in ``sparse_statistics.py``; state [STATES, n]; sums [2, n], read and written. 4 bytes an entry.
"""

import triton
import triton.language as tl

from pocl_kernels.triton_backend.cost import Cost
from pocl_kernels.triton_backend.device import exp
from pocl_kernels.triton_backend.sparse_device import D0, L0, L_TOP, MAX, Q_TOP, R0, P, R, load_tail, take_out
from pocl_kernels.triton_backend.state import SLOPE, VALUE
from pocl_kernels.triton_backend.tile_statistics import below

BLOCK = 2048


@triton.jit
def tail_entry(z, m, inv_T, state, step):
    """l, r, q, p and l - r of entries of the tail."""
    u = below(z, m) * inv_T
    l = u + tl.load(state + L_TOP * step)
    r = tl.load(state + R * step)
    return l, r, exp(u) * tl.load(state + Q_TOP * step), tl.load(state + P * step), l - r


# Chunks start anywhere in the per-row tensors: their alignment must not decide what is compiled.
@triton.jit(
    do_not_specialize=["V", "stride16", "n", "first", "K"],
    do_not_specialize_on_alignment=["ids", "state", "sums"],
)
def sparse_values(
    student,
    bias,
    ids,
    state,
    sums,
    V,
    stride16,
    n,
    first,
    K,
    scale,
    softcap,
    inv_T,
    uniforms,
    term: tl.constexpr,
    BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BY_TOKEN: tl.constexpr = False,  # inv_T and uniforms point to one a row
):
    row = tl.program_id(0).to(tl.int64)
    step = n.to(tl.int64)
    width = stride16 * 16
    student += row * stride16 * 16
    state += row
    sums += row
    if BY_TOKEN:
        inv_T = tl.load(inv_T + row)
    take_out(student, ids, row, K, first, V, K_BLOCK)
    m = tl.load(state + MAX * step)
    l0 = tl.load(state + L0 * step)
    r0 = tl.load(state + R0 * step)
    d0 = tl.load(state + D0 * step)
    D = tl.zeros([BLOCK], tl.float32)
    C = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, taken = load_tail(student, bias, cols, V, width, scale, softcap)
        l, r, q, p, d = tail_entry(z, m, inv_T, state, step)
        value, slope = term(l, r, q, p, d, l0, r0, d0, uniforms, row)
        D += tl.where(taken, 0.0, value)
        C += tl.where(taken, 0.0, slope)
    tl.store(sums + VALUE * step, tl.load(sums + VALUE * step) + tl.sum(D, 0))
    tl.store(sums + SLOPE * step, tl.load(sums + SLOPE * step) + tl.sum(C, 0))


def cost(rows: int, width: int, K: int, *, logit_bytes: int = 4) -> Cost:
    """Bytes and flops of one launch; the definition's own arithmetic comes on top."""
    return Cost(rows * (width * logit_bytes + 8 * 4 + 2 * 2 * 4 + K * (8 + 4)), rows * width * 7)
