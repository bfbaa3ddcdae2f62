"""Attaches the gradients that a backend computed to PyTorch's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# (hidden, weight, bias, row_scale, wanted, state) -> loss rows [N], other per-row results, gradients or empty tensors
Run = Callable[[Tensor, Tensor, Tensor | None, Tensor, list[bool], Tensor | None], "Result"]


class Result(NamedTuple):
    """One run of a kernel: the loss of each row, what is logged beside it, and the gradients (empty if not wanted)."""

    loss_rows: Tensor
    others: tuple[Tensor, ...]
    gradients: tuple[Tensor, Tensor, Tensor]
    state: Tensor  # what the backend wants back for gradients alone; empty: nothing


class FusedLoss(torch.autograd.Function):
    """Loss of the rows, or their sum, with gradients for hidden states, weight and bias of the student.

    With ``now`` the gradients are computed in the forward pass, for an upstream gradient of 1, while the logits are at
    hand. The first backward pass scales them in place and gives them away, so that no second copy of a [V, H] gradient
    exists; a further backward pass (``retain_graph=True``) computes them anew, as does every one without ``now``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_scale: Tensor,
        run: Run,
        now: bool,
        total: bool,
    ) -> tuple[Tensor, ...]:
        wanted = list(ctx.needs_input_grad[:3])
        result = run(hidden, weight, bias, row_scale, wanted if now else [False, False, False], None)
        ctx.save_for_backward(hidden, weight, bias, row_scale, result.state)
        ctx.run, ctx.wanted = run, wanted
        ctx.ready = result.gradients if now and any(wanted) else None
        ctx.mark_non_differentiable(*result.others)
        rows = result.loss_rows * row_scale
        return (rows.sum() if total else rows, *result.others)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        compiling = torch.compiler.is_compiling()
        ready = ctx.ready
        if ready is None:
            row_scale = inputs[3] * upstream
            state = inputs[4] if inputs[4].numel() else None
            gradients = ctx.run(*inputs[:3], row_scale, ctx.wanted, state).gradients
        elif compiling:
            gradients = tuple(g * upstream for g in ready)
        else:
            ctx.ready = None
            # On the CPU a look at the value costs nothing and saves a pass over [V, H]; elsewhere it would wait for the
            # GPU.
            if upstream.device.type != "cpu" or upstream.item() != 1.0:
                for g in ready:
                    g.mul_(upstream)
            gradients = ready
        result = [g.to(x.dtype) if w else None for g, x, w in zip(gradients, inputs[:3], ctx.wanted, strict=True)]
        return (*result, None, None, None, None)
