"""Attaches the gradients that a backend computed to PyTorch's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocl_kernels.plan import CROSS_ENTROPY, DIVERGENCE

# (hidden, weight, bias, row_scale, wanted, state, constants) -> Result
Run = Callable[[Tensor, Tensor | None, Tensor | None, Tensor, list[bool], Tensor | None, Sequence[Any]], "Result"]


# A function takes the upstream gradient, None for 1, and returns the gradient in its final dtype.
Gradient = Tensor | Callable[[Tensor | None], Tensor]


OVERWRITTEN = "_pocl_overwritten"
"""Attribute of a tensor: its version when gradients were last written over it, and over which of its views."""


class Result(NamedTuple):
    """One run of a kernel: the results of each row, what the loss takes of them, and the gradients (None, empty: not
    wanted).
    """

    results: Tensor  # [RESULTS, N]
    factor: Any  # of the first of them, D or a loss: a number, or [N] of one a row
    ce_weight: float  # of the cross-entropy
    gradients: tuple[Gradient | None, ...]
    state: Tensor | None  # what the backend wants back for gradients alone; None or empty: nothing
    overwritten: bool = False  # the first gradient lies over the first input, whose values are lost


class FusedLoss(torch.autograd.Function):
    """Loss of the rows, or their sum, with gradients for hidden states, weight and bias of the student; and the results
    times the rows' weights, or their sums.

    With ``now`` the gradients are computed in the forward pass, for an upstream gradient of 1, while the logits are at
    hand. The first backward pass scales them in place and gives them away, so that no second copy of a [V, H] gradient
    exists; a further backward pass (``retain_graph=True``) computes them anew, as does every one without ``now``.

    Without a weight the hidden states are logits, over which the gradient may be written: then their version rises, so
    that whoever else saved them for a backward pass is told, and so is a second backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        row_scale: Tensor,
        run: Run,
        now: bool,
        total: bool,
        *constants: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        wanted = list(ctx.needs_input_grad[:3])
        result = run(hidden, weight, bias, row_scale, wanted if now else [False, False, False], None, constants)
        # Saved, so that a change in place is noticed. A tensor of inference mode cannot be saved, nor changed.
        compiling = torch.compiler.is_compiling()
        ctx.frozen = [x if x is not None and not compiling and x.is_inference() else None for x in constants]
        # With the logits overwritten nothing can be computed again, and the caller may give up the teacher's.
        changeable = [
            x if f is None and not result.overwritten else None for x, f in zip(constants, ctx.frozen, strict=True)
        ]
        # Of logits that are overwritten the memory alone: a view that changed cannot be had back with its history.
        kept = hidden.detach() if result.overwritten else hidden
        ctx.save_for_backward(kept, weight, bias, row_scale, result.state, *changeable)
        ctx.run, ctx.wanted = run, wanted
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.overwritten = result.overwritten
        if result.overwritten:
            _note_overwritten(hidden)
        ctx.ready = result.gradients if now and any(wanted) else None
        parts = result.results * row_scale
        if not total:
            loss = _mixed(parts, result)
        elif isinstance(result.factor, Tensor):
            loss, parts = _mixed(parts, result).sum(), parts.sum(-1)
        else:
            parts = parts.sum(-1)
            loss = _mixed(parts, result)
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        differentiates = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # create_graph=True
        if ctx.overwritten and (ctx.ready is None or differentiates):
            raise RuntimeError(
                "the gradient was written over the student's logits (inplace=True), so nothing is left to compute it "
                "from a second time: pass inplace=False to go backward twice, or with create_graph=True"
            )
        # Raises where what was saved has changed since, the gradient over the logits too.
        inputs = [x for x in ctx.saved_tensors[:3] if x is not None] if differentiates or ctx.overwritten else []
        if not torch.is_grad_enabled():
            gradients = FusedLoss._gradients(ctx, upstream)
        else:
            with torch.no_grad():
                gradients = FusedLoss._gradients(ctx, upstream)
        if differentiates:
            gradients = tuple(None if g is None else _Once.apply(g, upstream, *inputs) for g in gradients)
        return (*gradients, *[None] * (4 + len(ctx.frozen)))

    @staticmethod
    def _gradients(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        ready = ctx.ready
        if ready is None:
            hidden, weight, bias, row_scale, kept, *changeable = ctx.saved_tensors
            constants = [f if c is None else c for f, c in zip(ctx.frozen, changeable, strict=True)]
            state = kept if kept is not None and kept.numel() else None
            result = ctx.run(hidden, weight, bias, row_scale * upstream, ctx.wanted, state, constants)
            if result.overwritten:
                ctx.overwritten = True
                _note_overwritten(hidden)
            gradients = result.gradients
            upstream = None  # it is in the weights of the rows
        else:
            gradients, ctx.ready = ready, None
        return tuple(
            _scaled(g, upstream, d) if w else None for g, d, w in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
        )


def holds_gradient(logits: Tensor) -> bool:
    """Whether a gradient was written over these very entries and nothing has been written there since."""
    base = logits if logits._base is None else logits._base
    version, places = getattr(base, OVERWRITTEN, (None, frozenset()))
    return _place(logits) in places and version == base._version


def _note_overwritten(logits: Tensor) -> None:
    """Raise the version of logits that are a gradient now, for whoever saved them, and remember it with the tensor."""
    base = logits if logits._base is None else logits._base
    version, places = getattr(base, OVERWRITTEN, (None, frozenset()))
    others: frozenset[Any] = places if version == base._version else frozenset()
    torch.autograd.graph.increment_version(logits)
    setattr(base, OVERWRITTEN, (base._version, others | {_place(logits)}))


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride()


def _mixed(parts: Tensor, result: Result) -> Tensor:
    """The loss of rows or of their sums, in memory of its own."""
    if result.ce_weight == 1:  # a part without weight must not enter: 0 * inf is not 0
        return parts[CROSS_ENTROPY].clone()
    loss: Tensor = parts[DIVERGENCE] * result.factor
    return loss if result.ce_weight == 0 else loss + result.ce_weight * parts[CROSS_ENTROPY]


def _scaled(gradient: Gradient, upstream: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``upstream * gradient`` in ``dtype``, rounded once. The gradient is given away: it may be scaled in place."""
    if not isinstance(gradient, Tensor):
        return gradient(upstream)
    if upstream is None:  # it is in the gradient already
        return gradient.to(dtype)
    if torch.compiler.is_compiling():
        return (gradient * upstream).to(dtype)
    if upstream.device.type == "cpu":
        # A look at the value costs nothing here and saves a pass over [V, H]; elsewhere it would wait for the GPU.
        return (gradient if upstream.item() == 1.0 else gradient.mul_(upstream)).to(dtype)
    if gradient.dtype == dtype:
        return gradient.mul_(upstream)
    return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))  # one kernel: rounds as it writes


class _Once(torch.autograd.Function):
    """A gradient that depends on the upstream gradient and the inputs, and says so when it is to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "the gradient of a fused loss cannot be differentiated again (a gradient penalty, a Hessian): compute this "
            "loss from full logits in plain PyTorch"
        )
