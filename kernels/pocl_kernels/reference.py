"""The oracle: every loss of this package in plain float64 PyTorch, to be checked by eye.

Full logits, autograd, textbook formulas, no code shared with the kernels. Slow, and right. Every kernel test compares
with this file; it is not used anywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_kernels.head import Head, as_head
from pocl_kernels.output import CrossEntropyOutput, DivergenceOutput
from pocl_kernels.sparse import SparseTeacher


def logits(hidden: Tensor, head: Head | Tensor) -> Tensor:
    """In float64, ``[N, V]``."""
    head = as_head(head)
    z = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        z = z + head.bias.double()
    z = head.scale * z
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def log_probabilities(hidden: Tensor, head: Head | Tensor, temperature: float, vocab_size: int) -> Tensor:
    """``log softmax(logits / temperature)`` in float64 over the first ``vocab_size`` tokens: ``[N, vocab_size]``."""
    return torch.log_softmax(logits(hidden, head)[:, :vocab_size] / temperature, dim=-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a, b) of each row, 0 log 0 = 0; where a or b does not sum to one, the generalised KL."""
    a, b = log_a.exp(), log_b.exp()
    return (torch.where(a > 0, a * (log_a - log_b), 0.0) - a + b).sum(-1)


def entropy_of(log_a: Tensor) -> Tensor:
    """Of each row, nats; 0 log 0 = 0."""
    return -torch.where(log_a.exp() > 0, log_a.exp() * log_a, 0.0).sum(-1)


