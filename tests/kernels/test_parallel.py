"""Vocabulary-parallel heads: every process gets the loss and the gradients of the whole vocabulary."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pocl_kernels
from pocl_kernels import reference

VOCAB_SIZE = 101
ROWS = 13
WORKSPACE_MB = 0.004  # several chunks, however the workspace is counted


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _share(rank: int, world_size: int) -> slice:
    """Shares that differ in size: 80 and 21 rows of two, 81, 5, 5 and 10 of four processes."""
    bounds = {2: (0, 80, VOCAB_SIZE), 4: (0, 81, 86, 91, VOCAB_SIZE)}[world_size]
    return slice(bounds[rank], bounds[rank + 1])


def _errors(rank: int, world_size: int, name: str, memory: str) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(ROWS, 8, generator=generator), torch.randn(ROWS, 12, generator=generator)
    weight, teacher_weight = (torch.randn(VOCAB_SIZE, h, generator=generator) for h in (8, 12))
    bias = torch.randn(VOCAB_SIZE, generator=generator)
    labels = torch.randint(0, VOCAB_SIZE, (ROWS,), generator=generator)
    labels[::4] = -100
    settings = {"divergence": name, "temperature": 2.0, "labels": labels, "ce_weight": 0.3}

    whole = [x.double().requires_grad_() for x in (student, weight, bias)]
    oracle = reference.fused_linear_divergence(
        whole[0], pocl_kernels.Head(whole[1], whole[2]), teacher.double(), teacher_weight.double(), **settings
    )
    part = _share(rank, world_size)
    local = [x.clone().requires_grad_() for x in (student, weight[part], bias[part])]
    head = pocl_kernels.Head(local[1], local[2])
    settings |= {"memory": memory, "process_group": dist.group.WORLD, "workspace_mb": WORKSPACE_MB}
    output = pocl_kernels.fused_linear_divergence(local[0], head, teacher, teacher_weight[part], **settings)
    hidden_gradient, *head_gradients = torch.autograd.grad(oracle.loss, whole)
    expected = [*oracle[:4], *oracle[5:], hidden_gradient, *(g[part] for g in head_gradients)]
    results = [*output[:4], *output[5:], *torch.autograd.grad(output.loss, local)]
    return [reference.relative_error(a, b) for a, b in zip(results, expected, strict=True)]


def _worker(rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        worst = [max(_errors(rank, world_size, name, m)) for name in pocl_kernels.DIVERGENCES for m in ("fast", "low")]
        hidden, weight = torch.zeros(1, 4), torch.zeros(VOCAB_SIZE, 4)[_share(rank, world_size)]
        message = ""
        try:
            pocl_kernels.fused_linear_divergence(
                hidden, weight, hidden, weight, labels=torch.tensor([VOCAB_SIZE]), process_group=dist.group.WORLD
            )
        except ValueError as error:
            message = str(error)
        Path(folder, f"{rank}.txt").write_text(f"{max(worst)}\n{message}")
        dist.barrier()  # nobody leaves while another may still be in a collective
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_process_has_the_whole_vocabularys_loss_and_its_own_rows_gradients(world_size, tmp_path):
    mp.spawn(_worker, (world_size, _free_port(), str(tmp_path)), nprocs=world_size)
    for rank in range(world_size):
        worst, message = (tmp_path / f"{rank}.txt").read_text().split("\n")
        assert float(worst) < 2e-6
        assert f"labels contain {VOCAB_SIZE}" in message
