"""What the kernels of sparse teachers share: the K tokens of a row, taken out of its logits, and what is kept of a row.

A token that is taken out leaves :data:`TAKEN` in the buffer of projections, a number that no product gives: not -inf,
which a softcap would make NaN and a masked token may have.
"""

import triton
import triton.language as tl

from pocl_kernels.plan import SPARSE_STATES
from pocl_kernels.triton_backend.device import cap

TAKEN = tl.constexpr(-3.3e38)
K_BLOCK = 256  # of the K tokens at a time: one a thread

# Rows of the sums over the tail, [SUMS, n], read and written tile by tile.
MAX = tl.constexpr(0)
SUM = tl.constexpr(1)  # e^((z - max) / T)
SUM_1 = tl.constexpr(2)  # e^(z - max)
SUM_U = tl.constexpr(3)  # e^u u, u = (z - max) / T
LABEL = tl.constexpr(4)  # the label's logit
SUMS = 5

# Rows of the state, [STATES, n]: the tail's maximum, and what its gradient is made of.
TAIL = tl.constexpr(1)  # factor of e^((z - max) / T), where the tail shares one slope
BY_LABEL = tl.constexpr(2)  # factor of e^(z - max)
L_TOP = tl.constexpr(
    3
)  # log-probability of the tail's likeliest token; this and all below where slopes are each token's own
Q_TOP = tl.constexpr(4)  # its probability
R = tl.constexpr(5)  # the teacher's log-probability of any token of the tail
P = tl.constexpr(6)  # and the probability: to round its log moves all of the tail one way
L0 = tl.constexpr(7)  # l, r and l - r of the anchor
R0 = tl.constexpr(8)
D0 = tl.constexpr(9)
SLOPES = tl.constexpr(10)  # their sum
STATES = SPARSE_STATES


@triton.jit
def load_tail(row, bias, cols, V, width, scale, softcap):
    """As ``load_logits``; -inf for tokens that are taken out too, and which these are."""
    z = tl.load(row + cols, mask=cols < width, other=0.0).to(tl.float32)
    taken = (z == TAKEN) | (cols >= V)
    if bias is not None:
        z += tl.load(bias + cols, mask=cols < width, other=0.0)
    return tl.where(taken, -float("inf"), cap(z * scale, softcap)), taken


@triton.jit
def places_of(ids, row, start, K, first, V, K_BLOCK: tl.constexpr):
    """Places of some of a row's K tokens among ``ids`` ``[n, K]``, their columns in the tile, and which lie in it."""
    k = start + tl.arange(0, K_BLOCK)
    place = row * K + k
    column = tl.load(ids + place, mask=k < K, other=-1).to(tl.int32)
    inside = (column >= first) & (column < first + V)
    return place, column - first, inside


@triton.jit
def take_out(student, ids, row, K, first, V, K_BLOCK: tl.constexpr):
    """Write TAKEN over the projections of the K tokens, and wait until all threads see it."""
    for start in range(0, K, K_BLOCK):
        _, column, inside = places_of(ids, row, start, K, first, V, K_BLOCK)
        tl.store(student + column, TAKEN, mask=inside)
    tl.debug_barrier()
