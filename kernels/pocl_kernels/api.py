"""The public functions: validation, the reductions, and the choice of memory mode and backend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pocl_kernels import operators
from pocl_kernels.autograd import FusedLoss, Result
from pocl_kernels.divergences import Divergence, get_divergence, require
from pocl_kernels.head import Head, as_head, whole_tensor
from pocl_kernels.modes import autocast_products, check_backend, mode_and_workspace
from pocl_kernels.operators import Choices
from pocl_kernels.output import DivergenceOutput
from pocl_kernels.plan import (
    ACCURACY,
    CROSS_ENTROPY,
    DIVERGENCE,
    ENTROPY,
    TEACHER_ENTROPY,
    Inputs,
    compute_dtype,
)
from pocl_kernels.scalar import weighted

REDUCTIONS = ("mean", "sum", "none")
MEMORY_MODES = ("auto", "fast", "low")


def fused_linear_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
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
    memory: str = "auto",
    workspace_mb: float | None = None,
    backend: str = "auto",
    process_group: ProcessGroup | None = None,
) -> DivergenceOutput:
    """Divergence of a student's next-token distribution from a teacher's, from hidden states: full logits never exist.

    In plain PyTorch, with p and q the softmaxes of the teacher's and the student's ``logits / temperature``::

        loss = (1 - ce_weight) * temperature**2 * D(p, q) + ce_weight * cross_entropy(student_logits, labels)

    Args:
        student_hidden: ``[..., H_s]`` last hidden states of the student.
        student_head: :class:`Head`, or a bare ``[V, H_s]`` weight.
        teacher_hidden: ``[..., H_t]``, same leading shape; computed without gradient.
        teacher_head: :class:`Head`, or a bare ``[V, H_t]`` weight; parameters that require grad get none, like the
            hidden states a head with a graph behind it is refused. Vocabularies may differ by padding rows at the end:
            the surplus rows take no probability and get a zero gradient.
        divergence: a name (fkl, rkl, skew_fkl, skew_rkl, jsd, tvd, jeffreys, alpha) or a :class:`Divergence` instance.
        temperature: of both softmaxes, > 0: a number, or ``[...]`` of one a token; so are the divergence's parameters.
        scale_by_temperature: multiply D by temperature^2 (Hinton et al. 2015), so that gradients keep their size.
        labels: ``[...]`` int64, aligned: position i predicts ``labels[i]``. Rows with ``ignore_index`` are dropped
            before any matrix product.
        ce_weight: share of the cross-entropy on the labels, in [0, 1].
        token_weight: ``[...]`` factor on each token's loss; takes no gradient. A token of weight 0 counts as valid and
            adds nothing, even if its loss is infinite.
        reduction: "mean" over valid tokens, "sum", or "none" for the shape of the tokens.
        normalizer: replaces the number of valid tokens under "mean": pass the count over the global batch, and the
            gradient does not depend on accumulation, padding or world size.
        memory: "fast" computes gradients in the forward pass, "low" recomputes the logits in the backward pass; "auto"
            is "fast", except for reduction="none", whose upstream gradients are not known in the forward pass, and on
            GPUs where the workspace holds the gradients of less than 1024 rows.
        workspace_mb: bound on scratch memory in MiB: by default 256, under "low" 96; on a GPU a tenth of its
            memory, at most 8192, under "low" a sixteenth of that.
        backend: "triton" (CUDA, ROCm), "cpu", or "auto" by the tensors' device.
        process_group: the processes that share the vocabulary, each with the same consecutive rows of both heads, in
            rank order; hidden states and labels (global token ids) are the same on all of them. Gradients of hidden
            states are summed over the group, those of the weights belong to each process's rows.

    Returns:
        :class:`DivergenceOutput`, nats per valid token; gradients flow from ``loss`` to the student's hidden states,
        weight and bias, whichever require them, never to the teacher. To differentiate them again raises.
        Under autocast the products run in its dtype on a GPU; on a CPU, where 16-bit products are no faster, autocast
        changes nothing.

    Raises:
        ValueError: for shapes, dtypes, devices or settings that do not fit, and for labels outside the vocabulary.
    """
    student_head, teacher_head = _gathered(as_head(student_head)), as_head(teacher_head)
    divergence = get_divergence(divergence)
    vocab_size = _check_models(student_hidden, student_head, teacher_hidden, teacher_head, process_group)
    teacher_head = _gathered(teacher_head)
    _check_numbers(temperature, ce_weight, labels)
    temperature, parameters = _by_token(student_hidden, temperature, divergence)
    _check_choices(reduction, memory, workspace_mb)
    check_backend(backend, student_hidden.device)
    pair = teacher_hidden, teacher_head
    mode, workspace_mb = mode_and_workspace(reduction, memory, workspace_mb, student_hidden, student_head, pair)
    shape, group_name = student_hidden.shape[:-1], "" if process_group is None else process_group.group_name
    flat_labels = _flat_labels(labels, student_hidden, ignore_index, vocab_size)
    row_scale, count = _row_scale(student_hidden, flat_labels, ignore_index, token_weight, reduction, normalizer)

    hidden, teacher = (
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
    )
    factor = (1.0 - ce_weight) * (temperature**2 if scale_by_temperature else 1.0)
    scales = [student_head.scale, student_head.softcap or 0.0, teacher_head.scale, teacher_head.softcap or 0.0]
    products = autocast_products(hidden.device)
    choices = Choices(divergence.token, backend, mode, group_name, products)
    numbers = _numbers([temperature, factor, ce_weight, *parameters])
    if numbers.dim() == 2:
        scales.append(ce_weight)

    def run(
        h: Tensor, w: Tensor, b: Tensor | None, scale: Tensor, wanted: list[bool], state: Tensor | None,
        constants: Sequence[Any],
    ) -> Result:  # fmt: skip
        teacher, weight, bias, labels, numbers = constants
        results, dh, dw, db, state = operators.linear_loss(
            Inputs(h, w, b, teacher, weight, bias, labels, scale, state),
            numbers,
            scales,
            workspace_mb,
            ignore_index,
            wanted,
            choices,
        )
        d, ce = results[DIVERGENCE], results[CROSS_ENTROPY]
        # A part without weight must not enter: 0 * inf is not 0.
        own = factor if numbers.dim() == 1 else numbers[1].to(d.dtype)
        loss = ce if ce_weight == 1 else own * d if ce_weight == 0 else own * d + ce_weight * ce
        return Result(loss, results, (dh, dw, db), state)

    now = mode == "fast" and torch.is_grad_enabled()
    with torch.autocast(hidden.device.type, enabled=False):
        loss, results = FusedLoss.apply(
            hidden, student_head.weight, student_head.bias, row_scale, run, now, reduction != "none",
            teacher, teacher_head.weight.detach(), _detach(teacher_head.bias), flat_labels, numbers,
        )  # fmt: skip
    parts = [_reduce(x, row_scale, reduction) for x in results.unbind()]
    if reduction == "none":
        loss, *parts = (x.reshape(shape) for x in (loss, *parts))
    ce, accuracy = (None, None) if labels is None else (parts[CROSS_ENTROPY], parts[ACCURACY])
    return DivergenceOutput(loss, parts[DIVERGENCE], ce, parts[ENTROPY], count, parts[TEACHER_ENTROPY], accuracy)


def fused_linear_cross_entropy(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    memory: str = "auto",
    workspace_mb: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of a language model from hidden states, without its logits: scoring and supervised fine-tuning.

    Equals ``torch.nn.functional.cross_entropy(logits, labels)`` over the valid tokens; arguments, reductions and
    errors as in :func:`fused_linear_divergence`. Returns nats: a scalar, or ``[...]`` (0 at ignored positions) for
    ``reduction="none"``.
    """
    head = _gathered(as_head(head))
    _check_hidden("", hidden, head)
    shape = hidden.shape[:-1]
    _check_choices(reduction, memory, workspace_mb)
    check_backend(backend, hidden.device)
    mode, workspace_mb = mode_and_workspace(reduction, memory, workspace_mb, hidden, head, None)
    if labels is None:
        raise ValueError("labels=None: a cross-entropy needs the labels, a tensor of token ids")
    flat_labels = _flat_labels(labels, hidden, ignore_index, head.vocab_size)
    row_scale, _ = _row_scale(hidden, flat_labels, ignore_index, token_weight, reduction, normalizer)
    choices = Choices("", backend, mode, "", autocast_products(hidden.device))
    numbers, scales = _numbers([1.0, 0.0, 1.0]), [head.scale, head.softcap or 0.0, 1.0, 0.0]

    def run(
        h: Tensor, w: Tensor, b: Tensor | None, scale: Tensor, wanted: list[bool], state: Tensor | None,
        constants: Sequence[Any],
    ) -> Result:  # fmt: skip
        labels, numbers = constants
        results, dh, dw, db, state = operators.linear_loss(
            Inputs(h, w, b, None, None, None, labels, scale, state), numbers, scales, workspace_mb, ignore_index,
            wanted, choices,
        )  # fmt: skip
        return Result(results[CROSS_ENTROPY], results, (dh, dw, db), state)

    now = mode == "fast" and torch.is_grad_enabled()
    flat = hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        loss, _ = FusedLoss.apply(
            flat, head.weight, head.bias, row_scale, run, now, reduction != "none", flat_labels, numbers
        )
    return loss.reshape(shape) if reduction == "none" else loss


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


