"""One vocabulary tile of the student's projections without a teacher's K tokens, merged into each row's sums.

    M = max z,  sum e^((z - M) / T),  sum e^(z - M),  sum e^u u with u = (z - M) / T        over the tail of the tile

Shapes: student [n, W], W = 16 stride16 >= V, the tile's width; its K tokens are taken out (``sparse_device.py``) and
their logits written to top [n, K]; ids [n, K] and labels [n] count from the vocabulary's start, ``first`` is the
tile's; sums [SUMS, n], read and written. One program a row, no atomics. 4 bytes an entry.
"""

import triton
import triton.language as tl

from pocl_kernels.triton_backend.cost import Cost
from pocl_kernels.triton_backend.device import by_fours, cap, exp, load_logit, times_log
from pocl_kernels.triton_backend.sparse_device import (
    LABEL,
    MAX,
    SUM,
    SUM_1,
    SUM_U,
    SUMS,
    load_tail,
    places_of,
    take_out,
)
from pocl_kernels.triton_backend.tile_statistics import below, lanes, rise

BLOCK = 2048


# Chunks start anywhere in the per-row tensors: their alignment must not decide what is compiled.
@triton.jit(
    do_not_specialize=["V", "stride16", "n", "first", "K"],
    do_not_specialize_on_alignment=["labels", "ids", "top", "sums"],
)
def sparse_statistics(
    student,
    bias,
    ids,
    top,
    labels,  # [n] or None
    sums,
    V,
    stride16,
    n,
    first,
    K,
    scale,
    softcap,
    inv_T,
    BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BY_TOKEN: tl.constexpr = False,  # inv_T points to one a row
):
    row = tl.program_id(0).to(tl.int64)
    step = n.to(tl.int64)
    width = stride16 * 16
    student += row * stride16 * 16
    sums += row
    if BY_TOKEN:
        inv_T = tl.load(inv_T + row)
    if labels is not None:
        label = tl.load(labels + row).to(tl.int32) - first
        if (label >= 0) & (label < V):
            tl.store(sums + LABEL * step, load_logit(student, bias, label, scale, softcap))
    for start in range(0, K, K_BLOCK):
        place, column, inside = places_of(ids, row, start, K, first, V, K_BLOCK)
        z = tl.load(student + column, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            z += tl.load(bias + column, mask=inside, other=0.0)
        tl.store(top + place, cap(z * scale, softcap), mask=inside)
    tl.debug_barrier()  # the label's logit may be one of those that are now taken out
    take_out(student, ids, row, K, first, V, K_BLOCK)

    m = tl.load(sums + MAX * step)
    S = lanes(sums + SUM * step, BLOCK)
    S_1 = lanes(sums + SUM_1 * step, BLOCK // 4)
    U = lanes(sums + SUM_U * step, BLOCK // 4)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _ = load_tail(student, bias, cols, V, width, scale, softcap)
        new = tl.maximum(m, tl.max(z, 0))
        raised = rise(m, new)
        m = new
        z = below(z, m)
        d = raised * inv_T
        keep = exp(-d)
        u = z * inv_T
        e = exp(u)
        U = keep * (U - d * by_fours(S, BLOCK)) + by_fours(times_log(e, u), BLOCK)
        S = keep * S + e
        S_1 = exp(-raised) * S_1 + by_fours(exp(z), BLOCK)
    tl.store(sums + MAX * step, m)
    tl.store(sums + SUM * step, tl.sum(S, 0))
    tl.store(sums + SUM_1 * step, tl.sum(S_1, 0))
    tl.store(sums + SUM_U * step, tl.sum(U, 0))


def cost(rows: int, width: int, K: int, *, logit_bytes: int = 4) -> Cost:
    """Bytes and flops of one launch: the logits once, the row's sums twice, the K tokens read twice and written."""
    moved = rows * (width * logit_bytes + 2 * 4 * SUMS + K * (2 * 8 + 3 * 4))
    return Cost(moved, rows * width * 18)
