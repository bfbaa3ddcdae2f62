"""The whole Triton backend in the interpreter against float64: every divergence, memory mode and form of head."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pocl_kernels
from pocl_kernels import Divergence, reference
from pocl_kernels.scalar import Value, exp
from pocl_kernels.triton_backend import layout
from tests.kernels.cases import INSTANCES, NAMES, Case, Solution, assert_close, make_case, oracle, pytorch, solve
from tests.kernels.test_inputs import check_weight_zero
from tests.kernels.test_laws import check_ignored_rows
from tests.kernels.test_scalar import Tripled

FLOAT32 = 2e-6
MEMORY = ("fast", "low")
VOCAB = 603  # divisible by nothing that matters


def triton(memory: str) -> Any:
    def loss(*tensors: Any, **arguments: Any) -> Any:
        return pocl_kernels.fused_linear_divergence(*tensors, backend="triton", **({"memory": memory} | arguments))

    return loss


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("divergence_rows", "cross_entropy_rows", "tile_statistics", "tile_values", "tile_gradient"):
        monkeypatch.setattr(f"pocl_kernels.triton_backend.{kernel}.BLOCK", 512)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of rows, several vocabulary tiles, none of them even."""
    monkeypatch.setattr(layout, "MAX_CHUNK_ROWS", 1)
    monkeypatch.setattr("pocl_kernels.triton_backend.low.tile_shape", lambda rows, *_: (min(rows, 3), 256))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", [*NAMES, "skew_fkl(0)", "skew_rkl(0.7)", "jsd(0.1)", "alpha(0.8)"])
def test_every_divergence(name: str, memory: str) -> None:
    case = make_case(5, VOCAB, bias=True)
    call = dict(divergence=INSTANCES[name], temperature=2.0, ce_weight=0.3)
    assert_close(solve(triton(memory), case, **call), oracle(case, **call), FLOAT32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", NAMES)
def test_nearly_equal_models(name: str, memory: str) -> None:
    case = make_case(24, VOCAB, near=1e-4, seed=2)  # one whose float32 logits are themselves exact enough
    truth = oracle(case, divergence=name)
    errors = solve(triton(memory), case, divergence=name).errors(truth)
    plain = pytorch(case, dtype=torch.float32, divergence=name).errors(truth)
    assert errors["loss"] <= 1e-5
    for gradient in ("hidden", "weight"):
        # One case, and the products' own rounding depends on the tiles: the laws on every engine pool several.
        assert errors[gradient] <= 2.0 * plain[gradient]


HEADS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 5.0},
    "bias, scale and softcap": {"bias": True, "scale": 0.25, "softcap": 5.0},
    "padded teacher": {"teacher_vocab": VOCAB + 57, "bias": True},
    "padded student": {"teacher_vocab": VOCAB - 57, "bias": True, "softcap": 8.0},
    "other hidden sizes": {"hidden": (72, 8)},
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("form", HEADS)
def test_every_form_of_head(form: str, memory: str) -> None:
    case = make_case(6, VOCAB, **HEADS[form])
    for divergence in ("fkl", "jsd"):
        call = dict(divergence=divergence, temperature=1.5, ce_weight=0.4)
        assert_close(solve(triton(memory), case, **call), oracle(case, **call), FLOAT32)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 512, 513])
def test_vocabularies_at_the_edges_of_blocks(vocab: int, memory: str) -> None:
    case = make_case(5, vocab, bias=True)
    call = dict(divergence="jeffreys", temperature=1.3, ce_weight=0.5)
    result, truth = solve(triton(memory), case, **call), oracle(case, **call)
    if vocab == 1:
        assert all(float(x.abs().max()) == 0.0 for name, x in vars(result).items() if name != "accuracy")
    else:
        assert_close(result, truth, FLOAT32)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("near", [None, 1e-3], ids=["unrelated", "near"])
def test_16_bit_models_lose_no_more_than_the_rounding_of_their_gradients(
    near: float | None, dtype: torch.dtype, memory: str
) -> None:
    case = make_case(8, VOCAB, near=near, dtype=dtype)
    for divergence in ("fkl", "skew_rkl"):
        truth = oracle(case, divergence=divergence)
        errors = solve(triton(memory), case, divergence=divergence).errors(truth)
        plain = pytorch(case, dtype=torch.float32, divergence=divergence).errors(truth)
        assert errors["loss"] <= max(1.2 * plain["loss"], 1e-6)
        # A float16 tile's 11 digits are lost beside the 8 of a bf16 gradient, and as many as a float16 gradient's own.
        bound = 1.2 if dtype == torch.bfloat16 else 1.6
        for gradient in ("hidden", "weight"):
            assert errors[gradient] <= bound * plain[gradient], (divergence, gradient)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("weight", [1e-9, 1.0, 1e4])
