"""The Triton kernels one by one, in the interpreter: what they may read and must write, and their sums' algebra."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pocl_kernels import DIVERGENCES, ForwardKL, reference
from pocl_kernels.divergences import Divergence
from pocl_kernels.reference import relative_error
from pocl_kernels.triton_backend import state, steps, tiles_eager
from pocl_kernels.triton_backend.cross_entropy_rows import cross_entropy_rows
from pocl_kernels.triton_backend.divergence_rows import divergence_rows
from pocl_kernels.triton_backend.steps import Task, Tile, Transforms
from pocl_kernels.triton_backend.terms import slope_sum, term_of

V, WIDTH, ROWS = 203, 208, 3
NAN = float("nan")


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype)


def logits(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose padding holds NaN: whatever reads it, or lets it reach a sum, shows."""
    z = poisoned(ROWS, WIDTH, dtype=dtype)
    z[:, :V] = 3 * torch.randn(ROWS, V, generator=torch.Generator().manual_seed(seed))
    return z


def run_rows(
    divergence: Divergence, zs: Tensor, zt: Tensor, gradient: Tensor | None, labels: Tensor | None, T: float = 2.0
) -> Tensor:
    results = poisoned(ROWS, 5)
    term = term_of(divergence)
    weights = torch.tensor([0.5, 2.0, 1.0])
    divergence_rows[(ROWS,)](
        zs, zt, gradient, None, None, labels, weights, results, V, WIDTH // 16, 1.0, None, 1.0, None, 1.0 / T, 0.7 * T,
        0.3, term.uniforms, term=term.function, SLOPE_SUM=slope_sum(divergence), BLOCK=64,
    )  # fmt: skip
    return results


def exact_rows(name: str, zs: Tensor, zt: Tensor, labels: Tensor | None, T: float = 2.0) -> tuple[Tensor, Tensor]:
    z = zs[:, :V].double().requires_grad_()
    l, r = torch.log_softmax(z / T, -1), torch.log_softmax(zt[:, :V].double() / T, -1)
    D = reference.divergence_rows(name, l, r)
    ce = torch.zeros(ROWS).double() if labels is None else F.cross_entropy(z, labels, reduction="none")
    loss = 0.7 * T**2 * D + 0.3 * ce
    (loss * torch.tensor([0.5, 2.0, 1.0])).sum().backward()
    assert z.grad is not None
    entropies = (-(x.exp() * x).sum(-1) for x in (l, r))
    right = torch.zeros(ROWS) if labels is None else (z.argmax(-1) == labels).double()
    return torch.stack([D, ce, *entropies, right], 1).detach(), z.grad


LABELS = torch.tensor([0, V - 1, int(logits(0)[2, :V].argmax())])  # the last one is the student's choice


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_row_kernel_writes_results_and_gradient_and_never_reads_the_padding(name: str) -> None:
    zs, zt, gradient = logits(0), logits(1), poisoned(ROWS, WIDTH)
    results = run_rows(DIVERGENCES[name](), zs, zt, gradient, LABELS)
    expected, exact = exact_rows(name, zs, zt, LABELS)
    assert relative_error(results, expected) <= 5e-7
    assert relative_error(gradient[:, :V], exact) <= 1e-6
    assert torch.all(gradient[:, V:] == 0)


@pytest.mark.parametrize("name", ["fkl", "jsd"])
def test_the_gradient_may_overwrite_the_students_rows(name: str) -> None:
    zs, zt = logits(0), logits(1)
    expected, exact = exact_rows(name, zs, zt, LABELS)
    results = run_rows(DIVERGENCES[name](), zs, zt, zs, LABELS)
    assert relative_error(results, expected) <= 5e-7
    assert relative_error(zs[:, :V], exact) <= 1e-6


@pytest.mark.parametrize("name", ["fkl", "jsd"])
def test_16_bit_logits_and_gradients(name: str) -> None:
    zs, zt = logits(0, torch.bfloat16), logits(1, torch.bfloat16)
    gradient = poisoned(ROWS, WIDTH, dtype=torch.float16)
    results = run_rows(DIVERGENCES[name](), zs, zt, gradient, LABELS)
    expected, exact = exact_rows(name, zs, zt, LABELS)
    assert relative_error(results, expected) <= 5e-7
    assert relative_error(gradient[:, :V], exact) <= 4e-4  # 11 digits


