"""What a loss is given, looked at and laid out: errors in words, flat labels, each row's factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pocl_kernels.divergences import Divergence, is_number, require
from pocl_kernels.head import Head

REDUCTIONS = ("mean", "sum", "none")
MEMORY_MODES = ("auto", "fast", "low")


def shared_vocab_size(student: int, teacher: int) -> int:
    """The number of tokens both vocabularies have, where they differ in padding rows at most.

    Raises:
        ValueError: if the difference exceeds 1024 rows or an eighth of the smaller one: then they are different
        vocabularies.
    """
    small, large = sorted((student, teacher))
    if large - small > min(1024, small // 8):
        raise ValueError(
            f"student and teacher vocabularies have {student} and {teacher} entries: more than padding apart (at most "
            f"{min(1024, small // 8)} rows here). Both models must use the same tokenizer"
        )
    return small


def check_models(
    student_hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head, process_group: ProcessGroup | None
) -> int | None:
    """The size of the shared vocabulary; None if it is spread over processes, none of which knows it."""
    check_hidden("student", student_hidden, student)
    check_hidden("teacher", teacher_hidden, teacher)
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden has leading shape {tuple(teacher_hidden.shape[:-1])}, student_hidden "
            f"{tuple(student_hidden.shape[:-1])}: both models must see the same tokens"
        )
    if teacher_hidden.device != student_hidden.device:
        raise ValueError(
            f"teacher_hidden is on {teacher_hidden.device}, student_hidden on {student_hidden.device}: move them to "
            "one device"
        )
    if teacher_hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_hidden requires grad, but no gradient flows to the teacher: run it under torch.no_grad()"
        )
    for part in (teacher.weight, teacher.bias):
        # A parameter requires grad by default and costs nothing; a graph that nobody will use does.
        if part is not None and part.requires_grad and not part.is_leaf and torch.is_grad_enabled():
            raise ValueError(
                "the teacher's head was computed with a graph, but no gradient flows to the teacher: make it under "
                "torch.no_grad()"
            )
    if process_group is None:
        return shared_vocab_size(student.vocab_size, teacher.vocab_size)
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"with process_group the shares of both heads must be the same tokens, got {student.vocab_size} rows of "
            f"the student's and {teacher.vocab_size} of the teacher's: cut both heads to one vocabulary, then shard"
        )
    return None


def check_numbers(temperature: float | Tensor, ce_weight: float, labels: Tensor | None) -> None:
    """Temperature and the labels' share are in range."""
    if isinstance(temperature, Tensor) and temperature.dim():
        inside = (temperature > 0) & (temperature < math.inf)
        require(inside, "temperature must be positive and finite for every token", temperature)
    elif not (is_number(temperature) and 0 < temperature < math.inf):
        raise ValueError(f"temperature={temperature!r} must be a positive number, or a tensor of one a token")
    if not is_number(ce_weight):
        raise ValueError(f"ce_weight={ce_weight!r} must be one number in [0, 1], the same for all tokens")
    if not 0.0 <= ce_weight <= 1.0:
        raise ValueError(f"ce_weight={ce_weight!r} must be in [0, 1]")
    if ce_weight > 0 and labels is None:
        raise ValueError(f"ce_weight={ce_weight!r} needs labels; pass labels or ce_weight=0")


def by_token(hidden: Tensor, temperature: float | Tensor, divergence: Divergence) -> tuple[Any, list[Any]]:
    """Temperature and the divergence's parameters, flat and all one a token if any is; detached."""
    parameters = divergence.parameters()
    if not any(isinstance(x, Tensor) and x.dim() for x in (temperature, *parameters)):
        return temperature, parameters
    given = dict(zip(("temperature", *divergence.names()), (temperature, *parameters), strict=True))
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.dim()}
    for name, x in tensors.items():
        if x.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: it must be a number, or one a token, {tuple(hidden.shape[:-1])}"
            )
        check_device(name, x, hidden)
    rows = math.prod(hidden.shape[:-1])
    flat = [
        x.detach().reshape(-1).double()
        if isinstance(x, Tensor) and x.dim()
        else torch.full((rows,), 1.0, dtype=torch.float64, device=hidden.device) * x
        for x in given.values()
    ]
    return flat[0], flat[1:]


