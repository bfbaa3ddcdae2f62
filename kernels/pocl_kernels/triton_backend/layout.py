"""How a workspace is shared out, from shapes and dtypes alone: chunks of rows, kept gradient tiles, tiles of "low".

No tensor is looked at and nothing is imported from Triton, so that the choice of a memory mode, also inside a compiled
graph, and the roofline model ask the very functions that the backend obeys.

``memory="fast"`` makes the logits of one *chunk* of rows at a time. Of a 16-bit model it keeps the gradient tiles, two
bytes an entry, of a *group* of chunks, and makes the weight's gradient by one product a group: every further group
reads and writes a float32 gradient, 8 V H bytes, and every further chunk reads the heads. Where all rows are one group
no float32 gradient of the weight need exist, and its memory holds tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pocl_kernels.plan import Gradients

MIB = 2**20
SLICE_BYTES = 32 * MIB  # of what is converted or rounded at a time: it stays in the GPU's cache
ROW_ALIGNMENT = 16  # entries: every row of a buffer starts 128-bit aligned, whatever the vocabulary and the dtype
WHOLE_TILES = 128  # rows or columns of a GEMM's tile: what is larger is cut to a multiple
WHOLE_BLOCKS = 2048  # columns of a kernel's block: a width that is no multiple wastes lanes
MAX_CHUNK_ROWS = 2048  # beyond, products gain nothing
LEAST_CHUNK_ROWS = 512  # below, products read a head more slowly than they multiply
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


class Demand(NamedTuple):
    """What one head's products need of the workspace, in bytes."""

    V: int
    entry: int  # a projection
    kept: int  # the gradient of one, where it lies beside it; 0: it lies over it, or is not wanted
    row: int  # beside an entry's: hidden states in two dtypes and their gradient
    kept_row: int  # hidden states for the weight's gradient
    fixed: int  # the bias, and a slice of the head where it is converted
    head: int  # the converted head as a whole, in place of the slice; 0: nothing is converted
    weight_gradient: int  # float32, beyond the workspace; 0: not wanted


class Layout(NamedTuple):
    """Rows of ``memory="fast"``."""

    chunk: int  # whose logits exist at a time
    group: int  # whose gradient tiles exist at a time
    whole_heads: bool  # a head that must be converted is converted once, not slice by slice in every chunk
    held: int  # how many rows a group could have


