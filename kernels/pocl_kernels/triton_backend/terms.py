"""Prints a divergence's definition as a Triton function, so that no kernel here knows a divergence.

The kernels call ``term(l, r, uniforms) -> (value, slope)``. Whatever depends on the run-time parameters alone (``log(1
- skew)`` and the like) is computed on the host in double precision and passed as the tuple ``uniforms``: a schedule
that changes a parameter at every step never compiles anew. Two divergences with the same code share one function.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from pocl_kernels import scalar
from pocl_kernels.divergences import Divergence
from pocl_kernels.scalar import Program, Scalar, trace

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
    "exp": "tl.exp({})",
    "log": "tl.log({})",
    "abs": "tl.abs({})",
}


def _divide(x: float, y: float) -> float:
    if y != 0.0:
        return x / y
    return math.nan if x == 0.0 or math.isnan(x) else math.copysign(math.inf, x) * math.copysign(1.0, y)


_ON_HOST: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": _divide,
    "neg": lambda x: -x,
    "lt": lambda x, y: x < y,
    "eq": lambda x, y: x == y,
    "where": lambda c, x, y: x if c else y,
    "exp": scalar.exp,
    "log": scalar.log,
    "abs": abs,
}


class Term(NamedTuple):
    """A divergence as the kernels take it: the compiled-in function and this call's numbers for it."""

    function: Any  # @triton.jit: (l, r, uniforms) -> (value, slope)
    uniforms: tuple[float, ...]


def term_of(divergence: Divergence) -> Term:
    """The Triton function of a divergence, made once for each distinct code, and its run-time numbers."""
    program = _program(type(divergence))
    uniforms = _uniform_values(program, dict(zip(program.parameters, divergence.parameters(), strict=True)))
    return Term(_function(source(program)), uniforms)


def slope_sum(divergence: Divergence) -> float | None:
    """``sum slope`` where it is the same for all rows, else None: -a for D = a KL(p, q), whose slope is -a p."""
    weights = divergence.kl_weights
    return -weights[0] if weights is not None and weights[1] == 0.0 else None


@functools.cache
def _program(kind: type[Divergence]) -> Program:
    return trace(object.__new__(kind))  # the fields' values play no part in the code


def source(program: Program) -> str:
    """Python source of the Triton function of one traced definition."""
    _, body = program.render(TRITON_SYNTAX, lambda name, expression: f"{name} = {expression}")
    # A condition on the parameters travels as 0 or 1.
    unpack = [
        f"{_name(node)} = uniforms[{i}]" + (" != 0.0" if node.op in ("lt", "eq") else "")
        for i, node in enumerate(_uniforms(program))
    ]
    lines = "\n".join(f"    {line}" for line in (*unpack, *body))
    return f"@triton.jit\ndef term(l, r, uniforms):\n{lines}\n    return value, slope\n"


def _name(node: Scalar) -> str:
    return str(node.payload) if node.op == "param" else f"t{node.index}"


def _uniforms(program: Program) -> list[Scalar]:
    """The nodes without l or r that the loop body reads; constants are printed in place."""
    results = (program.value, program.slope)
    used = {a.index for n in program.nodes if not n.uniform and n.op != "input" for a in n.args}
    used |= {n.index for n in results}
    return [n for n in program.nodes if n.uniform and n.op != "const" and n.index in used]


def _uniform_values(program: Program, parameters: dict[str, float]) -> tuple[float, ...]:
    values: dict[int, Any] = {}
    for node in program.nodes:
        if node.op == "const":
            values[node.index] = node.payload
        elif node.op == "param":
            values[node.index] = parameters[str(node.payload)]
        elif node.uniform:
            values[node.index] = _ON_HOST[node.op](*(values[a.index] for a in node.args))
    return tuple(float(values[n.index]) for n in _uniforms(program))


@functools.cache
def _function(text: str) -> Any:
    # Triton reads the source of a function again: linecache is where Python looks for the source of code without a
    # file.
    name = f"<pocl divergence {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(text, name, "exec"), namespace)
    return namespace["term"]
