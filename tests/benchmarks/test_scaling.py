"""The reckoning behind `docs/scaling.md` by hand, and the page itself."""

import pytest

from benchmarks import roofline, scaling
from benchmarks.roofline import Machine, Model, Pair, Work

TINY = Pair(Model("teacher", 96, 2, 1e6), Model("student", 64, 2, 1e5))
N, V = 256, 4096
S, TE = 2 * N * V * 64, 2 * N * V * 96


def test_the_page_shows_what_the_script_computes() -> None:
    page = scaling.PAGE.read_text()
    assert page == scaling.with_tables(page), "run `make docs`"


def test_a_page_without_a_place_for_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for: assumptions, cache, findings, fits"):
        scaling.with_tables("# Empty\n")


def test_an_operation_takes_the_longer_of_arithmetic_and_traffic() -> None:
    machine = Machine(100.0, 0.5, 10.0, 20.0, 0.5)
    assert machine.seconds(Work(200.0, 1.0)) == 4.0
    assert machine.seconds(Work(200.0, 1.0, vector=True)) == 20.0
    assert machine.seconds(Work(1.0, 50.0)) == 5.0


def test_flops_are_those_of_the_plans() -> None:
    assert roofline.flops(roofline.fast_loss(TINY, V, N, 256)) == 3 * S + TE
    assert roofline.flops(roofline.fast_loss(TINY, V, N, 2)) == 3 * S + TE
    assert roofline.flops(roofline.low_loss(TINY, V, N, 2)) == 4 * S + 2 * TE
    assert roofline.flops(roofline.sharded_loss(TINY, V, 8 * N, 256, 8)[0]) == 3 * S + TE
    assert roofline.flops(roofline.full_logits_loss(TINY, V, N)) == 3 * S + TE


def test_bytes_of_one_chunk_by_hand() -> None:
    logits = (2 * V * 64 + 2 * N * 64 + 4 * N * V) + (2 * V * 96 + 2 * N * 96 + 4 * N * V)
    rows = N * V * (2 * 8 + 2) + N * (20 + 4 + 8)  # two passes over both logits, a float16 gradient
    rows -= N * V * 8  # so few rows stay in the cache from the first pass to the second
    hidden = 4 * V * 64 + 2 * N * V + 2 * V * 64 + 4 * N * 64  # the head in float16, then the product
    weight = 2 * N * V + 2 * N * 64 + 2 * V * 64  # one product, rounded from the cache
    rounding = 6 * N * 64
    assert roofline.rows_of_chunk(TINY, V, N, 256) == N
    assert roofline.traffic(roofline.fast_loss(TINY, V, N, 256)) == logits + rows + hidden + weight + rounding


def test_a_last_wave_that_is_not_full_costs_a_whole_one() -> None:
    assert roofline.H100.fill(128 * 132, 256) == 1.0
    assert roofline.H100.fill(128 * 133, 256) == pytest.approx(133 / 264)


@pytest.mark.parametrize("V", [128_256, 262_144])
@pytest.mark.parametrize("student", [2048, 4096])
def test_the_predictions_of_the_gpu_page(student: int, V: int) -> None:
    pair = Pair(Model("teacher", 4096, 32, 6.5e9), Model("student", student, 16, 1e9))
    floor = 2 * 8192 * V * (3 * student + 4096) / (roofline.H100.matrix_flops * roofline.H100.matrix_fraction)
    for divergence, most in (("fkl", 1.17 if student == 4096 else 1.23), ("jsd", 1.22 if student == 4096 else 1.31)):
        assert roofline.seconds(roofline.fast_loss(pair, V, 8192, 8192, divergence)) <= most * floor


@pytest.mark.parametrize(("pair", "vocabulary"), scaling.cases(), ids=str)
def test_chunks_fit_the_workspace_and_more_of_it_is_faster(pair: Pair, vocabulary: int) -> None:
    rows = roofline.BATCH.rows
    times = []
    for workspace in (256, 1024, 4096):
        chunk = roofline.rows_of_chunk(pair, vocabulary, rows, workspace)
        assert chunk * vocabulary * (4 + 4) <= workspace * 2**20
        times.append(roofline.seconds(roofline.fast_loss(pair, vocabulary, rows, workspace)))
    assert times == sorted(times, reverse=True)
    floor = 2 * rows * vocabulary * (3 * pair.student.hidden + pair.teacher.hidden)
    assert times[-1] > floor / (roofline.H100.matrix_flops * roofline.H100.matrix_fraction)


def test_what_crosses_links_by_hand() -> None:
    assert roofline.gathered(800.0, 8) == 700.0
    assert roofline.all_reduced(800.0, 8) == 1400.0
    # 16-bit weights twice and float32 gradients in the node; an eighth of the gradients between 8 nodes.
    exchange = roofline.training_exchange(800.0, 8)
    assert exchange == ((2 * 1600 + 3200) * 7 / 8, 2 * 7 / 8 * 400)
    _, sent = roofline.sharded_loss(TINY, V, N, 256, 8)
    assert sent == 2 * 7 / 8 * N * (48 + 4 * 64)


def test_the_cache_pays_from_where_both_cost_the_same() -> None:
    teacher, write, read = 3.0, 1.0, 0.5
    passes = roofline.passes_until_cache_pays(teacher, write, read)
    assert passes * teacher == pytest.approx(teacher + write + passes * read)
    assert roofline.passes_until_cache_pays(1.0, 0.1, 1.0) == float("inf")


def test_parameters_and_flops_of_a_model() -> None:
    model = Model("any", 10, 3, 1000.0)
    assert model.parameters(7) == 1000 + 2 * 70
    assert Model("any", 10, 3, 1000.0, tied=True).parameters(7) == 1000 + 70
    assert roofline.training_state(model, 7) == 16 * 1140
    assert model.activations(5) == 34 * 3 * 50
    assert model.activations(5, recomputed=True) == (2 * 3 + 34) * 50
    assert model.forward_flops(5, 8) == 5 * (2 * 1000 + 2 * 8 * 10 * 3)  # the causal half of 4 L H a layer