def padded(V: int) -> int:
    """Entries from one row of a buffer to the next."""
    return -(-V // ROW_ALIGNMENT) * ROW_ALIGNMENT


def factor_dtypes(
    hidden: torch.dtype, weight: torch.dtype, dtype: torch.dtype, products: torch.dtype | None, sixteen_bit: bool
) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the factors of the projection, and of its gradient.

    ``products`` is autocast's dtype; without it 16-bit factors of one dtype stay as they are, and all others are taken
    in ``dtype``. ``sixteen_bit``: the device multiplies 16-bit factors into float32.
    """
    if products is None and hidden == weight:
        products = hidden
    if products in SIXTEEN_BIT and dtype == torch.float32 and sixteen_bit:
        return products, torch.float16
    return dtype, dtype


def conversions(
    weight: torch.dtype, factor: torch.dtype, gradient: torch.dtype, wanted: Gradients
) -> list[torch.dtype]:
    """Dtypes, beside its own, in which a head is multiplied. The gradient's goes through that of the projection."""
    needed = [factor, *([gradient] if wanted.hidden else [])]
    return [x for x in dict.fromkeys(needed) if x != weight]


def slice_rows(V: int, hidden_size: int, itemsize: int) -> int:
    """Rows of a head to convert at a time: whole tiles, so that every slice of a tile stays aligned."""
    return min(V, max(WHOLE_TILES, whole_tiles(SLICE_BYTES // (hidden_size * itemsize))))


def demand(
    hidden_size: int,
    V: int,
    weight: torch.dtype,
    dtype: torch.dtype,
    factors: tuple[torch.dtype, torch.dtype],
    wanted: Gradients,
    bias: bool,
) -> Demand:
    """Of one projection and the way back."""
    needed = conversions(weight, *factors, wanted)
    each = sum(x.itemsize for x in needed)
    beside = any(wanted) and factors[1] != dtype
    piece = slice_rows(V, hidden_size, each) * hidden_size * each if needed else 0
    return Demand(
        V=V,
        entry=dtype.itemsize,
        kept=factors[1].itemsize if beside else 0,
        row=hidden_size * (2 + 2 * dtype.itemsize),
        kept_row=hidden_size * factors[1].itemsize if wanted.weight else 0,
        fixed=padded(V) * dtype.itemsize * bias + piece,
        head=V * hidden_size * each,
        weight_gradient=V * hidden_size * dtype.itemsize if wanted.weight else 0,
    )


def fast_layout(rows: int, demands: Sequence[Demand], workspace: int, *, later: bool) -> Layout:
    """Chunks and groups that fit ``workspace`` bytes. ``later``: one group of all rows saves a float32 gradient."""
    heads = sum(d.head for d in demands)
    whole = 0 < heads <= workspace // 4
    free = workspace - (heads if whole else sum(d.fixed for d in demands))
    row = sum(padded(d.V) * d.entry + d.row for d in demands)
    kept = sum(padded(d.V) * d.kept + d.kept_row for d in demands if d.kept)
    spare = sum(d.weight_gradient for d in demands)
    rows = max(1, rows)
    if not kept or not spare:
        most = max(1, free // (row + kept))
        chunk = evened(rows, min(most, 4 * MAX_CHUNK_ROWS))
        return Layout(chunk, chunk, whole, whole_tiles(most))
    most = (free + (spare if later else 0) - rows * kept) // row
    if most >= min(rows, LEAST_CHUNK_ROWS):
        return Layout(evened(rows, min(most, MAX_CHUNK_ROWS)), rows, whole, rows)
    # Tiles of two chunks or more: heads are read three times a chunk, a gradient written and read once a group.
    chunk = whole_tiles(min(max(1, free // (row + 2 * kept)), MAX_CHUNK_ROWS))
    held = max(chunk, whole_tiles((free - chunk * row) // kept))
    group = evened(rows, held)
    return Layout(evened(group, chunk), group, whole, held)


def tile_shape(rows: int, demands: Sequence[Demand], workspace: int) -> tuple[int, int]:
    """Rows and columns of one tile of ``memory="low"``: as square as the workspace allows.

    Every tile adds to the hidden states' gradient once for its columns and to the weight's once for its rows, so that
    the traffic beside the GEMMs is in proportion to 1 / rows + 1 / columns.
    """
    V, rows = min(d.V for d in demands), max(1, rows)
    free = workspace - sum(d.fixed for d in demands)
    per_row, per_entry = sum(d.row + d.kept_row for d in demands), sum(d.entry + d.kept for d in demands)
    best, traffic = (min(rows, WHOLE_TILES), min(V, WHOLE_TILES)), float("inf")
    most = min(rows, 4 * MAX_CHUNK_ROWS)
    for height in (most, *range(WHOLE_TILES, most, WHOLE_TILES)):
        width = (free - height * per_row) // (height * per_entry)
        width = V if width >= V else whole_tiles(width, WHOLE_BLOCKS if width >= WHOLE_BLOCKS else WHOLE_TILES)
        if width > 0 and 1 / height + 1 / width < traffic:
            best, traffic = (height, width), 1 / height + 1 / width
    return best


def evened(rows: int, most: int) -> int:
    """Rows of a chunk, at most ``most``, the same for all but the last, in whole tiles where there are several."""
    if rows <= most:
        return max(1, rows)
    most = whole_tiles(most)
    size = -(-rows // -(-rows // most))
    return min(most, -(-size // WHOLE_TILES) * WHOLE_TILES) if most >= WHOLE_TILES else size


def whole_tiles(n: int, tile: int = WHOLE_TILES) -> int:
    """``n`` cut to a multiple of a tile, if it holds one."""
    return n // tile * tile if n >= tile else n