def _gathered(head: Head) -> Head:
    """A head whose tensors are whole: DTensors (FSDP2) are gathered once a call.

    Their gradients return to the shards as the mean over the processes, which is what DDP and FSDP make of it, and the
    gradient itself where all processes see the same tokens.
    """
    return dataclasses.replace(head, weight=whole_tensor(head.weight), bias=whole_tensor(head.bias))


def _check_models(
    student_hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head, process_group: ProcessGroup | None
) -> int | None:
    """The size of the shared vocabulary; None if it is spread over processes, none of which knows it."""
    _check_hidden("student", student_hidden, student)
    _check_hidden("teacher", teacher_hidden, teacher)
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


def _check_numbers(temperature: float | Tensor, ce_weight: float, labels: Tensor | None) -> None:
    if isinstance(temperature, Tensor) and temperature.dim():
        inside = (temperature > 0) & (temperature < math.inf)
        require(inside, "temperature must be positive and finite for every token", temperature)
    elif not (isinstance(temperature, (int, float, Tensor)) and 0 < temperature < math.inf):
        raise ValueError(f"temperature={temperature!r} must be a positive number, or a tensor of one a token")
    if not 0.0 <= ce_weight <= 1.0:
        raise ValueError(f"ce_weight={ce_weight!r} must be in [0, 1]")
    if ce_weight > 0 and labels is None:
        raise ValueError(f"ce_weight={ce_weight!r} needs labels; pass labels or ce_weight=0")