def test_the_size_of_the_weights_costs_16_bit_models_no_digits(weight: float, memory: str) -> None:
    case = make_case(8, VOCAB, dtype=torch.bfloat16)
    case = case.replace(labels=case.labels.clamp_min(0))
    call = dict(divergence="rkl", temperature=2.0, ce_weight=0.5, reduction="sum")
    token_weight = weight * torch.linspace(0.1, 1.0, 8)
    result = solve(triton(memory), case, token_weight=token_weight, **call)
    truth = oracle(case, token_weight=token_weight, **call)
    assert_close(result, truth, 3e-3)


@pytest.mark.parametrize("memory", MEMORY)
def test_products_under_autocast_are_those_of_16_bit_models(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(5, VOCAB, bias=True)
    call = dict(divergence="jsd", temperature=2.0, ce_weight=0.3)
    halved = case.to(torch.bfloat16)
    biases = [
        dataclasses.replace(getattr(halved, h), bias=getattr(case, h).bias) for h in ("student_head", "teacher_head")
    ]
    truth = solve(triton(memory), halved.replace(student_head=biases[0], teacher_head=biases[1]), **call)
    # Where there is a GPU, autocast names the dtype; here it is named for it.
    monkeypatch.setattr("pocl_kernels.api.autocast_products", lambda _: "bfloat16")
    result = solve(triton(memory), case, **call)
    assert result.weight is not None
    assert result.weight.dtype == torch.float32
    assert_close(
        dataclasses.replace(result, hidden=None, weight=None),
        dataclasses.replace(truth, hidden=None, weight=None),
        1e-6,
    )
    assert_close(result, truth, 2e-3)  # the gradients of bf16 inputs are rounded to bf16


@pytest.mark.parametrize("memory", MEMORY)
def test_float64_stays_float64(memory: str) -> None:
    case = make_case(8, VOCAB, bias=True, softcap=6.0, dtype=torch.float64)
    for name in NAMES:
        call = dict(divergence=name, temperature=2.0, ce_weight=0.3)
        assert_close(solve(triton(memory), case, **call), oracle(case, **call), 1e-12)


@dataclasses.dataclass(frozen=True)
class Hellinger(Divergence):
    """Squared Hellinger distance times ``size``: defined here alone, known to no kernel."""

    size: float = 1.0

    def value(self, l: Value, r: Value) -> Value:
        return self.size * (exp(0.5 * l) - exp(0.5 * r)) ** 2

    def slope(self, l: Value, r: Value) -> Value:
        return -self.size * exp(0.5 * (l + r))


@pytest.mark.parametrize("memory", MEMORY)
def test_a_divergence_of_the_users_own(memory: str) -> None:
    case = make_case(6, VOCAB)

    def exact(hs: Tensor, head: Any, ht: Tensor, teacher: Any, labels: Tensor) -> Any:
        l, r = (reference.log_probabilities(h[labels != -100], x, 1.0, VOCAB) for h, x in ((hs, head), (ht, teacher)))
        d = 3.0 * ((l / 2).exp() - (r / 2).exp()).square().sum(-1).mean()
        return pocl_kernels.DivergenceOutput(d, d, None, None, None, None, None)

    truth = solve(exact, case.to(torch.float64))
    result = solve(triton(memory), case, divergence=Hellinger(3.0))
    unknown = dict.fromkeys(("cross_entropy", "student_entropy", "teacher_entropy", "accuracy"))
    assert_close(dataclasses.replace(result, **unknown), truth, FLOAT32)


@pytest.mark.parametrize("memory", MEMORY)
def test_a_function_built_on_a_kl_is_not_taken_for_it(memory: str) -> None:
    case = make_case(6, VOCAB)
    once, tripled = (solve(triton(memory), case, divergence=d) for d in ("fkl", Tripled()))
    for part in ("loss", "hidden", "weight"):
        assert reference.relative_error(getattr(tripled, part), 3 * getattr(once, part)) <= 1e-6


@pytest.mark.parametrize("memory", MEMORY)
def test_loss_is_independent_of_the_contents_of_ignored_rows(memory: str) -> None:
    check_ignored_rows(triton(memory), "mean", math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", MEMORY)
def test_a_token_of_weight_zero_adds_nothing(memory: str, dtype: torch.dtype) -> None:
    check_weight_zero(triton(memory), "mean", dtype)


@pytest.mark.parametrize("divergence", ["fkl", "tvd"])
def test_per_token_losses_take_any_upstream_gradient(divergence: str) -> None:
    case = make_case(9, VOCAB)
    upstream = torch.randn(9)
    call = dict(divergence=divergence, reduction="none", ce_weight=0.2)
    result = solve(triton("auto"), case, upstream=upstream, **call)
    assert_close(result, oracle(case, upstream=upstream.double(), **call), FLOAT32)


@pytest.mark.usefixtures("small_tiles")
def test_both_modes_and_any_tiles_agree() -> None:
    case = make_case(9, VOCAB)
    tiled = [solve(triton(memory), case, divergence="jsd", ce_weight=0.1) for memory in MEMORY]
    assert_close(tiled[0], tiled[1], 1e-6)


def test_results_repeat_to_the_bit() -> None:
    case = make_case(5, VOCAB)
    for memory in MEMORY:
        one, two = (solve(triton(memory), case, divergence="rkl") for _ in range(2))
        assert all(
            torch.equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True) if a is not None
        )


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_and_infinite_logits_reach_the_loss(side: str, memory: str) -> None:
    case = make_case(4, VOCAB)
    case = case.replace(labels=case.labels.clamp_min(0))
    for bad in (float("nan"), float("inf")):
        hidden = getattr(case, f"{side}_hidden").clone()
        hidden[2, 0] = bad
        for divergence in ("fkl", "jsd"):
            loss = solve(
                triton(memory), case.replace(**{f"{side}_hidden": hidden}), divergence=divergence, wanted=()
            ).loss
            assert not torch.isfinite(loss)


@pytest.mark.parametrize("memory", MEMORY)
def test_tokens_that_both_models_exclude_change_nothing(memory: str) -> None:
    case = make_case(6, VOCAB, bias=True)
    excluded = torch.zeros(VOCAB, dtype=torch.bool)
    excluded[:300] = True  # a whole first tile, and more
    excluded[case.labels.clamp_min(0)] = False
    heads = [
        dataclasses.replace(head, bias=head.bias.masked_fill(excluded, -torch.inf))
        for head in (case.student_head, case.teacher_head)
        if head.bias is not None
    ]
    kept = [dataclasses.replace(head, weight=head.weight[~excluded], bias=head.bias[~excluded]) for head in heads]
    position = torch.cumsum(~excluded, 0) - 1
    labels = torch.where(case.labels < 0, case.labels, position[case.labels.clamp_min(0)])
    for name in NAMES:
        call = dict(divergence=name, temperature=2.0, ce_weight=0.3)
        short = case.replace(student_head=kept[0], teacher_head=kept[1], labels=labels)
        truth = oracle(short, **call)
        result = solve(triton(memory), case.replace(student_head=heads[0], teacher_head=heads[1]), **call)
        assert result.weight is not None
        assert result.bias is not None
        assert float(result.weight[excluded].abs().max()) == 0.0
        result = dataclasses.replace(result, weight=result.weight[~excluded], bias=result.bias[~excluded])
        assert_close(result, truth, FLOAT32)


@pytest.mark.parametrize("memory", MEMORY)
def test_cross_entropy_alone(memory: str) -> None:
    case = make_case(9, VOCAB, bias=True, softcap=6.0)
    results: list[Solution] = []
    for c, backend in ((case, {"backend": "triton", "memory": memory}), (case.to(torch.float64), {})):
        head = c.student_head
        leaves = [x.clone().requires_grad_() for x in (c.student_hidden, head.weight, head.bias) if x is not None]
        head = dataclasses.replace(head, weight=leaves[1], bias=leaves[2])
        loss = pocl_kernels.fused_linear_cross_entropy(leaves[0], head, c.labels, **backend)
        loss.backward()
        results.append(Solution(loss.detach(), None, None, None, *(x.grad for x in leaves)))
    exact = torch.nn.functional.cross_entropy(logits(case.to(torch.float64)), case.labels)
    assert reference.relative_error(results[0].loss, exact) <= FLOAT32
    assert_close(results[0], results[1], FLOAT32)


def logits(case: Case) -> Tensor:
    head = case.student_head
    z = head.scale * torch.nn.functional.linear(case.student_hidden, head.weight, head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