def check_hidden(who: str, hidden: Tensor, head: Head) -> None:
    """Hidden states and head fit each other."""
    name = f"{who}_hidden" if who else "hidden"
    if hidden.dim() < 1 or hidden.shape[-1] != head.hidden_size:
        raise ValueError(
            f"{name} has shape {tuple(hidden.shape)}, but its head's weight is {tuple(head.weight.shape)}: the last "
            f"dimension must be {head.hidden_size}"
        )
    if not (hidden.is_floating_point() and head.weight.is_floating_point()):
        raise ValueError(f"{name} is {hidden.dtype} and its head {head.weight.dtype}: both must be floating point")
    for part, tensor in (("weight", head.weight), ("bias", head.bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {hidden.device}, its head's {part} on {tensor.device}: move both to one device"
            )
    if head.bias is not None and not head.bias.is_floating_point():
        raise ValueError(f"the bias of the head of {name} is {head.bias.dtype}: it must be floating point")


def check_choices(reduction: str, memory: str, workspace_mb: float | None) -> None:
    """Reduction, memory mode and workspace are ones that there are."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}")
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory={memory!r} must be one of {', '.join(MEMORY_MODES)}")
    if memory == "fast" and reduction == "none":
        raise ValueError(
            'memory="fast" computes gradients before the upstream gradient is known, which reduction="none" needs: use '
            'memory="low" or "auto"'
        )
    if workspace_mb is None:
        return
    if not (isinstance(workspace_mb, (int, float)) and 0 < workspace_mb < math.inf):
        raise ValueError(f"workspace_mb={workspace_mb!r} must be a positive number of MiB")


def check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    """A tensor lies where the hidden states do."""
    if tensor.device != hidden.device:
        raise ValueError(f"{name} on {tensor.device}, the hidden states on {hidden.device}: move both to one device")


def flattened_labels(
    labels: Tensor | None, hidden: Tensor, ignore_index: int, vocab_size: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """``[N]`` int64, each in the vocabulary or ignored; and which are not ignored."""
    if labels is None:
        return None, None
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels are a {type(labels).__name__}: they must be a tensor of token ids")
    shape = hidden.shape[:-1]
    if labels.shape != shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the hidden states' leading shape is {tuple(shape)}")
    check_device("labels", labels, hidden)
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels are {labels.dtype}: they must be int64 or int32 token ids")
    flat = flat_rows(labels).to(torch.int64)
    valid = flat != ignore_index
    if vocab_size is None or not flat.shape[0]:  # no process alone knows the vocabulary: the backend checks
        return flat, valid
    message = f"labels must be in [0, {vocab_size}) or ignore_index={ignore_index}"
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        if not _inside(flat, vocab_size) and not _inside(torch.where(valid, flat, 0), vocab_size):
            bad = flat[valid & ((flat < 0) | (flat >= vocab_size))]
            raise ValueError(f"{message}, got {bad[0].item()} ({bad.numel()} such)")
    else:  # on the device: no wait for the host
        low, high = torch.aminmax(torch.where(valid, flat, 0))
        torch._assert_async((low >= 0) & (high < vocab_size), message)
    return flat, valid


def _inside(ids: Tensor, vocab_size: int) -> bool:
    low, high = torch.aminmax(ids)
    return low.item() >= 0 and high.item() < vocab_size


def row_factors(
    hidden: Tensor,
    valid: Tensor | None,
    token_weight: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Factor of each row's loss ``[N]``, 0 for ignored rows, and the number of ``valid`` rows; None: all are."""
    shape = hidden.shape[:-1]
    rows, dtype = math.prod(shape), torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if valid is None:
        count = torch.full((), rows, dtype=torch.int64, device=hidden.device)
        scale = torch.ones(rows, dtype=dtype, device=hidden.device)
    else:
        count, scale = valid.sum(), valid.to(dtype)
    if token_weight is not None:
        if not isinstance(token_weight, Tensor):
            raise ValueError(f"token_weight is a {type(token_weight).__name__}: it must be a tensor of {tuple(shape)}")
        if token_weight.shape != shape:
            raise ValueError(f"token_weight has shape {tuple(token_weight.shape)}, expected {tuple(shape)}")
        check_device("token_weight", token_weight, hidden)
        # An ignored row keeps weight 0 even if the caller's weight there is NaN.
        weight = token_weight.detach().reshape(-1).to(dtype)
        scale = torch.where(scale > 0, weight, scale)
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(
                f'normalizer replaces the count under reduction="mean"; it has no meaning under "{reduction}"'
            )
        normalizer = checked_normalizer(normalizer, hidden)
    if reduction != "mean":
        return scale, count
    # A batch without valid tokens has loss 0 and zero gradients.
    if count.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(scale == 0, scale, scale / (count if normalizer is None else normalizer)), count
    divisor = int(count) if normalizer is None else float(normalizer)
    if int(count) == 0:
        return scale, count
    if divisor == 0:
        raise ValueError(f"normalizer is 0, but {int(count)} tokens are valid here: pass the global batch's count")
    return scale.div_(divisor), count


def checked_normalizer(normalizer: float | Tensor, hidden: Tensor) -> float | Tensor:
    """A number, or a tensor of one; it is 0 where no process has a valid token."""
    if not isinstance(normalizer, Tensor):
        if not is_number(normalizer):
            raise ValueError(f"normalizer={normalizer!r} must be one number: the global batch's valid tokens")
        if not normalizer >= 0:
            raise ValueError(f"normalizer={normalizer!r} must not be negative: the global batch's valid tokens")
        return normalizer
    if normalizer.numel() != 1:
        raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}: it must be one number")
    normalizer = normalizer.detach().reshape(())
    if normalizer.device.type != "cpu":
        check_device("normalizer", normalizer, hidden)
    if normalizer.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(normalizer >= 0, "normalizer must not be negative")  # checked without waiting for it
    elif not normalizer >= 0:
        raise ValueError(f"normalizer={normalizer.item()} must not be negative: the global batch's valid tokens")
    return normalizer


def flat_rows(x: Tensor) -> Tensor:
    """``[N]``, of a number a token."""
    return x if x.dim() == 1 else x.reshape(-1)


def flat_vectors(x: Tensor) -> Tensor:
    """``[N, H]``, of a vector a token."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def run_time_numbers(values: Sequence[Any]) -> tuple[list[float], Tensor | None]:
    """What a schedule may change: numbers; else a float64 tensor, where they are one a token, ``[n, N]``, or variables
    of a compiled graph.
    """
    if isinstance(values[0], Tensor) and values[0].dim():
        return [], torch.stack(
            [x if isinstance(x, Tensor) and x.dim() else torch.full_like(values[0], x) for x in values]
        )
    if not torch.compiler.is_compiling():
        return [float(x) for x in values], None
    # Of all ways to make a tensor of a number, only arithmetic keeps it a variable of the compiled graph.
    return [], torch.stack([torch.zeros((), dtype=torch.float64) + x for x in values])