def _by_token(hidden: Tensor, temperature: float | Tensor, divergence: Divergence) -> tuple[Any, list[Any]]:
    """Temperature and the divergence's parameters, flat and all one a token if any is; detached."""
    fields = [field.name for field in dataclasses.fields(divergence)]
    given = dict(zip(("temperature", *fields), (temperature, *divergence.parameters()), strict=True))
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.dim()}
    if not tensors:
        return temperature, list(given.values())[1:]
    for name, x in tensors.items():
        if x.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: it must be a number, or one a token, {tuple(hidden.shape[:-1])}"
            )
        _check_device(name, x, hidden)
    rows = math.prod(hidden.shape[:-1])
    flat = [
        x.detach().reshape(-1).double()
        if isinstance(x, Tensor) and x.dim()
        else torch.full((rows,), 1.0, dtype=torch.float64, device=hidden.device) * x
        for x in given.values()
    ]
    return flat[0], flat[1:]


def _check_hidden(who: str, hidden: Tensor, head: Head) -> None:
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


def _check_choices(reduction: str, memory: str, workspace_mb: float | None) -> None:
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


def _check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(f"{name} on {tensor.device}, the hidden states on {hidden.device}: move both to one device")


def _flat_labels(labels: Tensor | None, hidden: Tensor, ignore_index: int, vocab_size: int | None) -> Tensor | None:
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels are a {type(labels).__name__}: they must be a tensor of token ids")
    shape = hidden.shape[:-1]
    if labels.shape != shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the hidden states' leading shape is {tuple(shape)}")
    _check_device("labels", labels, hidden)
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels are {labels.dtype}: they must be int64 or int32 token ids")
    flat = labels.reshape(-1).to(torch.int64)
    if vocab_size is None:  # no process alone knows the vocabulary: the backend checks
        return flat
    fits = ((flat == ignore_index) | ((flat >= 0) & (flat < vocab_size))).all()
    message = f"labels must be in [0, {vocab_size}) or ignore_index={ignore_index}"
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        if not fits:
            bad = flat[(flat != ignore_index) & ((flat < 0) | (flat >= vocab_size))]
            raise ValueError(f"{message}, got {bad[0].item()} ({bad.numel()} such)")
    else:
        torch._assert_async(fits, message)  # checked on the device: no wait for the host
    return flat


