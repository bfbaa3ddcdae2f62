"""Heads that are DTensors outside their FSDP unit: gathered once a call, gradients averaged back to the shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import pocl_kernels
from pocl_kernels import Head, reference

V, H, ROWS = 30, 8, 6


def _check_one_of_two() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(2, ROWS, H, generator=generator), torch.randn(2, ROWS, H, generator=generator)
    weight, bias = torch.randn(V, H, generator=generator), torch.randn(V, generator=generator)
    teacher_weight = torch.randn(V, H, generator=generator)

    whole = [x.double().requires_grad_() for x in (weight, bias)]
    losses = [
        reference.fused_linear_divergence(h.double(), Head(*whole), t.double(), teacher_weight.double()).loss
        for h, t in zip(hidden, teacher, strict=True)
    ]
    expected = torch.autograd.grad(sum(losses) / 2, whole)  # what DDP makes of it

    mesh = init_device_mesh("cpu", (2,))
    shards = [torch.nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in (weight, bias)]
    pocl_kernels.fused_linear_divergence(hidden[rank], Head(*shards), teacher[rank], teacher_weight).loss.backward()
    for shard, truth in zip(shards, expected, strict=True):
        assert isinstance(shard.grad, DTensor)
        assert shard.grad.to_local().shape[0] == V // 2
        assert reference.relative_error(shard.grad.full_tensor(), truth) < 2e-6
    dist.destroy_process_group()


def test_gradients_of_a_sharded_head_are_the_mean_over_the_processes(start_processes: Callable[..., list[Any]]) -> None:
    processes = start_processes(_check_one_of_two, 2)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
