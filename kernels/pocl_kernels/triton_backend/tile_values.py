"""One vocabulary tile's share of each row's divergence and slope sum, once both normalisers are known.

    l = (z_s - M_s) / T - log S_s, r likewise;   D += sum value(l, r),  c += sum slope(l, r)

The second pass of the low-memory mode, for divergences that are not weighted KLs: a mixture of p and q needs both
normalisers. Shapes as in ``tile_statistics.py``; state [STATES, n]; sums [2, n], read and written. 4 + 4 bytes an
entry.
"""

import triton
import triton.language as tl

from pocl_kernels.triton_backend.cost import Cost
from pocl_kernels.triton_backend.device import anchor, load_logits, log_probabilities, row_of
from pocl_kernels.triton_backend.state import MAX_S, MAX_T, SLOPE, SUM_S, SUM_T, TOP_T, VALUE

BLOCK = 2048


# Chunks start anywhere in the per-row tensors: their alignment must not decide what is compiled.
@triton.jit(do_not_specialize=["V", "stride16", "n"], do_not_specialize_on_alignment=["state", "sums"])
def tile_values(
    student,
    teacher,
    bias_s,
    bias_t,
    state,
    sums,
    V,
    stride16,
    n,
    scale_s,
    softcap_s,
    scale_t,
    softcap_t,
    inv_T,
    uniforms,
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
    teacher = row_of(teacher, places, 1, step, row, stride16, UNIT)
    state += row
    sums += row
    if BY_TOKEN:
        inv_T = tl.load(inv_T + row)
    max_s = tl.load(state + MAX_S * step)
    max_t = tl.load(state + MAX_T * step)
    S_s = tl.load(state + SUM_S * step)
    S_t = tl.load(state + SUM_T * step)
    log_s = tl.log(S_s)
    log_t = tl.log(S_t)
    z_t = tl.load(state + TOP_T * step)
    shift, l0, r0, d0 = anchor(max_s, max_t, log_s, log_t, z_t, inv_T)
    D = tl.zeros([BLOCK], tl.float32)
    C = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        zs = load_logits(student, bias_s, cols, V, width, scale_s, softcap_s)
        zt = load_logits(teacher, bias_t, cols, V, width, scale_t, softcap_t)
        l, q = log_probabilities(zs, max_s, S_s, log_s, inv_T)
        r, p = log_probabilities(zt, max_t, S_t, log_t, inv_T)
        value, slope = term(l, r, q, p, (zs - zt) * inv_T - shift, l0, r0, d0, uniforms, row)
        D += tl.where(cols < V, value, 0.0)
        C += tl.where(cols < V, slope, 0.0)
    tl.store(sums + VALUE * step, tl.load(sums + VALUE * step) + tl.sum(D, 0))
    tl.store(sums + SLOPE * step, tl.load(sums + SLOPE * step) + tl.sum(C, 0))


def cost(rows: int, width: int, *, logit_bytes: int = 4) -> Cost:
    """Bytes and flops of one launch; the definition's own arithmetic comes on top."""
    return Cost(rows * (width * 2 * logit_bytes + 5 * 4 + 2 * 2 * 4), rows * width * 10)