def _row_scale(
    hidden: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    token_weight: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Factor of each row's loss ``[N]``, 0 for ignored rows, and the number of valid rows."""
    rows, shape = math.prod(hidden.shape[:-1]), hidden.shape[:-1]
    dtype = compute_dtype(hidden)
    if labels is None:
        count = torch.full((), rows, dtype=torch.int64, device=hidden.device)
        scale = torch.ones(rows, dtype=dtype, device=hidden.device)
    else:
        valid = labels != ignore_index
        count, scale = valid.sum(), valid.to(dtype)
    if token_weight is not None:
        if not isinstance(token_weight, Tensor):
            raise ValueError(f"token_weight is a {type(token_weight).__name__}: it must be a tensor of {tuple(shape)}")
        if token_weight.shape != shape:
            raise ValueError(f"token_weight has shape {tuple(token_weight.shape)}, expected {tuple(shape)}")
        _check_device("token_weight", token_weight, hidden)
        # An ignored row keeps weight 0 even if the caller's weight there is NaN.
        weight = token_weight.detach().reshape(-1).to(dtype)
        scale = torch.where(scale > 0, weight, scale)
    if normalizer is not None and reduction != "mean":
        raise ValueError(f'normalizer replaces the count under reduction="mean"; it has no meaning under "{reduction}"')
    if normalizer is not None:
        normalizer = _checked_normalizer(normalizer, hidden)
    if reduction == "mean":
        known = isinstance(normalizer, (int, float)) or (normalizer is not None and normalizer.device.type == "cpu")
        if known and count.device.type == "cpu" and not torch.compiler.is_compiling() and normalizer == 0 and count > 0:
            raise ValueError(f"normalizer is 0, but {int(count)} tokens are valid here: pass the global batch's count")
        # A batch without valid tokens has loss 0 and zero gradients.
        scale = torch.where(scale == 0, scale, scale / (count if normalizer is None else normalizer))
    return scale, count


def _checked_normalizer(normalizer: float | Tensor, hidden: Tensor) -> float | Tensor:
    """A number, or a tensor of one; it is 0 where no process has a valid token."""
    if not isinstance(normalizer, Tensor):
        if not (isinstance(normalizer, (int, float)) and normalizer >= 0):
            raise ValueError(f"normalizer={normalizer!r} must not be negative: the global batch's valid tokens")
        return normalizer
    if normalizer.numel() != 1:
        raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}: it must be one number")
    normalizer = normalizer.detach().reshape(())
    if normalizer.device.type != "cpu":
        _check_device("normalizer", normalizer, hidden)
    if normalizer.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(normalizer >= 0, "normalizer must not be negative")  # checked without waiting for it
    elif not normalizer >= 0:
        raise ValueError(f"normalizer={normalizer.item()} must not be negative: the global batch's valid tokens")
    return normalizer


def _reduce(rows: Tensor, row_scale: Tensor, reduction: str) -> Tensor:
    scaled: Any = weighted(row_scale, rows.detach())
    return scaled if reduction == "none" else scaled.sum()


def _numbers(values: Sequence[Any]) -> Tensor:
    """A float64 tensor of what a schedule may change: on the CPU, or where the inputs are with one a token."""
    if isinstance(values[0], Tensor) and values[0].dim():
        return torch.stack([x if isinstance(x, Tensor) and x.dim() else torch.full_like(values[0], x) for x in values])
    if not torch.compiler.is_compiling():
        return torch.tensor([float(x) for x in values], dtype=torch.float64)
    # Of all ways to make a tensor of a number, only arithmetic keeps it a variable of the compiled graph.
    return torch.stack([torch.zeros((), dtype=torch.float64) + x for x in values])


def _detach(x: Any) -> Any:
    return None if x is None else x.detach()
