"""Prints a divergence's definition as a Triton function, so that no kernel here knows a divergence.

The kernels call ``term(l, r, q, p, d, l0, r0, d0, uniforms, row) -> (value, slope)``, d = l - r; the slope is relative
to the anchor, whose l and r are l0 and r0 (``device.py``). Whatever depends on the run-time parameters alone (``log(1 -
skew)`` and the like) is computed on the host in double precision and passed as the tuple ``uniforms``: a schedule that
changes a parameter at every step never compiles anew. A uniform is a number, or a pointer to one a row. Two divergences
with the same code share one function.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pocl_kernels import scalar
from pocl_kernels.divergences import Divergence
from pocl_kernels.scalar import GIVEN, Program, name_of, trace
from pocl_kernels.triton_backend.device import exp

TRITON_SYNTAX = {
    "const": "{0}",
    "add": "({} + {})",
    "sub": "({} - {})",
    "mul": "({} * {})",
    "div": "({} / {})",
    "neg": "(-{})",
    "lt": "({} < {})",
    "eq": "({} == {})",
    "where": "tl.where({}, {}, {})",
    "exp": "exp({})",
    "log": "tl.log({})",
    "abs": "tl.abs({})",
}


class Term(NamedTuple):
    """A divergence as the kernels take it: the compiled-in function and this call's numbers for it."""

    function: Any  # @triton.jit: (l, r, q, p, d, l0, r0, d0, uniforms, row) -> (value, slope)
    uniforms: tuple[Any, ...]  # numbers, or float32 [n] of one a row


def term_of(divergence: Divergence) -> Term:
    """The Triton function of a divergence, made once for each distinct code, and its run-time numbers."""
    parameters = divergence.parameters()
    rows = next((x for x in parameters if isinstance(x, Tensor)), None)
    if rows is None:
        return _term(type(divergence), tuple(parameters))
    values = program_of(type(divergence)).uniform_values(parameters)
    uniforms = tuple(torch.as_tensor(x).to(rows).float().expand_as(rows).contiguous() for x in values)
    return Term(function_of(type(divergence), True), uniforms)


@functools.cache
def function_of(kind: type[Divergence], by_token: bool = False) -> Any:
    """The Triton function of a class; ``by_token``: its uniforms are pointers to one a row."""
    return _function(source(program_of(kind), by_token))


def slope_sum(divergence: Divergence) -> float | None:
    """See :func:`pocl_kernels.scalar.slope_sum`."""
    return scalar.slope_sum(divergence, program_of(type(divergence)))


@functools.lru_cache(maxsize=256)  # every launch asks
def _term(kind: type[Divergence], parameters: tuple[float, ...]) -> Term:
    program = program_of(kind)
    return Term(_function(source(program)), tuple(float(x) for x in program.uniform_values(parameters)))


@functools.cache
def program_of(kind: type[Divergence]) -> Program:
    """The traced definition of a class; the fields' values play no part in the code."""
    return trace(object.__new__(kind))


def source(program: Program, by_token: bool = False) -> str:
    """Python source of the Triton function of one traced definition."""
    read = "tl.load(uniforms[{}] + row)" if by_token else "uniforms[{}]"
    row, body = program.render(
        TRITON_SYNTAX, lambda name, expression: f"{name} = {expression}", given=GIVEN | {"exp l": "q", "exp r": "p"}
    )
    # A condition on the parameters travels as 0 or 1.
    unpack = [
        f"{name_of(node)} = {read.format(i)}" + (" != 0.0" if node.op in ("lt", "eq") else "")
        for i, node in enumerate(program.uniforms)
    ]
    lines = "\n".join(f"    {line}" for line in (*unpack, *row, *body))
    return f"@triton.jit\ndef term(l, r, q, p, d, l0, r0, d0, uniforms, row):\n{lines}\n    return value, slope\n"


@functools.cache
def _function(text: str) -> Any:
    # Triton reads the source of a function again: linecache is where Python looks for the source of code without a
    # file.
    name = f"<pocl divergence {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"triton": triton, "tl": tl, "exp": exp, "__name__": __name__}
    exec(compile(text, name, "exec"), namespace)
    return namespace["term"]