@pytest.mark.parametrize("name", ["fkl", "jsd"])
def test_without_gradient_or_labels_a_row_kernel_leaves_its_inputs_alone(name: str) -> None:
    zs, zt = logits(0), logits(1)
    before = zs.clone(), zt.clone()
    results = run_rows(DIVERGENCES[name](), zs, zt, None, None)
    expected, _ = exact_rows(name, zs, zt, None)
    assert relative_error(results, expected) <= 5e-7
    assert torch.equal(zs.nan_to_num(7), before[0].nan_to_num(7))
    assert torch.equal(zt.nan_to_num(7), before[1].nan_to_num(7))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_logit_gradient_rows_sum_to_zero(name: str) -> None:
    gradient = poisoned(ROWS, WIDTH)
    run_rows(DIVERGENCES[name](), logits(0), logits(1), gradient, LABELS)
    assert torch.all(gradient[:, :V].double().sum(1).abs() <= 1e-6 * gradient[:, :V].double().abs().sum(1))


def test_shifted_logits_change_nothing() -> None:
    results = [run_rows(ForwardKL(), logits(0) + shift, logits(1) - shift, None, LABELS) for shift in (0.0, 256.0)]
    assert relative_error(results[1], results[0]) <= 2e-5  # 256 costs the logits 8 bits


