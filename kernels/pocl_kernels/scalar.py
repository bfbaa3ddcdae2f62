"""The scalar language in which a divergence is written once and runs everywhere.

A divergence is two functions of two numbers, the log-probabilities ``l = log q`` (student) and ``r = log p`` (teacher)
of one vocabulary entry. They are written with ordinary arithmetic and the functions of this module, which accept

* a ``torch.Tensor``: evaluated at once (eager CPU path, float64 checks),
* a Python number: evaluated at once in double precision (constants such as ``log(1 - skew)``),
* a :class:`Scalar`: recorded. :func:`trace` turns the recording into straight-line code that the C and the Triton
  backends print in their own syntax, common subexpressions shared, run-time parameters hoisted out of the loop.

``-inf`` is a legal log-probability (a masked token) and ``0 * inf`` must not appear: use :func:`weighted` for
"probability times something" and :func:`kl_term` for the terms of a Kullback-Leibler divergence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Value = Any  # Tensor | float | Scalar: the language is deliberately duck-typed

UNIFORM, ROW, ENTRY = range(3)
"""Levels of a recorded node: of the parameters alone, of a row's anchor too, of the entry's own l and r."""
ANCHOR = ("l0", "r0")
GIVEN = {"sub l r": "d", "sub r l": "(-d)", "sub l0 r0": "d0", "sub r0 l0": "(-d0)"}
"""What every kernel has at hand beside its inputs: their differences, from the logits' own, which are exact where the
two models are close.
"""


class Scalar:
    """One node of a recorded expression; nodes of one :class:`Recorder` are unique, so identity is equality."""

    __slots__ = ("args", "index", "level", "op", "payload", "recorder")

    def __init__(self, recorder: Recorder, op: str, args: tuple[Scalar, ...], payload: float | str | None) -> None:
        self.recorder, self.op, self.args, self.payload = recorder, op, args, payload
        self.index = len(recorder.nodes)
        # How often the node has another value, which is how often it is computed.
        leaf = ROW if payload in ANCHOR else ENTRY if op == "input" else UNIFORM
        self.level: int = max((a.level for a in args), default=leaf)

    def __add__(self, other: Value) -> Scalar:
        return self.recorder.node("add", self, other)

    def __radd__(self, other: Value) -> Scalar:
        return self.recorder.node("add", other, self)

    def __sub__(self, other: Value) -> Scalar:
        return self.recorder.node("sub", self, other)

    def __rsub__(self, other: Value) -> Scalar:
        return self.recorder.node("sub", other, self)

    def __mul__(self, other: Value) -> Scalar:
        return self.recorder.node("mul", self, other)

    def __rmul__(self, other: Value) -> Scalar:
        return self.recorder.node("mul", other, self)

    def __truediv__(self, other: Value) -> Scalar:
        return self.recorder.node("div", self, other)

    def __rtruediv__(self, other: Value) -> Scalar:
        return self.recorder.node("div", other, self)

    def __neg__(self) -> Scalar:
        return self.recorder.node("neg", self)

    def __abs__(self) -> Scalar:
        return self.recorder.node("abs", self)

    def __pow__(self, exponent: int) -> Scalar:
        if exponent != 2:
            raise TypeError(f"only squares are available as a power, got ** {exponent}; write exp(y * log(x)) instead")
        return self * self

    def __lt__(self, other: Value) -> Scalar:
        return self.recorder.node("lt", self, other)

    def __gt__(self, other: Value) -> Scalar:
        return self.recorder.node("lt", other, self)

    def __eq__(self, other: Value) -> Scalar:  # type: ignore[override]
        return self.recorder.node("eq", self, other)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError(
            "a divergence cannot branch with `if`, `and`, `max`: use where(condition, a, b) and maximum(a, b)"
        )


class Recorder:
    """Makes and shares the nodes of one recording."""

    def __init__(self) -> None:
        self.nodes: list[Scalar] = []
        self._known: dict[tuple[Any, ...], Scalar] = {}

    def leaf(self, op: str, payload: float | str) -> Scalar:
        return self._intern(op, (), payload)

    def node(self, op: str, *args: Value) -> Scalar:
        return self._intern(op, tuple(a if isinstance(a, Scalar) else self.leaf("const", float(a)) for a in args), None)

    def _intern(self, op: str, args: tuple[Scalar, ...], payload: float | str | None) -> Scalar:
        if isinstance(payload, float) and not math.isfinite(payload):
            raise ValueError(
                f"a divergence must not contain the constant {payload}: guard with weighted() or where() instead"
            )
        key = (op, tuple(a.index for a in args), payload)
        if key not in self._known:
            node = Scalar(self, op, args, payload)
            self.nodes.append(node)
            self._known[key] = node
        return self._known[key]


@dataclasses.dataclass(frozen=True)
class Program:
    """Straight-line code for ``value`` and ``relative_slope``: what a backend prints.

    ``nodes`` are in evaluation order and hold only what the two results need; ``parameters`` are the names of the
    run-time parameters; ``key`` identifies the code.
    """

    nodes: tuple[Scalar, ...]
    value: Scalar
    slope: Scalar
    parameters: tuple[str, ...]

    @property
    def key(self) -> str:
        return "\n".join(f"{n.index}={n.op}{[a.index for a in n.args]}{n.payload!r}" for n in self.nodes) + (
            f"\n{self.value.index},{self.slope.index},{self.parameters}"
        )

    @functools.cached_property
    def uniforms(self) -> tuple[Scalar, ...]:
        """The nodes of the parameters alone that others read: a backend takes their values, in this order, and not
        the parameters. Constants are printed in place.
        """
        read = {a.index for n in self.nodes if n.level != UNIFORM for a in n.args}
        read |= {self.value.index, self.slope.index}
        return tuple(n for n in self.nodes if n.level == UNIFORM and n.op != "const" and n.index in read)

    def uniform_values(self, parameters: Sequence[Any]) -> list[Any]:
        """Values of :attr:`uniforms`, in double precision, where rounding them would cost every entry its digits."""
        given = dict(zip(self.parameters, parameters, strict=True))
        values: dict[int, Any] = {}
        for node in self.nodes:
            if node.op == "param":
                values[node.index] = given[str(node.payload)]
            elif node.op == "const":
                values[node.index] = node.payload
            elif node.level == UNIFORM:
                values[node.index] = _EVALUATE[node.op](*(values[a.index] for a in node.args))
        return [values[n.index] for n in self.uniforms]

    @property
    def anchored(self) -> bool:
        """Whether the code reads the anchor."""
        return any(n.payload in ANCHOR for n in self.nodes)

    def render(
        self, syntax: dict[str, str], declare: Callable[[str, str], str], *, given: Mapping[str, str] | None = None
    ) -> tuple[list[str], list[str]]:
        """Print the program: lines for each row (outside the loop) and lines for the body.

        ``syntax`` maps each operation to a format string over its operands; ``declare(name, expression)`` prints one
        assignment. The inputs are named ``l``, ``r``, ``l0`` and ``r0``, the results ``value`` and ``slope``, the
        uniforms as by :func:`name_of`. ``given`` names what the caller has at hand, by operation and inputs, such as
        :data:`GIVEN`.
        """
        names = {node.index: name_of(node) for node in self.nodes}
        head: list[str] = []
        body: list[str] = []
        for node in self.nodes:
            if node.op == "const":
                names[node.index] = syntax["const"].format(repr(node.payload))
            elif (known := " ".join((node.op, *(str(a.payload) for a in node.args)))) in (given or {}):
                names[node.index] = (given or {})[known]
            elif node.level != UNIFORM and node.op != "input":
                expression = syntax[node.op].format(*(names[a.index] for a in node.args))
                (head if node.level == ROW else body).append(declare(names[node.index], expression))
        body.append(declare("value", names[self.value.index]))
        body.append(declare("slope", names[self.slope.index]))
        return head, body


def name_of(node: Scalar) -> str:
    """A node's name in printed code."""
    return str(node.payload) if node.op in ("input", "param") else f"t{node.index}"


