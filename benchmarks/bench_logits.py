"""The divergence of logits at hand against what a trainer would use otherwise: time and peak memory.

    python -m benchmarks.bench_logits [--save]
    python -m benchmarks.bench_logits --tokens 4096 --vocab 128256 --dtype bfloat16 --peers eager,compile,liger

Forward and backward to the student's logits, all rows valid, temperature 2. Peak memory is beyond both models' logits;
the gradient, of the size of one, is part of it unless it is written over them (``inplace``). The floor reads both
logits once and writes the gradient once: no implementation can do with less. Liger's kernels need a GPU.
"""

import argparse
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pocl
from benchmarks.measure import interleaved, machine, peak_bytes, save_results
from benchmarks.problems import TEMPERATURE

DIVERGENCES = ("fkl", "jsd", "tvd")
PEERS = ("eager", "compile", "liger")
CHECKED = 16  # rows, against float64

Loss = Callable[[Tensor, Tensor], Tensor]  # student's logits, teacher's -> loss


def plain(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The formula in PyTorch, in the dtype of its inputs."""
    l, r = (torch.log_softmax(z / TEMPERATURE, -1) for z in (student, teacher))
    if name == "fkl":
        loss = torch.nn.functional.kl_div(l, r, log_target=True, reduction="batchmean")
    elif name == "jsd":
        m = torch.logaddexp(l, r) - math.log(2.0)
        halves = (torch.nn.functional.kl_div(m, x, log_target=True, reduction="batchmean") for x in (l, r))
        loss = 0.5 * sum(halves)
    else:
        loss = 0.5 * (l.exp() - r.exp()).abs().sum() / len(l)
    return TEMPERATURE**2 * loss


def eager(name: str) -> Loss:
    """As most trainers write it: logits of 16 bits are made float32 first."""
    return lambda student, teacher: plain(name, student.float(), teacher.float())


@functools.cache
def compile(name: str) -> Loss:
    torch.compiler.reset()
    return torch.compile(eager(name), dynamic=False)


def liger(name: str) -> Loss:
    """Liger's kernels on logits at hand, each as its own documentation calls it. GPUs only."""
    from liger_kernel.transformers.jsd import LigerJSD
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss
    from liger_kernel.transformers.tvd import LigerTVDLoss

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        l, r = (torch.log_softmax(z.float() / TEMPERATURE, -1) for z in (student, teacher))
        if name == "fkl":
            found = LigerKLDIVLoss(reduction="batchmean", log_target=True)(l, r)
        elif name == "jsd":
            found = LigerJSD(beta=0.5)(l, r)
        else:
            found = LigerTVDLoss(reduction="batchmean")(l.exp(), r.exp())
        return TEMPERATURE**2 * found  # type: ignore[no-any-return]

    return loss


MAKERS: dict[str, tuple[str, Callable[[str], Loss]]] = {
    "eager": ("eager torch", eager),
    "compile": ("torch.compile", compile),
    "liger": ("Liger", liger),
}


def reason(peer: str) -> str | None:
    """Why a peer cannot run here; None if it can."""
    if peer != "liger":
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger_kernel is not installed"
    return None if torch.cuda.is_available() else "its kernels need a GPU"


def ours(name: str, *, inplace: bool = False) -> Loss:
    return lambda student, teacher: (
        pocl.fused_divergence(student, teacher, divergence=name, temperature=TEMPERATURE, inplace=inplace).loss
    )


class Logits:
    """Logits of a student near its teacher."""

    def __init__(self, tokens: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        teacher = 2.0 * torch.randn(tokens, vocabulary, generator=generator)
        student = teacher + 0.5 * torch.randn(tokens, vocabulary, generator=generator)
        self.teacher, self.student = teacher.to(device, dtype), student.to(device, dtype)
        self.buffer = torch.empty_like(self.teacher)  # for results that a run need not make room for

    def floor(self) -> None:
        """Two read, one written."""
        torch.add(self.student, self.teacher, out=self.buffer)

    def gradient(self, loss: Loss, rows: slice = slice(None)) -> Tensor:
        """Forward and backward of some rows."""
        leaf = self.student[rows].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, self.teacher[rows]), leaf)
        return gradient

    def over_the_logits(self, loss: Loss) -> None:
        """As :meth:`gradient`, of logits that a model has just made and that the gradient may be written over."""
        made = _Made.apply(torch.zeros((), device=self.buffer.device, requires_grad=True), self.buffer)
        loss(made, self.teacher).backward()

    def error(self, name: str, loss: Loss) -> float:
        """Relative norm error of the gradient of the first rows, against float64."""
        rows = slice(0, CHECKED)
        leaf = self.student[rows].double().requires_grad_()
        (truth,) = torch.autograd.grad(plain(name, leaf, self.teacher[rows].double()), leaf)
        return float((self.gradient(loss, rows).double() - truth).norm() / truth.norm())


