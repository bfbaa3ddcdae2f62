"""Processes that share a vocabulary, with Triton's kernels: the same numbers as one process with all of it."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pocl_kernels
from pocl_kernels import Head, reference

VOCAB = 101
BOUNDS = (0, 17, VOCAB)  # uneven shares: chunks of rows must still agree
WORLD_SIZE = len(BOUNDS) - 1


def _errors(rank: int, name: str, memory: str, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(7, 8, generator=generator), torch.randn(7, 12, generator=generator)
    weight, teacher_weight = (torch.randn(VOCAB, h, generator=generator) for h in (8, 12))
    bias = torch.randn(VOCAB, generator=generator)
    labels = torch.randint(0, VOCAB, (7,), generator=generator)
    labels[::4] = -100
    settings = {"divergence": name, "temperature": 2.0, "labels": labels, "ce_weight": 0.3}
    whole = [x.double().requires_grad_() for x in (student, weight, bias)]
    oracle = reference.fused_linear_divergence(
        whole[0], Head(whole[1], whole[2]), teacher.double(), teacher_weight.double(), **settings
    )
    part = slice(*BOUNDS[rank : rank + 2])
    local = [x.to(dtype).clone().requires_grad_() for x in (student, weight[part], bias[part])]
    output = pocl_kernels.fused_linear_divergence(
        local[0], Head(local[1], local[2]), teacher.to(dtype), teacher_weight[part].to(dtype), backend="triton",
        memory=memory, workspace_mb=0.004, process_group=dist.group.WORLD, **settings,
    )  # fmt: skip
    hidden_gradient, *head_gradients = torch.autograd.grad(oracle.loss, whole)
    expected = [*oracle[:4], *oracle[5:], hidden_gradient, *(g[part] for g in head_gradients)]
    results = [*output[:4], *output[5:], *torch.autograd.grad(output.loss, local)]
    return max(reference.relative_error(a, b) for a, b in zip(results, expected, strict=True))


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of masked lanes
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    try:
        cases = [(name, memory, torch.float32) for name in ("rkl", "jsd") for memory in ("fast", "low")]
        cases += [("jeffreys", memory, torch.float64) for memory in ("fast", "low")]
        lines = [f"{case[0]} {case[1]} {case[2]} {_errors(rank, *case)!r}" for case in cases]
        hidden, weight = torch.zeros(2, 4), torch.zeros(VOCAB, 4)[slice(*BOUNDS[rank : rank + 2])]
        with pytest.raises(RuntimeError, match="no process's share"):
            pocl_kernels.fused_linear_divergence(
                hidden, weight, hidden, weight, labels=torch.tensor([0, VOCAB]), backend="triton",
                process_group=dist.group.WORLD,
            )  # fmt: skip
        Path(folder, str(rank)).write_text("\n".join(lines))
        dist.barrier()  # nobody leaves while another may still be in a collective
    finally:
        dist.destroy_process_group()


def test_every_process_gets_the_loss_and_the_gradients_of_the_whole(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, args=(port, str(tmp_path)), nprocs=WORLD_SIZE)
    for rank in range(WORLD_SIZE):
        for line in (tmp_path / str(rank)).read_text().splitlines():
            assert float(line.split()[-1]) <= (1e-12 if "float64" in line else 2e-6), (rank, line)
