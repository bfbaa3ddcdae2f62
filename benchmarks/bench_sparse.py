"""The loss of a sparse teacher, forward and backward, against its floor and against top-k losses on full logits.

    python -m benchmarks.bench_sparse                                # two default shapes, K = 64
    python -m benchmarks.bench_sparse --peers trl --save
    python -m benchmarks.bench_sparse --tokens 512 --vocab 32000 --hidden 256 --k 16

The floor is three matrix products over the valid rows (student logits, gradient of the hidden states, gradient of the
weight) and nothing else. Half of the labels are ignored, as in a batch of prompts and responses, or the share that
`--ignored` says. The teacher is near the student, as in training, and its K likeliest tokens are known. "eager" is the
forward KL over K + 1 outcomes on full logits; "trl" is TRL's loss of teachers on a server on the student's full
log-softmax, `ServerDistillationTrainer._compute_server_forward_kl_loss` with its tail. Every implementation is checked
against float64 before it is timed. "beyond" is the peak less the two gradients, which every method returns.
"""

import argparse
import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pocl
from benchmarks.measure import interleaved, machine, peak_bytes, save_results
from benchmarks.problems import make_problem
from pocl_kernels import reference

SHAPES = ((1024, 49152, 576), (512, 151936, 896))  # tokens, vocabulary, hidden size
Answer = tuple[Tensor, Tensor, Tensor]  # loss, gradients of hidden states and weight


@dataclass(frozen=True)
class SparseProblem:
    """A student's hidden states [N, H], head [V, H] and labels; what a teacher near it says of K tokens [N, K]."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    log_probs: Tensor
    labels: Tensor  # [N], -100: ignored

    def rows(self, index: Any) -> "SparseProblem":
        return SparseProblem(
            self.hidden[index], self.weight, self.ids[index], self.log_probs[index], self.labels[index]
        )


def make_sparse(tokens: int, vocabulary: int, hidden: int, K: int, ignored: float) -> SparseProblem:
    problem = make_problem(tokens, vocabulary, hidden, hidden)
    logits = problem.teacher_hidden @ problem.teacher_weight.T
    best = torch.log_softmax(logits, -1).topk(K, -1)
    labels = best.indices[:, 0].clone()
    labels[torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[: int(ignored * tokens)]] = -100
    return SparseProblem(problem.student_hidden, problem.student_weight, best.indices, best.values, labels)


def floor(problem: SparseProblem) -> None:
    """The three matrix products alone, whole, as plain PyTorch does them."""
    hidden = problem.hidden[problem.labels != -100]
    logits = hidden @ problem.weight.T
    logits @ problem.weight
    logits.T @ hidden


def through_autograd(loss: Callable[[Tensor, Tensor, SparseProblem], Tensor], problem: SparseProblem) -> Answer:
    """A loss of hidden states and weight, forward and backward on fresh leaves."""
    hidden, weight = problem.hidden.detach().requires_grad_(), problem.weight.detach().requires_grad_()
    value = loss(hidden, weight, problem)
    value.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return value.detach(), hidden.grad, weight.grad


def fused(hidden: Tensor, weight: Tensor, problem: SparseProblem, divergence: str = "fkl", tail: str = "bucket") -> Any:
    """Ours."""
    teacher = pocl.SparseTeacher(problem.ids, problem.log_probs, tail=tail)
    return pocl.fused_linear_divergence(hidden, weight, teacher, divergence=divergence, labels=problem.labels).loss


def eager(hidden: Tensor, weight: Tensor, problem: SparseProblem) -> Tensor:
    """The textbook's forward KL over K + 1 outcomes, the student's tail as 1 less the sum, on full logits."""
    l = torch.log_softmax(hidden @ weight.T, -1).gather(-1, problem.ids)
    p, rest = problem.log_probs.exp(), (1.0 - problem.log_probs.exp().sum(-1)).clamp_min(1e-7)
    tail = (1.0 - l.exp().sum(-1)).clamp_min(1e-7)
    rows = (p * (problem.log_probs - l)).sum(-1) + rest * (rest / tail).log()
    return rows[problem.labels != -100].mean()


def trl(hidden: Tensor, weight: Tensor, problem: SparseProblem) -> Tensor:
    """TRL's loss of a teacher on a server, with the tail as one outcome."""
    from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer as Trainer

    trainer = types.SimpleNamespace(loss_add_tail=True, _reduce_divergence_loss=Trainer._reduce_divergence_loss)
    teacher = {"topk_logprobs": problem.log_probs[None], "topk_token_ids": problem.ids[None]}
    l = torch.log_softmax(hidden @ weight.T, -1)[None]
    value = Trainer._compute_server_forward_kl_loss(trainer, teacher, l, problem.labels[None])
    assert isinstance(value, Tensor)
    return value