def log_mix(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b)."""
    weights = torch.tensor([weight, 1 - weight], dtype=torch.float64).log()
    return torch.logaddexp(log_a + weights[0], log_b + weights[1])


def divergence_rows(name: str, l: Tensor, r: Tensor, **parameters: float) -> Tensor:
    """D of each row from the student's log-probabilities ``l`` and the teacher's ``r``, by its definition."""
    p, q = r.exp(), l.exp()
    if name == "fkl":
        return kl(r, l)
    if name == "rkl":
        return kl(l, r)
    if name == "skew_fkl":
        return kl(r, log_mix(r, l, parameters.get("skew", 0.1)))
    if name == "skew_rkl":
        return kl(l, log_mix(l, r, parameters.get("skew", 0.1)))
    if name == "jsd":
        beta = parameters.get("beta", 0.5)
        if beta in (0, 1):  # the limits of JSD / beta and JSD / (1 - beta)
            return kl(l, r) if beta else kl(r, l)
        m = log_mix(r, l, beta)
        return beta * kl(r, m) + (1 - beta) * kl(l, m)
    if name == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    if name == "jeffreys":
        return kl(r, l) + kl(l, r)
    if name == "alpha":
        a = parameters.get("alpha", 0.5)
        if a in (0, 1):
            return kl(r, l) if a else kl(l, r)
        # Written over p and q themselves; 1 = sum (a p + (1 - a) q) keeps the float64 digits of a small divergence.
        return (a * p + (1 - a) * q - p**a * q ** (1 - a)).sum(-1) / (a * (1 - a))
    if name == "mixed_kl":
        w = parameters.get("weight", 0.5)
        return kl(r, l) if w == 1 else kl(l, r) if w == 0 else w * kl(r, l) + (1 - w) * kl(l, r)
    if name == "alpha_beta":
        a, b = parameters.get("alpha", 0.2), parameters.get("beta", 0.7)
        if b == 0:  # ABKD's equation for this limit; the other is the same with p and q exchanged
            return (torch.where(p > 0, p**a * a * (r - l), 0.0) - p**a + q**a).sum(-1) / a**2
        if a == 0:
            return (q**b * b * (l - r) - q**b + p**b).sum(-1) / b**2
        return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)
    raise ValueError(f"the reference knows no divergence {name!r}")


def sparse_log_probabilities(
    l: Tensor, ids: Tensor, log_probs: Tensor, tail: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """One row's outcomes: log-probabilities of the student and of a sparse teacher.

    ``l``: ``[V]``, tempered; ``ids`` and ``log_probs``: ``[K]`` at temperature 1, -1 is padding.
    """
    eps = torch.finfo(log_probs.dtype).eps
    log_probs, ids = log_probs[ids >= 0].double(), ids[ids >= 0]
    p, V = log_probs.exp(), l.shape[0]
    others = torch.ones(V, dtype=torch.bool).index_fill(0, ids, False)
    rest = int(others.sum())
    # What the other tokens have; rounding may hide half an ulp of each log-probability, and of 1 in float32.
    missing = 1.0 - p.sum()
    least = eps / 2 * (p * log_probs.clamp_min(-1e30)).abs().sum() + min(eps, torch.finfo(torch.float32).eps) / 2
    missing = torch.maximum(missing, least)

    teacher = torch.zeros(V, dtype=torch.float64)
    teacher[ids] = p
    if tail in ("bucket", "uniform") and rest:
        teacher[others] = missing / rest
    teacher = teacher ** (1.0 / temperature)
    if tail != "zero":
        teacher = teacher / teacher.sum()
    if tail != "bucket" or not rest:
        return l, teacher.log()
    return (
        torch.cat([l[ids], l[others].logsumexp(0, keepdim=True)]),
        torch.cat([teacher[ids], teacher[others].sum().reshape(1)]).log(),
    )


def fused_linear_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor | SparseTeacher,
    teacher_head: Head | Tensor | None = None,
    *,
    divergence: str = "fkl",
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    ce_weight: float = 0.0,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    **parameters: float,
) -> DivergenceOutput:
    """The same contract as :func:`pocl_kernels.fused_linear_divergence`, in float64. ``parameters``: skew, beta,
    alpha.
    """
    shape = student_hidden.shape[:-1]
    student_head, hs = as_head(student_head), student_hidden.reshape(-1, student_hidden.shape[-1])
    n = hs.shape[0]
    valid = torch.ones(n, dtype=torch.bool) if labels is None else labels.reshape(-1) != ignore_index
    weight = torch.ones(n).double() if token_weight is None else token_weight.reshape(-1).double()
    hs, weight = hs[valid], weight[valid]

    if isinstance(teacher_hidden, SparseTeacher):
        vocab_size = min(student_head.vocab_size, teacher_hidden.vocab_size or student_head.vocab_size)
        l = log_probabilities(hs, student_head, temperature, vocab_size)
        ids, log_probs = (x.flatten(0, -2)[valid] for x in (teacher_hidden.token_ids, teacher_hidden.log_probs))
        rows = [
            sparse_log_probabilities(*row, teacher_hidden.tail, temperature)
            for row in zip(l, ids.long(), log_probs.detach(), strict=True)
        ]
        d = torch.stack([divergence_rows(divergence, a, b, **parameters) for a, b in rows]) if rows else l.sum(-1)
        teacher_entropy = torch.stack([entropy_of(r) for _, r in rows]) if rows else l.sum(-1)
    else:
        assert teacher_head is not None
        teacher_head, ht = as_head(teacher_head), teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
        vocab_size = min(student_head.vocab_size, teacher_head.vocab_size)
        l = log_probabilities(hs, student_head, temperature, vocab_size)
        r = log_probabilities(ht[valid], teacher_head, temperature, vocab_size).detach()
        d, teacher_entropy = divergence_rows(divergence, l, r, **parameters), entropy_of(r)
    entropy = entropy_of(l)
    ce = accuracy = None
    if labels is not None:
        l1 = log_probabilities(hs, student_head, 1.0, vocab_size)
        ce = -l1.gather(-1, labels.reshape(-1)[valid][:, None]).squeeze(-1)
        accuracy = (-ce == l1.amax(-1)).double()
    loss = d * (temperature**2 if scale_by_temperature else 1.0)
    if ce is not None:
        loss = (1 - ce_weight) * loss + ce_weight * ce

    count = int(valid.sum())

    def reduce(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        if reduction == "none":
            return torch.zeros(n, dtype=torch.float64).masked_scatter(valid, rows * weight).reshape(shape)
        total = (rows * weight).sum()
        if reduction == "sum":
            return total
        return total / (max(count, 1) if normalizer is None else normalizer)

    parts = {
        "loss": reduce(loss),
        "divergence": reduce(d),
        "cross_entropy": reduce(ce),
        "student_entropy": reduce(entropy),
        "teacher_entropy": reduce(teacher_entropy),
        "accuracy": reduce(accuracy),
    }
    parts = {k: v if k == "loss" or v is None else v.detach() for k, v in parts.items()}
    return DivergenceOutput(**parts, num_tokens=torch.tensor(count))  # type: ignore[arg-type]


def fused_linear_cross_entropy(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> CrossEntropyOutput:
    """The same contract as :func:`pocl_kernels.fused_linear_cross_entropy` with ``parts``, in float64."""
    head, flat = as_head(head), labels.reshape(-1)
    valid = flat != ignore_index
    weight = torch.ones(len(flat)).double() if token_weight is None else token_weight.reshape(-1).double()
    z = logits(hidden.reshape(-1, hidden.shape[-1])[valid], head)
    lse = torch.logsumexp(z, -1)
    ce = lse - z.gather(-1, flat[valid][:, None]).squeeze(-1)
    # The target is (1 - smoothing) 1[label] + smoothing / V.
    loss = (1 - label_smoothing) * ce + z_loss * lse**2
    if label_smoothing:
        loss = loss + label_smoothing * (lse - z.mean(-1))
    right = (z.gather(-1, flat[valid][:, None]).squeeze(-1) == z.amax(-1)).double()
    count = int(valid.sum())

    def reduce(rows: Tensor) -> Tensor:
        rows = rows * weight[valid]
        if reduction == "none":
            return torch.zeros(len(flat), dtype=torch.float64).masked_scatter(valid, rows).reshape(labels.shape)
        return rows.sum() / ((normalizer or max(count, 1)) if reduction == "mean" else 1)

    ce, lse, right = (reduce(rows).detach() for rows in (ce, lse, right))
    return CrossEntropyOutput(reduce(loss), ce, lse, right, torch.tensor(count))


def divergence_names() -> tuple[str, ...]:
    """The names :func:`divergence_rows` knows."""
    return ("fkl", "rkl", "skew_fkl", "skew_rkl", "jsd", "tvd", "jeffreys", "alpha", "alpha_beta", "mixed_kl")


def relative_error(result: Tensor, oracle: Tensor) -> float:
    """Norm of the difference over the norm of the oracle, both in float64: the judge of every exactness test."""
    result, oracle = result.detach().double(), oracle.detach().double()
    return float((result - oracle).norm() / oracle.norm().clamp_min(torch.finfo(torch.float64).tiny))