def trace(divergence: Any) -> Program:
    """Record ``divergence.value`` and ``divergence.relative_slope``; dataclass fields become run-time parameters."""
    recorder = Recorder()
    fields = [f.name for f in dataclasses.fields(divergence)]
    names = tuple(f"k_{field}" for field in fields)  # no clash with a kernel's own variables
    symbolic = object.__new__(type(divergence))
    for field, name in zip(fields, names, strict=True):
        object.__setattr__(symbolic, field, recorder.leaf("param", name))
    l, r, l0, r0 = (recorder.leaf("input", name) for name in ("l", "r", *ANCHOR))
    results = [_recorded(symbolic, recorder, "value", l, r)]
    # By itself first, so that what is wrong with it is said of the slope.
    _recorded(symbolic, recorder, "slope", l, r)
    results.append(_recorded(symbolic, recorder, "relative_slope", l, r, l0, r0))
    needed: set[int] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node.index not in needed:
            needed.add(node.index)
            stack.extend(node.args)
    return Program(tuple(n for n in recorder.nodes if n.index in needed), results[0], results[1], names)


def slope_sum(divergence: Any, program: Program) -> float | None:
    """``sum slope`` where it is the same for all rows, else None: -a for D = a KL(p, q), whose slope is -a p."""
    if program.anchored or divergence.kl_weights is None:
        return None
    a, b = divergence.kl_weights
    return -a if b == 0.0 else None