class _Made(torch.autograd.Function):
    """Stands for the model whose output the logits are."""

    @staticmethod
    def forward(ctx: Any, cause: Tensor, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        return None, None


def compare(tokens: int, vocabulary: int, dtype: torch.dtype, peers: list[str], runs: int) -> dict[str, Any]:
    """Check, time and print all; returns what was printed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = Logits(tokens, vocabulary, dtype, device)
    failed = {MAKERS[peer][0]: why for peer in peers if (why := reason(peer)) is not None}
    losses = {f"pocl, {name}": (name, ours(name)) for name in DIVERGENCES}
    for peer in peers:
        if reason(peer) is None:
            title, maker = MAKERS[peer]
            losses |= {f"{title}, {name}": (name, maker(name)) for name in DIVERGENCES}
    errors: dict[str, float] = {}
    for title, (name, loss) in list(losses.items()):
        try:
            errors[title] = logits.error(name, loss)
        except (RuntimeError, ImportError) as error:  # a peer that cannot run here
            failed[title] = str(error).strip().splitlines()[-1][:200]
            del losses[title]
    functions: dict[str, Callable[[], Any]] = {"floor": logits.floor}
    functions |= {title: functools.partial(logits.gradient, loss) for title, (_, loss) in losses.items()}
    timings = interleaved(functions, runs)
    peaks = {title: peak_bytes(function) for title, function in functions.items()}
    logits.buffer.copy_(logits.student)
    over = functools.partial(logits.over_the_logits, ours("fkl", inplace=True))
    peaks["pocl, fkl, over the logits"] = peak_bytes(over)
    size = logits.student.nbytes
    kind = str(dtype).removeprefix("torch.")
    print(f"{tokens} tokens, vocabulary {vocabulary}, {kind}; the logits of each model: {size / 2**20:.0f} MiB")
    print(f"{'':30}{'median':>10}{'spread':>9}{'/ floor':>9}{'peak':>11}{'error':>10}")
    rows = {}
    for title, peak in peaks.items():
        shown = " " * 11 if peak is None else f"{peak / 2**20:>7.0f} MiB"
        timing, error = timings.get(title), errors.get(title)
        if timing is None:
            print(f"{title:30}{'':28}{shown}")
        else:
            ratio = timing.median / timings["floor"].median
            print(
                f"{title:30}{1e3 * timing.median:>7.1f} ms{100 * timing.spread:>7.1f} %{ratio:>9.2f}{shown}"
                + ("" if error is None else f"{error:>10.1e}")
            )
        seconds = None if timing is None else timing.samples
        rows[title] = {"seconds": seconds, "peak_bytes": peak, "error": error}
    for title, why in failed.items():
        print(f"{title}: {why}")
    settings = {"tokens": tokens, "vocabulary": vocabulary, "dtype": kind}
    return settings | {"logits_bytes": size, "rows": rows, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="rows, all valid (default: 1024)")
    parser.add_argument("--vocab", type=int, default=49152, help="entries of a row (default: 49152)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both models' logits")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--save", action="store_true", help="file the result under benchmarks/results")
    options = parser.parse_args()
    peers = [peer for peer in options.peers.split(",") if peer]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))}: expected some of {', '.join(PEERS)}")
    print(machine())
    result = compare(options.tokens, options.vocab, getattr(torch, options.dtype), peers, options.runs)
    if options.save:
        name = f"N={options.tokens} V={options.vocab} {options.dtype}"
        print(f"filed in {save_results('logits', {name: result})}")


if __name__ == "__main__":
    main()
