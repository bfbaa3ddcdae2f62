"""The Triton backend on a real device: the laws that the interpreter cannot show, and the numbers once more."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch

import pocl_kernels
from pocl_kernels import Head
from pocl_kernels.plan import Gradients
from pocl_kernels.triton_backend import gemm
from pocl_kernels.triton_backend.layout import demand, fast_layout
from tests.kernels.cases import NAMES, Case, Solution, assert_close, make_case, oracle, pytorch, solve

pytestmark = pytest.mark.gpu
MEMORY = ("fast", "low")
MIB = 2**20


def on_gpu(case: Case) -> Case:
    def move(head: Head) -> Head:
        bias = None if head.bias is None else head.bias.cuda()
        return dataclasses.replace(head, weight=head.weight.cuda(), bias=bias)

    return Case(
        case.student_hidden.cuda(), move(case.student_head), case.teacher_hidden.cuda(), move(case.teacher_head),
        case.labels.cuda(),
    )  # fmt: skip


def run(case: Case, memory: str, **arguments: Any) -> Solution:
    def loss(*tensors: Any, **rest: Any) -> Any:
        return pocl_kernels.fused_linear_divergence(*tensors, **({"memory": memory} | rest))

    solution = solve(loss, on_gpu(case), **arguments)
    return Solution(*(None if x is None else x.cpu() for x in vars(solution).values()))


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", NAMES)
def test_float32_against_float64(name: str, memory: str) -> None:
    case = make_case(64, 50257, bias=True, softcap=12.0)
    call = dict(divergence=name, temperature=2.0, ce_weight=0.3)
    # The loss is one sequential float32 sum of 50,257 terms in each lane's own order.
    assert_close(run(case, memory, **call), oracle(case, **call), 6e-6)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_near_the_teacher(name: str, memory: str) -> None:
    case = make_case(64, 32003, near=1e-3, dtype=torch.bfloat16)
    truth = oracle(case, divergence=name)
    errors = run(case, memory, divergence=name).errors(truth)
    plain = pytorch(case, dtype=torch.float32, divergence=name).errors(truth)
    assert errors["loss"] <= max(1.2 * plain["loss"], 2e-6)
    for gradient in ("hidden", "weight"):
        assert errors[gradient] <= 1.2 * plain[gradient]


@pytest.mark.parametrize("memory", MEMORY)
def test_results_repeat_to_the_bit(memory: str) -> None:
    case = make_case(300, 32003, dtype=torch.bfloat16)
    first, *others = (run(case, memory, divergence="jsd", workspace_mb=32.0) for _ in range(5))
    for other in others:
        for a, b in zip(vars(first).values(), vars(other).values(), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_16_bit_factors_accumulate_in_float32(dtype: torch.dtype) -> None:
    assert gemm.takes_16_bit(torch.device("cuda", 0), dtype), "every 16-bit model is multiplied in float32"
    a, b = (torch.randn(96, 96, dtype=dtype, device="cuda") for _ in range(2))
    out = torch.full((96, 128), float("nan"), device="cuda")[:, :96]
    gemm.multiply(a, b, out)
    exact = a.double() @ b.double()
    assert float((out - exact).norm() / exact.norm()) <= 1e-6
    gemm.multiply(a, b, out, alpha=0.5, add=True)
    assert float((out - 1.5 * exact).norm() / exact.norm()) <= 2e-6


@pytest.mark.parametrize(("memory", "workspace_mb"), [("fast", 256.0), ("low", 96.0)])
@pytest.mark.parametrize("rows", [512, 4096])
def test_scratch_stays_within_the_workspace(rows: int, memory: str, workspace_mb: float) -> None:
    vocab, size = 151936, 256
    hidden, teacher = (torch.randn(rows, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight, teacher_weight = (torch.randn(vocab, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    for _ in range(2):  # the first call makes the vendor's own workspace and compiles
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = pocl_kernels.fused_linear_divergence(
            hidden, weight, teacher, teacher_weight, divergence="jsd", memory=memory, workspace_mb=workspace_mb
        )
        gradients = torch.autograd.grad(out.loss, leaves)
        peak = torch.cuda.max_memory_allocated() - before
    # Gradients exist in float32 and, once scaled and rounded, in the parameters' dtype.
    kept = sum(g.numel() * 6 for g in gradients)
    assert (peak - kept) / MIB <= workspace_mb + 16


def test_rows_beyond_2_to_the_31_entries() -> None:
    rows, vocab = 8192, 262400  # 2^31 + 2^21 entries in one chunk: 8.6 GB for each model
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    hidden, weight = (torch.randn(n, 8, device="cuda") for n in (rows, vocab))
    labels = torch.randint(vocab, (rows,), device="cuda")
    call = dict(labels=labels, divergence="jsd", memory="fast")
    f32, wanted = torch.float32, (Gradients(True, False, False), Gradients(False, False, False))
    demands = [demand(8, vocab, f32, f32, (f32, f32), w, False) for w in wanted]
    assert fast_layout(rows, demands, 25000 * MIB, later=True).chunk * vocab > 2**31
    hidden.requires_grad_()
    whole = pocl_kernels.fused_linear_divergence(
        hidden, weight, hidden.detach() + 1, weight, workspace_mb=25000, **call
    )
    parts = pocl_kernels.fused_linear_divergence(hidden, weight, hidden.detach() + 1, weight, workspace_mb=500, **call)
    assert torch.allclose(whole.loss, parts.loss, rtol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(x.loss, hidden)[0] for x in (whole, parts)), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("hidden", [1536, 2304])
def test_one_row_against_a_head_in_several_slices(hidden: int) -> None:
    case = make_case(1, 32003, hidden=(hidden, hidden), dtype=torch.bfloat16)
    case = case.replace(labels=case.labels.clamp_min(0))
    truth = oracle(case)
    errors = run(case, "fast", workspace_mb=48.0).errors(truth)
    plain = pytorch(case, dtype=torch.float32, divergence="fkl").errors(truth)
    assert all(errors[gradient] <= 1.2 * plain[gradient] for gradient in ("hidden", "weight"))


def test_a_workspace_larger_than_the_card_serves_with_a_warning() -> None:
    case = make_case(64, 4099, dtype=torch.bfloat16)
    run(case, "fast", workspace_mb=1e7)  # a bound, and these rows need little of it


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_captured_by_torch_compile(mode: str) -> None:
    case = on_gpu(make_case(48, 4099))
    leaves = [case.student_hidden.clone().requires_grad_(), case.student_head.weight.clone().requires_grad_()]

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return pocl_kernels.fused_linear_divergence(
            2 * hidden, weight, case.teacher_hidden, case.teacher_head, labels=case.labels
        ).loss

    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, mode=mode)(*leaves), leaves)
    for a, b in zip(compiled, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_float16_with_a_scaler_loses_nothing_to_underflow() -> None:
    case = make_case(2048, 4099, dtype=torch.float16)
    truth = oracle(case, divergence="fkl", upstream=65536.0)
    assert_close(
        run(case, "fast", divergence="fkl", upstream=65536.0, wanted=("hidden",)),
        dataclasses.replace(truth, weight=None),
        2e-3,
    )