def _recorded(divergence: Any, recorder: Recorder, function: str, *inputs: Scalar) -> Scalar:
    result = getattr(divergence, function)(*inputs)
    if isinstance(result, (int, float)):
        return recorder.leaf("const", float(result))
    if not isinstance(result, Scalar):
        raise TypeError(
            f"{type(divergence).__name__}.{function} returned {type(result).__name__}: build it from l, r, the "
            "fields of the divergence and the functions of pocl_kernels.scalar"
        )
    return result


# --- The functions ----------------------------------------------------------------------------------------------------


def _dispatch(
    op: str, tensor_function: Callable[..., Any], number_function: Callable[..., float], *args: Value
) -> Value:
    for a in args:
        if isinstance(a, Scalar):
            return a.recorder.node(op, *args)
    if any(isinstance(a, torch.Tensor) for a in args):
        return tensor_function(*args)
    return number_function(*args)


def exp(x: Value) -> Value:
    """e^x."""
    return _dispatch("exp", torch.exp, math.exp, x)


def log(x: Value) -> Value:
    """Natural logarithm; ``log(0) = -inf``."""
    return _dispatch("log", torch.log, lambda v: math.log(v) if v > 0 else -math.inf, x)


def absolute(x: Value) -> Value:
    """|x|."""
    return _dispatch("abs", torch.abs, abs, x)


def maximum(x: Value, y: Value) -> Value:
    """The larger of two, elementwise."""
    return where(x < y, y, x)


def where(condition: Value, a: Value, b: Value) -> Value:
    """``a`` where the condition holds, else ``b``; both are evaluated."""
    if isinstance(condition, bool):  # of two numbers, such as the weight of a mixture
        return a if condition else b
    return _dispatch("where", torch.where, lambda c, x, y: x if c else y, condition, a, b)


def equal(x: Value, y: Value) -> Value:
    """x == y, elementwise."""
    return x == y


def sign(x: Value) -> Value:
    """-1, 0 or 1."""
    return where(x > 0.0, 1.0, where(x < 0.0, -1.0, 0.0 * x))


def log1p_unit(x: Value) -> Value:
    """log(1 + x) for x in [0, 1], by 2 artanh(x / (2 + x)): branch-free, error about 1 ulp of float32."""
    if isinstance(x, torch.Tensor):
        return torch.log1p(x)
    if not isinstance(x, Scalar):
        return math.log1p(x)
    s = x / (2.0 + x)
    s2 = s * s
    series: Value = 1.0 / 13.0
    for k in (11, 9, 7, 5, 3, 1):  # s <= 1/3, so the first neglected term is below 1.4e-8
        series = series * s2 + 1.0 / k
    return 2.0 * s * series