def test_the_cross_entropy_kernel() -> None:
    z, gradient, results = logits(0), poisoned(ROWS, WIDTH), poisoned(ROWS, 5)
    weights = torch.tensor([0.5, 2.0, 1.0])
    numbers = 0.5, 4.0, 0.2, 0.05  # scale, softcap, smoothing, z-loss
    cross_entropy_rows[(ROWS,)](z, gradient, None, LABELS, weights, results, V, WIDTH // 16, *numbers, BLOCK=64)
    exact = z[:, :V].double().requires_grad_()
    u = 4 * torch.tanh(exact * 0.5 / 4)
    ce, smoothed = (F.cross_entropy(u, LABELS, reduction="none", label_smoothing=x) for x in (0.0, 0.2))
    lse = u.logsumexp(-1)
    loss = smoothed + 0.05 * lse**2
    (loss * weights).sum().backward()
    assert exact.grad is not None
    for column, truth in ((0, loss), (1, ce), (2, lse), (4, (u.argmax(-1) == LABELS).double())):
        assert relative_error(results[:, column], truth) <= 5e-7, column
    assert relative_error(gradient[:, :V], exact.grad) <= 1e-6
    assert torch.all(gradient[:, V:] == 0)


# --- The sums of the low-memory mode ---

T = 2.0
TASK = Task(Transforms(1.0, None, 1.0, None, 1.0 / T), ForwardKL(), 1.0, 0.0)


def tile(zs: Tensor, zt: Tensor, first: int, last: int) -> Tile:
    """Columns as a projection would lay them out: padded rows, NaN in the padding."""
    parts = []
    for z in (zs, zt):
        buffer = poisoned(z.shape[0], -(-(last - first) // 16) * 16, dtype=z.dtype)
        buffer[:, : last - first] = z[:, first:last]
        parts.append(buffer[:, : last - first])
    return Tile(slice(first, last), parts[0], parts[1], None, None)


def sums_over(zs: Tensor, zt: Tensor, bounds: list[int]) -> Tensor:
    sums = state.empty_sums(zs.shape[0], zs.dtype, zs.device)
    for first, last in itertools.pairwise(bounds):
        steps.statistics(tile(zs, zt, first, last), LABELS, 0, TASK, True, True, sums)
    return sums


def exact_kls(zs: Tensor, zt: Tensor) -> tuple[Tensor, Tensor]:
    l, r = (torch.log_softmax(z[:, :V].double() / T, -1) for z in (zs, zt))
    return reference.kl(r, l), reference.kl(l, r)


@pytest.mark.parametrize("bounds", [[0, V], [0, 16, 48, V], [0, 192, V]], ids=str)
@pytest.mark.parametrize("kind", ["unrelated", "near", "rising", "falling"])
def test_one_pass_kls_are_exact_for_any_tiles(kind: str, bounds: list[int]) -> None:
    zs, zt = logits(0)[:, :V], logits(1)[:, :V]
    if kind == "near":
        zt = zs + 0.01 * zt
    elif kind != "unrelated":  # every tile raises the maxima, or none does
        slope = torch.linspace(-200.0, 200.0, V)
        zs, zt = (z + (slope if kind == "rising" else -slope) for z in (zs, zt))
    sums = sums_over(zs, zt, bounds)
    forward, reverse = exact_kls(zs, zt)
    # At D = 1e-5 a textbook sum in float32 is off by percents.
    tolerance = 2e-5 if kind == "near" else 2e-6
    assert relative_error(state.weighted_kl(sums, (1.0, 0.0))[0], forward) <= tolerance
    assert relative_error(state.weighted_kl(sums, (0.0, 1.0))[0], reverse) <= tolerance
    both, c = state.weighted_kl(sums, (1.0, 1.0))
    assert relative_error(both, forward + reverse) <= tolerance
    assert relative_error(c, reverse - 1.0) <= tolerance
    assert relative_error(state.cross_entropy(sums), F.cross_entropy(zs.double(), LABELS, reduction="none")) <= 1e-6


def test_a_tile_that_one_model_excludes_is_no_zero_times_infinity() -> None:
    zs, zt = logits(0)[:, :V].clone(), logits(1)[:, :V].clone()
    zs[0, :64] = zt[0, :64] = -torch.inf  # both: nothing is added
    zt[1, :64] = -torch.inf  # the teacher alone: KL(q, p) is infinite, KL(p, q) is not
    zs[2, :64] = -torch.inf
    LABELS_INSIDE = LABELS.clamp_min(64)
    sums = state.empty_sums(ROWS, torch.float32, zs.device)
    for first, last in ((0, 32), (32, 96), (96, V)):
        steps.statistics(tile(zs, zt, first, last), LABELS_INSIDE, 0, TASK, True, True, sums)
    exact = exact_kls(zs, zt)
    forward, reverse = (state.weighted_kl(sums, weights)[0] for weights in ((1.0, 0.0), (0.0, 1.0)))
    assert relative_error(forward[:2], exact[0][:2]) <= 2e-6
    assert relative_error(reverse[[0, 2]], exact[1][[0, 2]]) <= 2e-6
    assert not torch.isfinite(forward[2])
    assert not torch.isfinite(reverse[1])


def test_the_eager_tiles_and_the_kernels_make_the_same_sums() -> None:
    zs, zt = logits(0)[:, :V], logits(1)[:, :V]
    bounds = [0, 64, 160, V]
    single, double = sums_over(zs, zt, bounds), sums_over(zs.double(), zt.double(), bounds)
    for row in range(state.SUMS):
        assert relative_error(single[row], double[row]) <= 1e-6, row


def test_maxima_can_be_raised_afterwards() -> None:
    zs, zt = (logits(seed)[:, :V].double() for seed in (0, 1))
    sums = sums_over(zs, zt, [0, V])
    raised = sums.clone()
    state.raise_maxima(raised, sums[:2] + torch.tensor([[3.0], [5.0]]), 1.0 / T)
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        before, after = (state.weighted_kl(s, weights)[0] for s in (sums, raised))
        assert relative_error(after, before) <= 1e-13
    assert relative_error(state.entropies(raised), state.entropies(sums)) <= 1e-13


def test_values_and_gradients_of_tiles_match_whole_rows() -> None:
    zs, zt = logits(0)[:, :V], logits(1)[:, :V]
    divergence = DIVERGENCES["skew_fkl"]()
    task = Task(TASK.transforms, divergence, 0.7 * T, 0.3, term_of(divergence).uniforms)
    here = state.state_of(sums_over(zs, zt, [0, V]))
    second = torch.zeros(2, ROWS)
    bounds = ((0, 80), (80, V))
    for first, last in bounds:
        steps.values(tile(zs, zt, first, last), here, task, second)
    here[state.SLOPE_SUM.value] = second[1]
    gradient = poisoned(ROWS, V)
    weights = torch.tensor([0.5, 2.0, 1.0])
    for first, last in bounds:
        part = tile(zs, zt, first, last)
        steps.gradient(part, part.student, LABELS, 0, weights, here, task)
        gradient[:, first:last] = part.student
    expected, exact = exact_rows("skew_fkl", zs, zt, LABELS, T)
    assert relative_error(second[0], expected[:, 0]) <= 1e-6
    assert relative_error(gradient, exact) <= 1e-6
    slopes = tiles_eager.slopes(zs.double(), zt.double(), here.double(), divergence, 1.0 / T)
    assert torch.all(slopes.sum(1).abs() <= 1e-6)
