"""The two registered operators, ``pocl::linear_divergence`` and ``pocl::linear_cross_entropy``: dispatch to a backend.

Opaque to torch.compile (they carry fake implementations, so ``fullgraph=True`` holds) and free of autograd: they
return the per-row results and, where asked, the gradients of ``sum row_scale * loss``; :mod:`pocl_kernels.autograd`
attaches those. A gradient that was not asked for is an empty tensor, since an operator cannot return None.

What a schedule changes comes in ``numbers``, a tensor: a compiled graph is made anew for every new value of a float.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from pocl_kernels.cpu import backend as cpu_backend
from pocl_kernels.divergences import Divergence
from pocl_kernels.plan import STATE_ROWS, Gradients, Plan

Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("pocl::linear_divergence", mutates_args=())
def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor,
    divergence: str,
    numbers: Tensor,  # [3 + parameters] on the CPU: temperature, factor of D, ce_weight, the divergence's parameters
    ignore_index: int,
    scales_and_softcaps: Sequence[float],  # student scale, student softcap (0: none), teacher scale, teacher softcap
    workspace_mb: float,
    wanted: Sequence[bool],  # gradients of hidden, weight, bias
    backend: str,
    process_group: str,
    memory: str,
    state: Tensor | None,  # from a call without gradients, under memory="low"
    products: str,  # autocast's dtype on a GPU, e.g. "bfloat16"; empty: that of the inputs
) -> Seven:
    student_scale, student_softcap, teacher_scale, teacher_softcap = scales_and_softcaps
    temperature, divergence_factor, ce_weight, *parameters = numbers.tolist()
    plan = Plan(
        divergence=Divergence.classes[divergence].from_parameters(parameters),
        temperature=temperature,
        divergence_factor=divergence_factor,
        ce_weight=ce_weight,
        ignore_index=ignore_index,
        student_scale=student_scale,
        student_softcap=student_softcap or None,
        teacher_scale=teacher_scale,
        teacher_softcap=teacher_softcap or None,
        workspace_mb=workspace_mb,
        process_group=process_group,
        memory=memory,
        products=getattr(torch, products) if products else None,
    )
    rows = backend_module(backend, student_hidden.device).linear_divergence(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        labels,
        row_scale,
        plan,
        Gradients(*wanted),
        state,
    )
    d, ce, entropy = (x.clone() for x in rows[:3])  # an operator must not return views of one tensor
    return d, ce, entropy, *(_or_empty(g, d) for g in rows[3:])


@linear_divergence.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor,
    divergence: str,
    numbers: Tensor,
    ignore_index: int,
    scales_and_softcaps: Sequence[float],
    workspace_mb: float,
    wanted: Sequence[bool],
    backend: str,
    process_group: str,
    memory: str,
    state: Tensor | None,
    products: str,
) -> Seven:
    dtype = compute_dtype(student_hidden, teacher_hidden)
    rows = student_hidden.shape[0]
    d, ce, entropy = (student_hidden.new_empty(rows, dtype=dtype) for _ in range(3))
    gradients = _fake_gradients(student_hidden, student_weight, wanted, dtype)
    return d, ce, entropy, *gradients, _fake_state(student_hidden, wanted, backend, memory, dtype)


@torch.library.custom_op("pocl::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_scale: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,  # 0: none
    workspace_mb: float,
    wanted: Sequence[bool],
    backend: str,
    memory: str,
    state: Tensor | None,
    products: str,
) -> Five:
    rows = backend_module(backend, hidden.device).linear_cross_entropy(
        hidden, weight, bias, labels, row_scale, ignore_index, scale, softcap or None, workspace_mb,
        Gradients(*wanted), memory, state, **({"products": getattr(torch, products)} if products else {}),
    )  # fmt: skip
    ce = rows.cross_entropy.clone()
    return ce, *(_or_empty(g, ce) for g in rows[3:])


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_scale: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    workspace_mb: float,
    wanted: Sequence[bool],
    backend: str,
    memory: str,
    state: Tensor | None,
    products: str,
) -> Five:
    dtype = compute_dtype(hidden)
    gradients = _fake_gradients(hidden, weight, wanted, dtype)
    state = _fake_state(hidden, wanted, backend, memory, dtype)
    return hidden.new_empty(hidden.shape[0], dtype=dtype), *gradients, state


def backend_module(backend: str, device: torch.device) -> ModuleType:
    """The module that serves ``backend``, "auto" by the device: Triton on CUDA and ROCm, imported when first needed."""
    if _is_triton(backend, device):
        from pocl_kernels.triton_backend import backend as triton_backend

        return triton_backend
    return cpu_backend


def _is_triton(backend: str, device: torch.device) -> bool:
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if any of the tensors has it."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _fake_gradients(
    hidden: Tensor, weight: Tensor, wanted: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (tuple(hidden.shape), tuple(weight.shape), (weight.shape[0],))
    made = [hidden.new_empty(s if w else (0,), dtype=dtype) for s, w in zip(shapes, wanted, strict=True)]
    return made[0], made[1], made[2]


def _fake_state(hidden: Tensor, wanted: Sequence[bool], backend: str, memory: str, dtype: torch.dtype) -> Tensor:
    kept = memory == "low" and not any(wanted) and _is_triton(backend, hidden.device)
    return hidden.new_empty((STATE_ROWS, hidden.shape[0]) if kept else (0,), dtype=dtype)


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient
