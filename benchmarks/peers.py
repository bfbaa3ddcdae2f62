"""Other implementations of the loss that `bench_loss` compares with, as a user would call them; all optional.

All average over valid tokens and leave out the factor T^2 of the distillation literature, so it is applied here: the
results of all implementations agree.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

# tensors: student hidden [N, H_s], student weight [V, H_s], teacher hidden, teacher weight, labels [N]; temperature
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def trl(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor, T: float) -> Tensor:
    """TRL's `ChunkedDivergenceFunction` at beta = 0, the forward KL, on the valid rows."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    valid = labels != -100
    rows, _ = ChunkedDivergenceFunction.apply(hidden[valid], weight, None, teacher[valid], teacher_weight, None, 0.0, T)
    return T**2 * rows.mean()


def liger(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor, T: float) -> Tensor:
    """Liger's `LigerFusedLinearJSDLoss` at beta = 0, the forward KL, without its default share of hard labels."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=T, compiled=hidden.is_cuda
    )
    soft = loss(hidden, weight, teacher, teacher_weight, labels)
    assert isinstance(soft, Tensor)
    return T**2 * soft


def authors(
    hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor, T: float
) -> Tensor:
    """As the authors' training loop: full float32 logits of every position, a mask over the products."""
    student_logits, teacher_logits = hidden @ weight.T, (teacher @ teacher_weight.T).detach()
    p = torch.softmax(teacher_logits / T, -1, dtype=torch.float32)
    log_p = torch.log_softmax(teacher_logits / T, -1, dtype=torch.float32)
    log_q = torch.log_softmax(student_logits / T, -1, dtype=torch.float32)
    infinite = torch.isinf(student_logits)
    rows = torch.masked_fill(p * (log_p - log_q), infinite, 0.0).sum(-1)
    valid = (labels != -100).float()
    return T**2 * (rows * valid).sum() / valid.sum()


def compile(
    hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor, T: float
) -> Tensor:
    """Full logits of the valid rows, compiled by `torch.compile` for these shapes; needs a C++ compiler on a CPU."""
    valid = labels != -100
    return _compiled(len(labels), len(weight))(hidden[valid], weight, teacher[valid], teacher_weight, T)


@functools.cache
def _compiled(tokens: int, vocabulary: int) -> Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]:
    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, T: float) -> Tensor:
        student = torch.log_softmax((hidden @ weight.T).float() / T, -1)
        target = torch.log_softmax((teacher @ teacher_weight.T).float() / T, -1)
        return T**2 * torch.nn.functional.kl_div(student, target, log_target=True, reduction="batchmean")

    torch.compiler.reset()  # or the cache of a process that goes through many shapes fills, and eager code runs instead
    return torch.compile(loss, dynamic=False)


PEERS: dict[str, tuple[str, Loss, str]] = {
    "compile": ("torch.compile, full logits", compile, "torch"),
    "trl": ("TRL ChunkedDivergenceFunction", trl, "trl"),
    "liger": ("Liger LigerFusedLinearJSDLoss", liger, "liger_kernel"),
    "authors": ("the POCL authors' loss", authors, "torch"),
}


def available(names: list[str]) -> dict[str, Loss]:
    """The wanted peers by their titles.

    Raises:
        ValueError: a name is unknown, or its package is not installed.
    """
    chosen = {}
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer {name!r}: expected some of {', '.join(PEERS)}")
        title, loss, package = PEERS[name]
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"peer {name!r} needs the package {package}: pip install -c constraints.txt -e '.[bench]'")
        chosen[title] = loss
    return chosen
