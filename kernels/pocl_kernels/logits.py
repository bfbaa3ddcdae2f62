"""The divergence of two models whose logits are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pocl_kernels import operators
from pocl_kernels.arguments import (
    by_token,
    check_choices,
    check_numbers,
    flattened_labels,
    row_factors,
    run_time_numbers,
    shared_vocab_size,
)
from pocl_kernels.autograd import FusedLoss, Result, holds_gradient
from pocl_kernels.divergences import Divergence, get_divergence
from pocl_kernels.modes import check_backend, without_autocast
from pocl_kernels.operators import Choices, is_triton
from pocl_kernels.output import DivergenceOutput, divergence_output
from pocl_kernels.plan import Inputs


def fused_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str | Divergence = "fkl",
    temperature: float | Tensor = 1.0,
    scale_by_temperature: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    ce_weight: float = 0.0,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    process_group: ProcessGroup | None = None,
) -> DivergenceOutput:
    """As :func:`pocl_kernels.fused_linear_divergence`, of logits that exist already.

    For trainers that make logits anyway (draft models, tensor-parallel frameworks); where hidden states and heads can
    be had, the linear loss needs less memory. Nothing of the size of the logits is made but their gradient.

    Args:
        student_logits: ``[..., V_s]`` before any temperature, float32, bfloat16, float16 or float64; rows may lie
            anywhere (``logits[:, :-1]``), each contiguous. What a head adds (scale, softcap) is in them.
        teacher_logits: ``[..., V_t]``, same leading shape, any of these dtypes. Vocabularies may differ by padding at
            the end, which takes no probability and gets a zero gradient.
        inplace: write the gradient over the student's logits: no memory beside theirs. Do not read them after this
            call: from then on, or from the backward pass on, they are the gradient, and to pass the same tensor or view
            again raises. Needs logits that are no leaf and share no memory with the teacher's. To go backward twice
            raises, and so does a function that saved the logits for its own backward pass. Nothing is written where no
            gradient is wanted, nor under torch.compile.
        process_group: the processes that share the vocabulary, each with the same consecutive columns of both models'
            logits, in rank order; labels are global token ids. Gradients belong to each process's columns.

    The other arguments, and what is returned, are those of :func:`pocl_kernels.fused_linear_divergence`. Gradients have
    the dtype of the student's logits and are computed in float32 (float64 if either has it).

    Raises:
        ValueError: for shapes, strides, dtypes, devices or settings that do not fit, and for labels outside the
            vocabulary.
    """
    divergence = get_divergence(divergence)
    vocab_size = _check_logits(student_logits, teacher_logits, process_group)
    check_numbers(temperature, ce_weight, labels)
    temperature, parameters = by_token(student_logits, temperature, divergence)
    check_choices(reduction, "auto", None)
    check_backend(backend, student_logits.device)
    flat_labels, valid = flattened_labels(labels, student_logits, ignore_index, vocab_size)
    row_scale, count = row_factors(student_logits, valid, token_weight, reduction, normalizer)
    if not torch.compiler.is_compiling() and holds_gradient(student_logits):
        raise ValueError(
            "student_logits hold the gradient that an earlier call wrote over them (inplace=True): make the logits "
            "anew, or pass inplace=False to the first call to use them twice"
        )
    wants_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    inplace = inplace and wants_gradient and not torch.compiler.is_compiling()
    if inplace:
        _check_inplace(student_logits, teacher_logits)
    # A GPU computes gradients in the backward pass, with the upstream gradient in them: to multiply them by it later
    # would read and write them once more. A CPU can look whether it is 1. float16 must be rounded after a loss scale.
    later = reduction == "none" or student_logits.dtype == torch.float16 or is_triton(backend, student_logits.device)
    factor = (1.0 - ce_weight) * (temperature**2 if scale_by_temperature else 1.0)
    numbers, changing = run_time_numbers([temperature, factor, ce_weight, *parameters])
    scales = [1.0, 0.0, 1.0, 0.0]
    by_row = changing is not None and changing.dim() == 2
    if by_row:
        scales.append(ce_weight)
    group_name = "" if process_group is None else process_group.group_name
    mode = "low" if later else "fast"
    choices = Choices(divergence.token, backend, mode, group_name, inplace="inplace" * inplace)

    def run(
        z: Tensor, w: None, b: None, scale: Tensor, wanted: list[bool], state: Tensor | None, constants: Sequence[Any],
    ) -> Result:  # fmt: skip
        teacher, labels, changing = constants
        results, dz, _, _, state = operators.linear_loss(
            Inputs(z, None, None, teacher, None, None, labels, scale, state),
            numbers if changing is None else changing, scales, 0.0, ignore_index,
            wanted, choices,
        )  # fmt: skip
        own = changing[1].to(results.dtype) if by_row else factor
        written = wanted[0] and inplace and dz is not None and dz.data_ptr() == z.data_ptr()
        return Result(results, own, ce_weight, (dz, None, None), state, written)

    with without_autocast(student_logits.device):
        loss, parts = FusedLoss.apply(
            student_logits, None, None, row_scale, run, wants_gradient and not later, reduction != "none",
            teacher_logits.detach(), flat_labels, changing,
        )  # fmt: skip
    tokens = student_logits.shape[:-1] if reduction == "none" else None
    return divergence_output(loss, parts, count, tokens, labels is not None)


def _check_logits(student: Tensor, teacher: Tensor, process_group: ProcessGroup | None) -> int | None:
    """The size of the shared vocabulary; None if it is spread over processes, none of which knows it."""
    for name, x in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: it must be a tensor of logits, [..., vocabulary]")
        if x.dim() < 2 or x.shape[-1] == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be [..., vocabulary], tokens first")
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{name} is {x.dtype}: it must be float32, bfloat16, float16 or float64")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{name} has stride {x.stride(-1)} along the vocabulary, its last dimension, which must be contiguous: "
                "pass logits.contiguous(), or make them so that each token's lie together"
            )
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_logits have leading shape {tuple(teacher.shape[:-1])}, student_logits "
            f"{tuple(student.shape[:-1])}: both models must see the same tokens"
        )
    if teacher.device != student.device:
        raise ValueError(
            f"teacher_logits are on {teacher.device}, student_logits on {student.device}: move them to one device"
        )
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_logits require grad, but no gradient flows to the teacher: run it under torch.no_grad(), or pass "
            "teacher_logits.detach()"
        )
    if process_group is None:
        return shared_vocab_size(student.shape[-1], teacher.shape[-1])
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"with process_group the shares of both models must be the same tokens, got {student.shape[-1]} of the "
            f"student's and {teacher.shape[-1]} of the teacher's: cut both to one vocabulary, then shard"
        )
    return None


def _check_inplace(student: Tensor, teacher: Tensor) -> None:
    base = student if student._base is None else student._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            "inplace=True would write the gradient over student_logits, a leaf that requires grad (or a view of one), "
            "whose values are the caller's: pass inplace=False"
        )
    if _overlaps(student):
        raise ValueError(
            f"inplace=True needs rows of student_logits that do not share memory, got strides {student.stride()} for "
            f"shape {tuple(student.shape)}: pass inplace=False"
        )
    first, last = _extent(student)
    other_first, other_last = _extent(teacher)
    if first < other_last and other_first < last:
        raise ValueError(
            "inplace=True would write over teacher_logits, which share memory with student_logits: pass inplace=False"
        )


def _extent(x: Tensor) -> tuple[int, int]:
    """Addresses of the first entry and behind the last one."""
    entries = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (entries * x.itemsize if x.numel() else 0)


def _overlaps(x: Tensor) -> bool:
    """Whether two entries may lie in one place."""
    behind = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < behind:
                return True
            behind = stride * size
    return False
