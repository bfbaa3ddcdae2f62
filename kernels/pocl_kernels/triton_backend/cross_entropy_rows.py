"""Rows of projections -> the loss on the labels, what it is made of and, if wanted, its gradient.

    loss = CE + smoothing (z[label] - mean z) + z_loss lse^2,   CE = lse - z[label],  lse = log sum e^z
    dloss/dprojection = w ((1 + 2 z_loss lse) softmax(z) - (1 - smoothing) 1[label] - smoothing / V) J

Shapes: logits [n, W], W = 16 stride16 >= V; gradient [n, W], in place or another dtype, or None; labels, row_scale [n];
results [n, 5]: loss, CE, lse, nothing, whether no token is likelier than the label. One program a row; one pass for the
value, a second for the gradient. The mean of the logits is always made, so that a schedule of the smoothing compiles
nothing.
Bytes an entry: 4 a pass, and the gradient's size; see :func:`cost`.
"""

import triton
import triton.language as tl

from pocl_kernels.triton_backend.cost import Cost
from pocl_kernels.triton_backend.device import (
    add_exp,
    by_fours,
    cross_entropy_gradient,
    exp,
    jacobian,
    join_exp,
    load_logit,
    load_logits,
    rounded,
)

BLOCK = 4096  # half the state of two models: 16 entries a thread


# Chunks start anywhere in the per-row tensors: their alignment must not decide what is compiled.
@triton.jit(do_not_specialize=["V", "stride16"], do_not_specialize_on_alignment=["labels", "row_scale", "results"])
def cross_entropy_rows(
    logits,
    gradient,
    bias,
    labels,
    row_scale,
    results,
    V,
    stride16,
    scale,
    softcap,
    smoothing,
    z_loss,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    width = stride16 * 16
    logits += row * stride16 * 16
    label = tl.load(labels + row).to(tl.int32)
    z_label = load_logit(logits, bias, label, scale, softcap)  # before a faster warp may overwrite it

    lane_max = tl.full([BLOCK], -float("inf"), tl.float32)
    S = tl.zeros([BLOCK], tl.float32)
    Z = tl.zeros([BLOCK // 4], tl.float32)  # from the label's logit: a common offset of the logits costs no digits
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = load_logits(logits, bias, cols, V, width, scale, softcap)
        Z += by_fours(tl.where(cols < V, z_label - z, 0.0), BLOCK)
        S = add_exp(lane_max, S, z, 1.0)
        lane_max = tl.maximum(lane_max, z)
    max_z, S = join_exp(lane_max, S, 1.0)
    log_sum = tl.log(S)
    ce = (max_z - z_label) + log_sum
    lse = max_z + log_sum
    # What has no weight must not enter: 0 * inf is not 0.
    loss = ce + tl.where(smoothing == 0.0, 0.0, smoothing * (tl.sum(Z, 0) / V))
    tl.store(results + row * 5, loss + tl.where(z_loss == 0.0, 0.0, z_loss * lse * lse))
    tl.store(results + row * 5 + 1, ce)
    tl.store(results + row * 5 + 2, lse)
    tl.store(results + row * 5 + 4, tl.where(z_label >= max_z, 1.0, 0.0))

    if gradient is not None:
        w = tl.load(row_scale + row).to(tl.float32)
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = load_logits(logits, bias, cols, V, width, scale, softcap)
            q = exp(z - max_z) * (1.0 / S)
            g = cross_entropy_gradient(q, lse, cols == label, smoothing, smoothing / V, z_loss)
            g = rounded(tl.where(cols < V, w * jacobian(z, scale, softcap) * g, 0.0), gradient)
            tl.store(gradient + row * stride16 * 16 + cols, g, mask=cols < width)


def cost(rows: int, V: int, *, gradient_bytes: int | None, logit_bytes: int = 4) -> Cost:
    """Bytes and flops of one launch; ``gradient_bytes`` of one entry, None without a gradient."""
    passes = 1 if gradient_bytes is None else 2
    moved = rows * V * (passes * logit_bytes + (gradient_bytes or 0)) + rows * (4 * 4 + 4 + 8)
    return Cost(moved, rows * V * (8 + (5 if gradient_bytes is not None else 0)))
