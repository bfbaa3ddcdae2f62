"""What the kernel tests share: realistic inputs, the oracle's answers, and PyTorch at the input's own precision.

``solve`` runs one loss forward and backward and returns everything it says as a :class:`Solution`; ``oracle`` does the
same with the float64 reference, ``pytorch`` with full logits and autograd in any dtype. ``assert_close`` compares two
solutions by relative norms, so that a zero gradient can never pass for a small one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pocl_kernels
from pocl_kernels import (
    DIVERGENCES,
    JSD,
    Alpha,
    AlphaBeta,
    Divergence,
    Head,
    MixedKL,
    SkewForwardKL,
    SkewReverseKL,
    reference,
)

NAMES = tuple(DIVERGENCES)
# Beside the defaults: parameters at and away from the middle, so that a swapped weight shows.
INSTANCES: dict[str, str | Divergence] = {
    **{name: name for name in NAMES},
    "skew_fkl(0)": SkewForwardKL(0.0),
    "skew_fkl(0.7)": SkewForwardKL(0.7),
    "skew_rkl(0)": SkewReverseKL(0.0),
    "skew_rkl(0.7)": SkewReverseKL(0.7),
    "jsd(0.1)": JSD(0.1),
    "jsd(0.9)": JSD(0.9),
    "alpha(0.2)": Alpha(0.2),
    "alpha(0.8)": Alpha(0.8),
    # The ends of a family are its limits.
    "jsd(0)": JSD(0.0),
    "jsd(1)": JSD(1.0),
    "alpha(0)": Alpha(0.0),
    "alpha(1)": Alpha(1.0),
    "alpha_beta(1, 0.5)": AlphaBeta(1.0, 0.5),
    "alpha_beta(0, 0.6)": AlphaBeta(0.0, 0.6),
    "alpha_beta(0.6, 0)": AlphaBeta(0.6, 0.0),
    "mixed_kl(0.9)": MixedKL(0.9),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Inputs of one loss; ``labels`` has ignored rows. Equal to itself alone, so that answers can be kept by case."""

    student_hidden: Tensor
    student_head: Head
    teacher_hidden: Tensor
    teacher_head: Head
    labels: Tensor

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def to(self, dtype: torch.dtype) -> Case:
        heads = [
            dataclasses.replace(
                head, weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype)
            )
            for head in (self.student_head, self.teacher_head)
        ]
        return Case(self.student_hidden.to(dtype), heads[0], self.teacher_hidden.to(dtype), heads[1], self.labels)

    def rows(self, index: Any) -> Case:
        return self.replace(
            student_hidden=self.student_hidden[index],
            teacher_hidden=self.teacher_hidden[index],
            labels=self.labels[index],
        )


