"""``cost()`` of every kernel against counts by hand."""

from pocl_kernels.triton_backend import cross_entropy_rows, divergence_rows, tile_gradient, tile_statistics, tile_values

ROWS, V = 3, 100


def test_bytes_of_a_row_kernel() -> None:
    # Two passes over two float32 rows, a float32 gradient, then 5 results, a weight and an 8-byte label.
    known = divergence_rows.cost(ROWS, V, labels=True, slope_sum_known=True, gradient_bytes=4)
    assert known.bytes == 3 * (100 * (2 * 8 + 4) + 20 + 4 + 8)
    # A third pass where the sum of the slopes must be known first; a 16-bit gradient.
    unknown = divergence_rows.cost(ROWS, V, labels=False, slope_sum_known=False, gradient_bytes=2)
    assert unknown.bytes == 3 * (100 * (3 * 8 + 2) + 20 + 4)
    # Without a gradient two passes, whatever the slopes; 16-bit logits halve them.
    assert divergence_rows.cost(ROWS, V, labels=False, slope_sum_known=False, gradient_bytes=None).bytes == 3 * (
        100 * 2 * 8 + 24
    )
    half = divergence_rows.cost(ROWS, V, labels=False, slope_sum_known=False, gradient_bytes=None, logit_bytes=2)
    assert half.bytes == 3 * (100 * 2 * 4 + 24)


def test_flops_of_a_row_kernel() -> None:
    # 6 for each of two online sums, 10 for log-probabilities and entropies, 4 for the gradient; labels: a third sum
    # of 6, and 4 in the gradient; a pass of its own for the gradient makes the log-probabilities again: 4 more.
    def flops(**changes: object) -> int:
        call = {"labels": False, "slope_sum_known": True, "gradient_bytes": 4} | changes
        return divergence_rows.cost(ROWS, V, **call).flops // (ROWS * V)  # type: ignore[arg-type]

    assert flops(gradient_bytes=None) == 22
    assert flops() == 26
    assert flops(labels=True) == 36
    assert flops(slope_sum_known=False) == 30


def test_cross_entropy_reads_once_for_the_value_and_again_for_the_gradient() -> None:
    assert cross_entropy_rows.cost(ROWS, V, gradient_bytes=None) == (3 * (100 * 4 + 28), 3 * 100 * 8)
    assert cross_entropy_rows.cost(ROWS, V, gradient_bytes=2) == (3 * (100 * (8 + 2) + 28), 3 * 100 * 13)


def test_tiles_read_each_logit_once() -> None:
    # Sums read and written: 4 of the student, 3 of the teacher, 3 of the KLs; a label.
    kl = tile_statistics.cost(ROWS, V, teacher=True, kl=True)
    assert kl == (3 * (100 * 8 + 2 * 4 * 10 + 8), 3 * 100 * 53)
    assert tile_statistics.cost(ROWS, V, teacher=False, kl=False).bytes == 3 * (100 * 4 + 2 * 4 * 4 + 8)
    # Five numbers of the state, two sums read and written.
    assert tile_values.cost(ROWS, V) == (3 * (100 * 8 + 20 + 16), 3 * 100 * 10)
    # The gradient written; a weight, seven numbers of the state, a label.
    gradient = tile_gradient.cost(ROWS, V, teacher=True, labels=True, gradient_bytes=2)
    assert gradient == (3 * (100 * (8 + 2) + 4 + 28 + 8), 3 * 100 * 16)
    assert tile_gradient.cost(ROWS, V, teacher=False, labels=True, gradient_bytes=4).bytes == 3 * (
        400 + 400 + 4 + 8 + 8
    )
