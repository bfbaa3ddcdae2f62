"""The registered operator, ``pocl::linear_loss``: divergences and cross-entropies, dispatched to a backend.

Opaque to torch.compile (it carries a fake implementation, so ``fullgraph=True`` holds) and free of autograd: it returns
the per-row results and, where asked, the gradients of ``sum row_scale * loss``; :mod:`pocl_kernels.autograd` attaches
those. A gradient that was not asked for is an empty tensor, since an operator cannot return None.

An operator takes tensors, numbers and one string: :class:`~pocl_kernels.plan.Inputs` travel as a list, and
:class:`Choices` as lines of a text. What a schedule changes comes in ``numbers``, a tensor: a compiled graph is made
anew for every new value of a float.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocl_kernels.cpu import backend as cpu_backend
from pocl_kernels.cpu import logits as cpu_logits
from pocl_kernels.cpu import sparse as cpu_sparse
from pocl_kernels.divergences import Divergence
from pocl_kernels.plan import RESULTS, SPARSE_STATES, STATE_ROWS, Gradients, Inputs, Plan, Rows

PLAIN = {Tensor, torch.nn.Parameter, type(None)}
"""What a call may be given of, with nobody looking on."""


class Choices(NamedTuple):
    """What is compiled into a graph."""

    divergence: str  # its token; empty: the cross-entropy alone
    backend: str
    memory: str
    process_group: str = ""
    products: str = ""  # autocast's dtype on a GPU, e.g. "bfloat16"; empty: that of the inputs
    inplace: str = ""  # not empty: the gradient of logits at hand may be written over them
    tail: str = ""  # of a sparse teacher
    vocab_size: str = ""  # the sparse teacher's, if it is not the student's


def linear_loss(
    inputs: Inputs,
    numbers: Tensor | Sequence[float],
    heads: Sequence[float],
    workspace_mb: float,
    ignore_index: int,
    wanted: Sequence[bool],
    choices: Choices,
) -> Rows:
    """The operator's answer, whose arguments are explained there; a gradient that is not wanted is None or empty.

    Nothing is dispatched where nobody looks on: an operator's way through the dispatcher costs a tenth of a
    millisecond, and it can return tensors alone, where :class:`Rows` may hold a gradient that is still to be made.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not PLAIN.issuperset(map(type, inputs)):
        if not isinstance(numbers, Tensor):
            numbers = torch.tensor(numbers, dtype=torch.float64)
        return Rows(*operator(list(inputs), numbers, heads, workspace_mb, ignore_index, wanted, "\n".join(choices)))
    return _compute(inputs, numbers, heads, workspace_mb, ignore_index, wanted, choices, later=True)