@functools.cache
def make_case(
    rows: int = 24,
    vocab: int = 1031,
    *,
    hidden: tuple[int, int] = (24, 40),
    dtype: torch.dtype = torch.float32,
    near: float | None = None,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    teacher_vocab: int | None = None,
    spread: float | None = None,
    seed: int = 0,
) -> Case:
    """Logits like a language model's: a Zipf unigram that both models know, and noise of their own of deviation 2.

    ``spread``: of a flat unigram's logits instead, both models' own, as peaked as trained models are at 5.

    With ``near`` the student is the teacher up to a noise on the logits that gives a KL of about ``near``. Read only.
    """
    g = torch.Generator().manual_seed(seed)
    entries = max(vocab, teacher_vocab or 0)
    unigram = -torch.log(torch.randperm(entries, generator=g) + 10.0)
    unigram -= unigram.mean()

    def half(size: int, entries: int) -> tuple[Tensor, Head]:
        h = torch.randn(rows, size, generator=g)
        w = torch.randn(entries, size, generator=g) * ((spread or 2.0) / math.sqrt(size))
        if spread is None:
            h[:, 0], w[:, 0] = 1.0, unigram[:entries]
        b = torch.randn(entries, generator=g) if bias else None
        return h, Head(w / scale, b, scale, softcap)

    teacher_hidden, teacher_head = half(hidden[1], teacher_vocab or vocab)
    if near is None:
        student_hidden, student_head = half(hidden[0], vocab)
    else:
        noise = torch.randn(teacher_head.weight.shape, generator=g) * math.sqrt(2 * near / hidden[1])
        student_hidden = teacher_hidden.clone()
        student_head = dataclasses.replace(teacher_head, weight=teacher_head.weight + noise / scale)
    labels = torch.randint(0, min(vocab, teacher_vocab or vocab), (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < 0.3] = -100
    return Case(student_hidden, student_head, teacher_hidden, teacher_head, labels).to(dtype)


@dataclasses.dataclass(frozen=True)
class Solution:
    """Everything one loss says. Gradients are None where they were not asked for."""

    loss: Tensor
    divergence: Tensor | None
    cross_entropy: Tensor | None
    student_entropy: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    teacher_entropy: Tensor | None = None
    accuracy: Tensor | None = None

    GRADIENTS = ("hidden", "weight", "bias")

    def errors(self, truth: Solution) -> dict[str, float]:
        """Relative norm of the difference, for everything that either of the two holds."""
        result = {}
        for field in dataclasses.fields(self):
            mine, other = getattr(self, field.name), getattr(truth, field.name)
            if mine is not None or other is not None:
                assert mine is not None, f"no {field.name}"
                assert other is not None, f"unexpected {field.name}"
                result[field.name] = reference.relative_error(mine, other)
        return result


Loss = Callable[..., Any]


def solve(
    loss: Loss,
    case: Case,
    *,
    wanted: tuple[str, ...] = Solution.GRADIENTS,
    upstream: float | Tensor = 1.0,
    labels: bool = True,
    **arguments: Any,
) -> Solution:
    """Forward and, for the gradients ``wanted``, backward of ``loss`` on fresh leaves. ``labels=False`` passes none."""
    head = case.student_head
    leaves = {"hidden": case.student_hidden, "weight": head.weight, "bias": head.bias}
    for name, leaf in leaves.items():
        if leaf is not None:
            leaves[name] = leaf.detach().clone().requires_grad_(name in wanted)
    head = dataclasses.replace(head, weight=leaves["weight"], bias=leaves["bias"])
    if labels:
        arguments = {"labels": case.labels} | arguments
    out = loss(leaves["hidden"], head, case.teacher_hidden, case.teacher_head, **arguments)
    if wanted:
        out.loss.backward(torch.as_tensor(upstream, dtype=out.loss.dtype).expand(out.loss.shape))
    grads = {name: None if leaf is None else leaf.grad for name, leaf in leaves.items()}
    parts = (None if x is None else x.detach() for x in out[:4])
    more = (None if x is None else x.detach() for x in (out.teacher_entropy, out.accuracy))
    return Solution(*parts, *grads.values(), *more)


@functools.lru_cache(maxsize=256)
def oracle(case: Case, *, divergence: str | Divergence = "fkl", **arguments: Any) -> Solution:
    """The float64 reference on the same numbers."""
    name, parameters = by_name(divergence)
    call = functools.partial(reference.fused_linear_divergence, divergence=name, **parameters)
    return solve(call, case.to(torch.float64), **arguments)


def by_name(divergence: str | Divergence) -> tuple[str, dict[str, float]]:
    """The reference's spelling of a divergence."""
    if isinstance(divergence, str):
        return divergence, {}
    name = next(name for name, kind in DIVERGENCES.items() if type(divergence) is kind)
    return name, {f.name: getattr(divergence, f.name) for f in dataclasses.fields(divergence)}


@functools.lru_cache(maxsize=256)
def pytorch(
    case: Case,
    *,
    divergence: str | Divergence,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    after: torch.dtype | None = None,
    **arguments: Any,
) -> Solution:
    """Full logits and autograd in ``dtype``, the way one writes it without this package: the error to measure against.

    With ``after`` everything behind the logits is done in that dtype: what is left is the error of the logits. The
    gradients come back in the dtype of the case, as autograd's would.
    """
    after = after or dtype

    def loss(hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher_head: Head, labels: Tensor) -> Any:
        valid = labels != -100
        z = _logits(hidden[valid], head, dtype).to(after)
        l = torch.log_softmax(z / temperature, -1)
        y = _logits(teacher_hidden[valid], teacher_head, dtype).to(after)
        r = torch.log_softmax(y / temperature, -1)
        d = _textbook(divergence, l, r).mean()
        ce = F.cross_entropy(z, labels[valid])
        entropy = -(l.exp() * l).sum(-1).mean()
        teacher_entropy = -(r.exp() * r).sum(-1).mean()
        accuracy = (z.argmax(-1) == labels[valid]).double().mean()
        return pocl_kernels.DivergenceOutput(d * temperature**2, d, ce, entropy, valid.sum(), teacher_entropy, accuracy)

    return solve(loss, case, **arguments)


def _logits(hidden: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    z = F.linear(hidden.to(dtype), head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _textbook(divergence: str | Divergence, l: Tensor, r: Tensor) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    def mix(a: Tensor, b: Tensor, weight: float) -> Tensor:
        return torch.logaddexp(a + math.log(weight), b + math.log(1 - weight))

    instance = DIVERGENCES[divergence]() if isinstance(divergence, str) else divergence
    name = next(name for name, kind in DIVERGENCES.items() if kind is type(instance))
    x = next(iter(instance.parameters()), 0.5)  # skew, beta or alpha
    p, q, m = r.exp(), l.exp(), mix(r, l, x)
    if name == "alpha_beta":
        a, b = instance.parameters()
        n = a + b
        return -((a * r + b * l).exp() - a / n * (n * r).exp() - b / n * (n * l).exp()).sum(-1) / (a * b)
    return {
        "mixed_kl": lambda: x * kl(r, l) + (1 - x) * kl(l, r),
        "fkl": lambda: kl(r, l),
        "rkl": lambda: kl(l, r),
        "skew_fkl": lambda: kl(r, m),
        "skew_rkl": lambda: kl(l, mix(l, r, x)),
        "jsd": lambda: x * kl(r, m) + (1 - x) * kl(l, m),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
        "jeffreys": lambda: kl(r, l) + kl(l, r),
        "alpha": lambda: (1 - (x * r + (1 - x) * l).exp().sum(-1)) / (x * (1 - x)),
    }[name]()


def assert_close(result: Solution, truth: Solution, tolerance: float) -> None:
    """Every value and gradient within ``tolerance`` of the truth, relative to the norm of the truth."""
    errors = result.errors(truth)
    wrong = {name: f"{error:.2e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance:.1e}: {wrong}"
