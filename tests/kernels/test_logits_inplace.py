"""Logits at hand inside PyTorch: gradients over the logits, what is refused in words, processes, one graph."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import pocl
from pocl_kernels import DIVERGENCES, Head, fused_divergence, reference
from tests.kernels.test_parallel import VOCAB_SIZE, _free_port, _share

BACKENDS = ["cpu", "triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["cpu"]
X, Y = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0)).unbind()


def logits() -> Tensor:
    """The student's, no leaf."""
    return X.clone().requires_grad_() * 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_pass_needs_the_logits(backend: str, reduction: str) -> None:
    call: dict[str, Any] = dict(backend=backend, reduction=reduction)
    z = logits()
    loss = fused_divergence(z, Y, **call).loss.sum()
    once, twice = (torch.autograd.grad(loss, z, retain_graph=True)[0].clone() for _ in range(2))
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=0)
    loss = fused_divergence(z, Y, inplace=True, **call).loss.sum()
    (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
    torch.testing.assert_close(gradient, once, rtol=1e-6, atol=0)
    assert gradient.data_ptr() == z.data_ptr()
    with pytest.raises(RuntimeError, match="nothing is left to compute it from a second time: pass inplace=False"):
        torch.autograd.grad(loss, z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [True, False])
def test_logits_that_are_a_gradient_by_now_are_refused(backend: str, inplace: bool) -> None:
    z = logits()
    both = z[:3], z[3:]
    for part, teacher in zip(both, (Y[:3], Y[3:]), strict=True):  # views of one tensor, each once
        fused_divergence(part, teacher, inplace=True, backend=backend).loss.backward(retain_graph=True)
    for again in (both[0], z[:3], z[3:]):
        with pytest.raises(ValueError, match="hold the gradient that an earlier call wrote over them"):
            fused_divergence(again, Y[:3], inplace=inplace, backend=backend)


def test_logits_made_anew_in_the_same_memory_are_logits() -> None:
    z = logits()
    expected = fused_divergence(z, Y, inplace=True).loss.detach()
    with torch.no_grad():
        z.copy_(X)
        assert torch.equal(fused_divergence(z, Y).loss, expected)


def test_a_derivative_of_a_gradient_over_the_logits_is_refused() -> None:
    z = logits()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(fused_divergence(z, Y, inplace=True).loss, z, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whoever_saved_the_logits_is_told_that_they_are_gone(backend: str) -> None:
    leaf = X.clone().requires_grad_()
    z = leaf.tanh()  # which needs its result to go backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fused_divergence(z, Y, inplace=True, backend=backend).loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_change_before_the_backward_pass_are_noticed(backend: str) -> None:
    z = logits()
    loss = fused_divergence(z, Y, inplace=True, backend=backend).loss
    with torch.no_grad():
        z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_written_where_no_gradient_is_wanted(mode: Any) -> None:
    with mode():
        z = X.clone()
        assert float(pocl.fused_divergence(z, Y, inplace=True).loss) > 0
    assert torch.equal(z, X)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "leaf": (lambda: fused_divergence(X.clone().requires_grad_(), Y, inplace=True), "a leaf that requires grad"),
    "view of a leaf": (
        lambda: fused_divergence(X.clone().requires_grad_()[:3], Y[:3], inplace=True),
        "a leaf that requires grad (or a view of one)",
    ),
    "rows in one place": (
        lambda: fused_divergence(logits()[:1].expand(6, 40), Y, inplace=True),
        "rows of student_logits that do not share memory, got strides (0, 1)",
    ),
    "the teacher's memory": (
        lambda: (lambda z: fused_divergence(z[:-1], z.detach()[1:], inplace=True))(logits()),
        "would write over teacher_logits",
    ),
    "vocabulary not last": (lambda: fused_divergence(X.T, Y.T), "student_logits has stride 40 along the vocabulary"),
    "one token": (lambda: fused_divergence(X[0], Y[0]), "student_logits has shape (40,): it must be [..., vocab"),
    "no vocabulary": (lambda: fused_divergence(X[:, :0], Y), "student_logits has shape (6, 0)"),
    "token ids": (lambda: fused_divergence(X, Y.long()), "teacher_logits is torch.int64: it must be float32"),
    "nothing": (lambda: fused_divergence(None, Y), "student_logits is a NoneType"),  # type: ignore[arg-type]
    "other tokens": (lambda: fused_divergence(X[:5], Y), "teacher_logits have leading shape (6,), student_logits (5,)"),
    "another vocabulary": (lambda: fused_divergence(X[:, :20], Y), "vocabularies have 20 and 40 entries"),
    "another device": (lambda: fused_divergence(X, Y.to("meta")), "teacher_logits are on meta, student_logits on cpu"),
    "a teacher in training": (lambda: fused_divergence(X, Y.clone().requires_grad_()), "teacher_logits require grad"),
    "share without labels": (lambda: fused_divergence(X, Y, ce_weight=0.5), "needs labels"),
    "label": (lambda: fused_divergence(X, Y, labels=torch.full((6,), 40)), "labels must be in [0, 40)"),
    "backend": (lambda: fused_divergence(X, Y, backend="cuda"), "backend='cuda' must be one of"),
    "temperature": (lambda: fused_divergence(X, Y, temperature=torch.ones(5)), "temperature has shape (5,)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(what: str) -> None:
    call, message = WRONG[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_no_tokens_are_no_loss() -> None:
    z = logits()[:0]
    loss = fused_divergence(z, Y[:0]).loss
    loss.backward()
    assert not loss.detach()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_into_one_graph(inplace: bool) -> None:
    def step(leaf: Tensor) -> Tensor:
        return fused_divergence(1.5 * leaf, Y, divergence="jsd", labels=torch.arange(6), inplace=inplace).loss

    leaf = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(step(leaf), leaf)
    (gradient,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(leaf), leaf)
    torch.testing.assert_close(gradient, expected)


def _errors(rank: int, name: str, backend: str, inplace: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 7, VOCAB_SIZE, generator=generator).mul(2).unbind()
    labels = torch.randint(0, VOCAB_SIZE, (7,), generator=generator)
    labels[::4] = -100
    call: dict[str, Any] = dict(divergence=name, temperature=2.0, labels=labels, ce_weight=0.3)
    whole, eye = z.double().requires_grad_(), Head(torch.eye(VOCAB_SIZE, dtype=torch.float64))
    truth = reference.fused_linear_divergence(whole, eye, y.double(), eye, **call)
    (expected,) = torch.autograd.grad(truth.loss, whole)
    part = _share(rank, 2)
    leaf = z[:, part].clone().requires_grad_()
    out = fused_divergence(
        leaf * 1, y[:, part], backend=backend, inplace=inplace, process_group=dist.group.WORLD, **call
    )
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    pairs = [*zip(out[:4], truth[:4], strict=True), (gradient, expected[:, part])]
    return max(reference.relative_error(a, b) for a, b in pairs)


def _worker(rank: int, port: int, folder: str) -> None:
    import warnings

    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of masked lanes
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        worst = [_errors(rank, name, "cpu", False) for name in DIVERGENCES]
        worst += [_errors(rank, name, backend, True) for name in ("fkl", "jsd") for backend in BACKENDS]
        Path(folder, str(rank)).write_text(str(max(worst)))
        dist.barrier()  # nobody leaves while another may still be in a collective
    finally:
        dist.destroy_process_group()


def test_processes_that_share_the_vocabulary_have_the_loss_and_the_gradients_of_the_whole(tmp_path: Path) -> None:
    mp.spawn(_worker, (_free_port(), str(tmp_path)), nprocs=2)
    assert max(float((tmp_path / str(rank)).read_text()) for rank in range(2)) < 3e-6
