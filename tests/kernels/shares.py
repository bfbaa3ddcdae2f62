"""Losses whose vocabulary two processes share, against float64 on the whole: what each process checks."""

from __future__ import annotations

import dataclasses
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pocl_kernels
from pocl_kernels import Head, SparseTeacher, reference
from tests.kernels.cases import Case, make_case, solve
from tests.kernels.sparse_cases import double, sparse
from tests.kernels.sparse_cases import oracle as sparse_oracle
from tests.kernels.test_by_token import KINDS, RAMP, ROWS, one_by_one
from tests.kernels.test_cross_entropy import OPTIONS, half_right
from tests.kernels.test_cross_entropy import solve as solve_labels
from tests.kernels.test_frozen_head import check_frozen

V = 101
BOUNDS = (0, 17, V)  # uneven shares: chunks of rows must still agree
SMALL = 0.004  # MiB: several chunks, however the workspace is counted
EXACT = {torch.float32: 3e-6, torch.float64: 1e-12}


def part_of(case: Case, rank: int) -> Case:
    """The case as one process has it."""
    part = slice(*BOUNDS[rank : rank + 2])
    heads = [
        Head(h.weight[part], None if h.bias is None else h.bias[part]) for h in (case.student_head, case.teacher_head)
    ]
    return case.replace(student_head=heads[0], teacher_head=heads[1])


def by_token(rank: int, name: str, dtype: torch.dtype, **settings: Any) -> None:
    """Temperature and parameters of one a token."""
    temperature = torch.linspace(0.7, 3.0, ROWS, dtype=torch.float64)
    case = make_case(ROWS, V, seed=1)
    truth = one_by_one(case, KINDS[name], temperature.tolist(), ce_weight=0.3)
    call = dict(divergence=KINDS[name](RAMP.double()), temperature=temperature, ce_weight=0.3, reduction="sum")
    found = solve(pocl_kernels.fused_linear_divergence, part_of(case, rank).to(dtype), **call, **settings)
    for field in ("loss", "divergence", "cross_entropy", "student_entropy", "teacher_entropy", "accuracy", "hidden"):
        error = reference.relative_error(getattr(found, field), getattr(truth, field))
        assert error <= EXACT[dtype], (name, dtype, settings, field, error)
    assert truth.weight is not None
    assert found.weight is not None
    mine = truth.weight[slice(*BOUNDS[rank : rank + 2])]
    assert reference.relative_error(found.weight, mine) <= EXACT[dtype], (name, dtype, settings)


def labels_alone(rank: int, options: dict[str, Any], dtype: torch.dtype, **settings: Any) -> None:
    """The cross-entropy with every option."""
    case = half_right(make_case(ROWS, V, bias=True, seed=2))
    truth = solve_labels(reference.fused_linear_cross_entropy, case.to(torch.float64), **options)

    def loss(*tensors: Any, **call: Any) -> Any:
        return pocl_kernels.fused_linear_cross_entropy(*tensors, parts=True, **call)

    found = solve_labels(loss, part_of(case, rank).to(dtype), **options, **settings)
    for name, exact in truth.items():
        exact = exact[slice(*BOUNDS[rank : rank + 2])] if name in ("weight", "bias") else exact
        error = reference.relative_error(found[name], exact)
        assert error <= EXACT[dtype], (options, dtype, settings, name, error)


def sparse_teacher(rank: int, tail: str, dtype: torch.dtype, **settings: Any) -> None:
    """Of a teacher's likeliest tokens some lie in each share."""
    case = sparse(make_case(ROWS, V, seed=3), 7, tail)
    call = dict(divergence="jsd", temperature=2.0, ce_weight=0.3)
    truth = sparse_oracle(case, **call)
    head = Head(case.student_head.weight[slice(*BOUNDS[rank : rank + 2])])
    mine = case.replace(student_head=head)
    found = solve(
        pocl_kernels.fused_linear_divergence, mine if dtype == torch.float32 else double(mine), **call, **settings
    )
    assert truth.weight is not None
    truth = dataclasses.replace(truth, weight=truth.weight[slice(*BOUNDS[rank : rank + 2])])
    for field, error in found.errors(truth).items():
        assert error <= EXACT[dtype], (tail, dtype, settings, field, error)


def everything(rank: int, backend: str, names: tuple[str, ...]) -> None:
    """On one process of two; raises at the first that is wrong."""
    settings = {"backend": backend, "process_group": dist.group.WORLD, "workspace_mb": SMALL}
    for memory in ("fast", "low"):
        for dtype in EXACT:
            for name in names if dtype == torch.float32 else names[:1]:
                by_token(rank, name, dtype, memory=memory, **settings)
            sparse_teacher(rank, "bucket", dtype, memory=memory, **settings)
        sparse_teacher(rank, "uniform", torch.float32, memory=memory, **settings)
        for options in OPTIONS[:3]:
            labels_alone(rank, options, torch.float32, memory=memory, **settings)
        labels_alone(rank, OPTIONS[2], torch.float64, memory=memory, **settings)
        for loss in (pocl_kernels.fused_linear_divergence, pocl_kernels.fused_linear_cross_entropy):
            check_frozen(loss, backend=backend, memory=memory, process_group=dist.group.WORLD)
    labels_alone(rank, OPTIONS[3], torch.float32, memory="low", **settings)
    case = part_of(make_case(3, V), rank)
    outside = torch.tensor([0, V, 1])
    beyond = SparseTeacher(torch.tensor([[0, V]] * 3), torch.tensor([[-1.0, -1.0]] * 3))
    with pytest.raises((ValueError, RuntimeError), match=rf"token_ids must be in \[0, {V}\)"):
        pocl_kernels.fused_linear_divergence(case.student_hidden, case.student_head, beyond, **settings)
    with pytest.raises((ValueError, RuntimeError), match="no process's share"):
        pocl_kernels.fused_linear_cross_entropy(case.student_hidden, case.student_head, outside, **settings)


def _worker(rank: int, port: int, backend: str, names: tuple[str, ...], folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of masked lanes, in Triton's interpreter
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        everything(rank, backend, names)
        Path(folder, str(rank)).touch()
        dist.barrier()  # nobody leaves while another may still be in a collective
    finally:
        dist.destroy_process_group()
    # All is checked. PyTorch's profiler, which counts allocations, now and then aborts when such a process ends.
    os._exit(0)


def run(backend: str, names: tuple[str, ...], folder: Path) -> None:
    """Check everything on two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, (port, backend, names, str(folder)), nprocs=2)
    assert len(list(folder.iterdir())) == 2
