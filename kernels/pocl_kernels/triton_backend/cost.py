"""What a kernel must read, write and compute: the benchmark divides by it, a test checks it by hand."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Traffic with the GPU's memory and arithmetic of one launch."""

    bytes: int
    flops: int