PEERS: dict[str, tuple[str, Callable[[Tensor, Tensor, SparseProblem], Tensor]]] = {
    "eager": ("eager torch, full logits", eager),
    "trl": ("TRL, a served teacher's top k", trl),
}


def truth(problem: SparseProblem) -> Answer:
    """The reference in float64."""

    def loss(hidden: Tensor, weight: Tensor, problem: SparseProblem) -> Tensor:
        teacher = pocl.SparseTeacher(problem.ids, problem.log_probs)
        return reference.fused_linear_divergence(hidden, weight, teacher, labels=problem.labels).loss

    double = SparseProblem(
        problem.hidden.double(), problem.weight.double(), problem.ids, problem.log_probs, problem.labels
    )
    return through_autograd(loss, double)


def compare(
    shape: tuple[int, int, int], K: int, ignored: float, runs: int, peers: Sequence[str], others: Sequence[str]
) -> dict[str, Any]:
    """Check, time and print; returns what was printed."""
    (tokens, vocabulary, size), problem = shape, make_sparse(*shape, K, ignored)
    functions: dict[str, Callable[[], Any]] = {"floor": lambda: floor(problem)}
    functions["pocl"] = lambda: through_autograd(fused, problem)
    functions |= {PEERS[name][0]: (lambda f=PEERS[name][1]: through_autograd(f, problem)) for name in peers}  # type: ignore[misc]
    few = problem.rows(slice(0, 32))  # full logits in float64
    exact, errors = truth(few), {}
    for name, loss in [("pocl", fused), *(PEERS[name] for name in peers)]:
        found = through_autograd(loss, few)
        errors[name] = max(reference.relative_error(a, b) for a, b in zip(found, exact, strict=True))
        if not errors[name] < 1e-2:
            raise RuntimeError(f"{name} does not compute the forward KL of the others: error {errors[name]:.1e}")
    for other in others:
        divergence, _, tail = other.partition("/")
        own = dict(divergence=divergence, tail=tail or "bucket")
        loss = functools.partial(fused, **own)
        functions[f"pocl, {other}"] = functools.partial(through_autograd, loss, problem)
    timings = interleaved(functions, runs)
    print(f"\n{tokens} tokens, {ignored:.0%} ignored; K = {K}; vocabulary {vocabulary}; hidden {size}; float32")
    print(f"{'':32}{'median':>10}{'spread':>9}{'/ floor':>9}{'peak':>10}{'beyond':>10}{'error':>11}")
    gradients, rows = 4 * (problem.hidden.numel() + problem.weight.numel()), {}
    for name, timing in timings.items():
        peak = peak_bytes(functions[name])
        rows[name] = {"seconds": timing.samples, "peak_bytes": peak, "error": errors.get(name)}
        line = f"{name:32}{timing.median:>8.3f} s{100 * timing.spread:>7.1f} %"
        line += f"{timing.median / timings['floor'].median:>9.2f}"
        if peak is None or name == "floor":
            line += " " * 20
        else:
            line += f"{peak / 2**20:>6.0f} MiB{(peak - gradients) / 2**20:>6.0f} MiB"
        print(f"{line}{errors[name]:>11.1e}" if name in errors else line)
    settings = {"tokens": tokens, "ignored": ignored, "vocabulary": vocabulary, "hidden": size, "K": K}
    return settings | {"dtype": "float32", "gradient_bytes": gradients, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=SHAPES[0][0], help=f"with --vocab (default: {SHAPES[0][0]})")
    parser.add_argument("--vocab", type=int, help="rows of the head (default: two shapes)")
    parser.add_argument("--hidden", type=int, default=SHAPES[0][2], help=f"with --vocab (default: {SHAPES[0][2]})")
    parser.add_argument("--k", type=int, default=64, help="tokens of the teacher (default: 64)")
    parser.add_argument("--ignored", type=float, default=0.5, help="share of the labels, in [0, 1) (default: 0.5)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--peers", default="", help=f"comma-separated, of {', '.join(PEERS)} (default: none)")
    parser.add_argument("--others", default="", help="comma-separated: jsd, fkl/uniform, ... to time beside fkl/bucket")
    parser.add_argument("--save", action="store_true", help="file the result under benchmarks/results")
    options = parser.parse_args()
    peers, others = ([name for name in text.split(",") if name] for text in (options.peers, options.others))
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))}; known are {', '.join(PEERS)}")
    if not 0.0 <= options.ignored < 1.0:
        parser.error("--ignored is a share in [0, 1)")
    print(machine())
    for shape in SHAPES if options.vocab is None else [(options.tokens, options.vocab, options.hidden)]:
        result = compare(shape, options.k, options.ignored, options.runs, peers, others)
        if options.save:
            name = f"V = {shape[1]}, K = {options.k}, {options.ignored:.0%} ignored"
            print(f"filed in {save_results('sparse', {name: result})}")


if __name__ == "__main__":
    main()