def log_mixture(x: Value, y: Value, weight: Value) -> Value:
    """log(weight e^x + (1 - weight) e^y) as a log-add-exp; exact at weight 0 and 1 and at -inf."""
    a, b = log(weight) + x, log(1.0 - weight) + y
    # Both -inf: their difference is NaN, the mixture is -inf.
    return where(equal(a, b), a + math.log(2.0), maximum(a, b) + log1p_unit(exp(-absolute(a - b))))


def log_ratios(l: Value, r: Value, weight: Value) -> tuple[Value, Value]:
    """``log(m / p)`` and ``log(m / q)`` of the mixture ``m = weight p + (1 - weight) q``.

    From the difference of l and r, so that a mixture of two close numbers keeps the digits of their distance. Exact at
    weight 0 and 1; where p is 0 the first is meaningless, where q is 0 the second.
    """
    d = l - r
    log_p, log_q = log(weight), log(1.0 - weight)
    # log(weight p) - log((1 - weight) q); at the ends, where one of the two is masked, infinity less infinity.
    t = where(weight > 0.0, where(weight < 1.0, (log_p - log_q) - d, 100.0), -100.0)
    rest = log1p_unit(exp(-absolute(t)))
    student = t < 0.0  # has the larger part
    by_p, by_q = rest + log_p, rest + log_q
    return where(student, by_q + d, by_p), where(student, by_q, by_p - d)


def weighted(a: Value, x: Value) -> Value:
    """a * x, and 0 where a is 0, whatever x is (0 log 0 = 0)."""
    return where(equal(a, 0.0), 0.0, a * x)


def share(a: Value, b: Value) -> Value:
    """a / b, and 0 where b is 0: the part that ``a`` has in a sum ``b`` of probabilities."""
    if isinstance(b, (int, float)):
        return a / b if b else 0.0
    return where(equal(b, 0.0), 0.0, a / b)


def kl_term(a: Value, log_a: Value, b: Value, log_b: Value) -> Value:
    """One term of KL(a, b) as ``a phi(log b - log a)``, ``phi(x) = e^x - 1 - x``: never negative.

    Summed over the vocabulary it equals ``sum a (log a - log b)`` since both sum to one, without its cancellation.
    """
    return phi_term(a, b, log_b - log_a)


def phi_term(a: Value, b: Value, x: Value) -> Value:
    """``a phi(x)`` for b = a e^x, and b where a is 0: the term of KL(a, b) where the log of their ratio is at hand."""
    near = a * phi_series(x)
    far = b - a - a * x
    return where(equal(a, 0.0), b, where(absolute(x) < 0.5, near, far))


def phi_series(x: Value) -> Value:
    """phi(x) = e^x - 1 - x for |x| < 1/2, to the last bit where the closed form cancels."""
    return x * x * _series(x)


def expm1_ratio(x: Value) -> Value:
    """(e^x - 1) / x for |x| < 1/2; 1 at 0."""
    return 1.0 + x * _series(x)


def _series(x: Value) -> Value:
    """phi(x) / x^2 for |x| < 1/2."""
    # Terms of x^k / k! up to k = 8 reach float32 on |x| < 1/2 (the next is 4e-8 of the sum), up to k = 17 float64.
    double = x.dtype == torch.float64 if isinstance(x, torch.Tensor) else not isinstance(x, Scalar)
    top = 17 if double else 8
    series: Value = 1.0 / math.factorial(top)
    for k in range(top - 1, 1, -1):
        series = series * x + 1.0 / math.factorial(k)
    return series


def _divide(x: Any, y: Any) -> Any:
    if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor) or y != 0.0:
        return x / y
    return math.nan if x == 0.0 or math.isnan(x) else math.copysign(math.inf, x) * math.copysign(1.0, y)


_EVALUATE: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": _divide,
    "neg": lambda x: -x,
    "lt": lambda x, y: x < y,
    "eq": lambda x, y: x == y,
    "where": where,
    "exp": exp,
    "log": log,
    "abs": absolute,
}