# A call waits for the device: it cannot be part of a CUDA graph.
@torch.library.custom_op("pocl::linear_loss", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def operator(
    inputs: Sequence[Tensor | None],  # the fields of Inputs
    # [3 + parameters] on the CPU: temperature, factor of D, ce_weight, the divergence's parameters; or one a token,
    # [3 + parameters, N] where the inputs are. Without a divergence: label smoothing and the z-loss's coefficient
    numbers: Tensor,
    # student's scale and softcap (0: none), then the teacher's; ce_weight again, for numbers that are one a token
    heads: Sequence[float],
    workspace_mb: float,
    ignore_index: int,
    wanted: Sequence[bool],  # gradients of hidden, weight, bias
    choices: str,  # the fields of Choices, a line each
) -> list[Tensor]:  # results, gradients of hidden, weight, bias, state
    chosen = Choices(*choices.split("\n"))
    rows = _compute(_inputs(inputs), numbers, heads, workspace_mb, ignore_index, wanted, chosen, later=False)
    rows = rows._replace(results=rows.results.contiguous())  # as the fake implementation says
    return [rows.results.new_empty(0) if x is None else x for x in rows]  # type: ignore[misc]


def _compute(
    given: Inputs,
    numbers: Tensor | Sequence[float],
    heads: Sequence[float],
    workspace_mb: float,
    ignore_index: int,
    wanted: Sequence[bool],
    chosen: Choices,
    *,
    later: bool,
) -> Rows:
    if isinstance(numbers, Tensor) and numbers.dim() == 2:
        plan = _plan(numbers.unbind(), heads, workspace_mb, ignore_index, chosen, later)
    else:
        values = numbers.tolist() if isinstance(numbers, Tensor) else numbers
        plan = _plan_of_numbers(tuple(values), tuple(heads), workspace_mb, ignore_index, chosen, later)
    if given.student_weight is None:
        return logits_module(chosen.backend, given.student_hidden.device).divergence(given, plan, Gradients(*wanted))
    if chosen.tail:
        return sparse_module(chosen.backend, given.student_hidden.device).linear_sparse(given, plan, Gradients(*wanted))
    module = backend_module(chosen.backend, given.student_hidden.device)
    function = module.linear_divergence if chosen.divergence else module.linear_cross_entropy
    return function(given, plan, Gradients(*wanted))


def _plan(
    numbers: Sequence[Any], heads: Sequence[float], workspace_mb: float, ignore_index: int, chosen: Choices, later: bool
) -> Plan:
    temperature, divergence_factor, ce_weight, *parameters = numbers
    if len(heads) > 4:
        ce_weight = heads[4]
    smoothing, z_loss = (0.0, 0.0) if chosen.divergence else parameters
    kind = Divergence.classes[chosen.divergence] if chosen.divergence else None
    return Plan(
        divergence=None if kind is None else kind.from_parameters(parameters),
        temperature=temperature,
        divergence_factor=divergence_factor,
        ce_weight=float(ce_weight),
        ignore_index=ignore_index,
        student_scale=heads[0],
        student_softcap=heads[1] or None,
        teacher_scale=heads[2],
        teacher_softcap=heads[3] or None,
        workspace_mb=workspace_mb,
        process_group=chosen.process_group,
        memory=chosen.memory,
        later=later,
        inplace=later and bool(chosen.inplace),  # an operator must not change what it is given
        label_smoothing=float(smoothing),
        z_loss=float(z_loss),
        products=getattr(torch, chosen.products) if chosen.products else None,
        tail=chosen.tail,
        vocab_size=int(chosen.vocab_size or 0),
    )


_plan_of_numbers = functools.lru_cache(maxsize=256)(_plan)  # every call asks, and a schedule has many numbers


@operator.register_fake
def _(
    inputs: Sequence[Tensor | None],
    numbers: Tensor,
    heads: Sequence[float],
    workspace_mb: float,
    ignore_index: int,
    wanted: Sequence[bool],
    choices: str,
) -> list[Tensor]:
    given, chosen = _inputs(inputs), Choices(*choices.split("\n"))
    hidden, weight, dtype = given.student_hidden, given.student_weight, given.dtype
    keeps = chosen.memory == "low" and not any(wanted) and is_triton(chosen.backend, hidden.device)
    rows = given.row_scale.shape[0]
    states = STATE_ROWS if given.token_ids is None else SPARSE_STATES + given.token_ids.shape[1]
    results, state = (RESULTS, rows), (states, rows) if keeps else (0,)
    if weight is None:
        gradient = hidden.new_empty(hidden.shape if wanted[0] else (0,), dtype=hidden.dtype if wanted[0] else dtype)
        others = [hidden.new_empty(shape, dtype=dtype) for shape in (results, (0,), (0,), state)]
        return [others[0], gradient, *others[1:]]
    shapes = [
        results,
        hidden.shape if wanted[0] else (0,),
        weight.shape if wanted[1] else (0,),
        weight.shape[:1] if wanted[2] else (0,),
        state,
    ]
    return [hidden.new_empty(shape, dtype=dtype) for shape in shapes]


def _inputs(tensors: Sequence[Tensor | None]) -> Inputs:
    return Inputs(*tensors)  # type: ignore[arg-type]


def backend_module(backend: str, device: torch.device) -> ModuleType:
    """The module that serves ``backend``, "auto" by the device: Triton on CUDA and ROCm, imported when first needed."""
    if is_triton(backend, device):
        from pocl_kernels.triton_backend import backend as triton_backend

        return triton_backend
    return cpu_backend


def logits_module(backend: str, device: torch.device) -> ModuleType:
    """As :func:`backend_module`, for logits at hand."""
    if is_triton(backend, device):
        from pocl_kernels.triton_backend import logits as triton_logits

        return triton_logits
    return cpu_logits


def sparse_module(backend: str, device: torch.device) -> ModuleType:
    """As :func:`backend_module`, for sparse teachers."""
    if is_triton(backend, device):
        from pocl_kernels.triton_backend import sparse as triton_sparse

        return triton_sparse
    return cpu_sparse


def is_triton(backend: str, device: torch.device) -> bool:
    """Whether Triton serves ``backend`` on the device."""
    return backend == "triton" or (backend == "auto" and device.type == "cuda")
