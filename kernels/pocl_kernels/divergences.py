"""The divergences between a teacher's next-token distribution p and a student's q.

Each is a sum over the vocabulary of ``value(l, r)`` with ``l = log q`` and ``r = log p``; its gradient needs only the
*weighted slope* ``slope(l, r) = q dD/dq``. The kernels own the rest (softmax, temperature, chunks, parallelism):

    D = sum_k value(l_k, r_k)     c = sum_k slope(l_k, r_k)     dD/dz_k = (slope(l_k, r_k) - q_k c) / T

The slope is defined up to a multiple of q, which cancels. The kernels use that: they take slopes relative to the
student's most probable token, whose own is then exactly 0 (:meth:`Divergence.relative_slope`). A new divergence is one
frozen dataclass with these two functions, written in the language of :mod:`pocl_kernels.scalar`; its float fields are
run-time parameters of the kernels, so that a schedule may change them at every step. Pass an instance wherever a name
is accepted.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch

from pocl_kernels.scalar import (
    Value,
    absolute,
    equal,
    exp,
    expm1_ratio,
    kl_term,
    log_ratios,
    maximum,
    phi_series,
    phi_term,
    share,
    sign,
    weighted,
    where,
)


def require(holds: torch.Tensor, message: str, values: torch.Tensor) -> None:
    """Raise ``ValueError`` unless all hold, naming one value; on a GPU the device checks, and nothing waits for it."""
    if holds.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(holds.all(), message)
    elif not holds.all():
        raise ValueError(f"{message}, got {values[~holds].reshape(-1)[0].item():g} ({int((~holds).sum())} such)")


def is_number(x: object) -> bool:
    """Whether ``x`` is one number: Python's, NumPy's, a tensor without dimensions, or a graph's stand-in for one."""
    if isinstance(x, torch.Tensor):
        return x.dim() == 0
    return torch.compiler.is_compiling() or isinstance(x, (numbers.Real, torch.SymFloat, torch.SymInt))


@functools.cache  # every call asks several times
def names_of(kind: type[Any]) -> tuple[str, ...]:
    """The names of a dataclass's fields."""
    return tuple(field.name for field in dataclasses.fields(kind))


@dataclasses.dataclass(frozen=True)
class Divergence(abc.ABC):
    """Base of all divergences: two scalar functions of the log-probabilities of one token."""

    token: ClassVar[str]  # names the class in the arguments of the registered operators
    classes: ClassVar[dict[str, type[Divergence]]] = {}
    kl_weights: ClassVar[tuple[float, float] | None] = None
    """(a, b) where D = a KL(p, q) + b KL(q, p) for whatever parameters: D is then had in one pass over the vocabulary.
    """

    def __init_subclass__(cls) -> None:
        cls.token = f"{cls.__module__}.{cls.__qualname__}#{len(Divergence.classes)}"
        Divergence.classes[cls.token] = cls
        if not vars(cls).keys().isdisjoint(("value", "slope")) and "kl_weights" not in vars(cls):
            cls.kl_weights = None  # the base's is not that of another function
        if "slope" in vars(cls) and "relative_slope" not in vars(cls):
            cls.relative_slope = Divergence.relative_slope  # type: ignore[method-assign]  # nor its difference

    def names(self) -> tuple[str, ...]:
        """The names of the fields."""
        if torch.compiler.is_compiling():
            return tuple(field.name for field in dataclasses.fields(self))
        return names_of(type(self))

    def parameters(self) -> list[Any]:
        """The values of the fields, numbers or tensors of one a token: the run-time parameters of the kernels.

        Raises:
            TypeError: for a field that is no number.
        """
        names = self.names()
        values = [getattr(self, name) for name in names]
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
                raise TypeError(
                    f"{type(self).__name__}.{name} is {value!r}: the fields of a divergence are numbers, the "
                    "run-time parameters of its kernels. Make anything else a class variable"
                )
        return values

    @classmethod
    def from_parameters(cls, values: Sequence[Any]) -> Self:
        """The instance that has these values in its fields, as they are: nothing is checked or changed."""
        made = object.__new__(cls)
        for name, value in zip(names_of(cls), values, strict=True):
            object.__setattr__(made, name, value)
        return made

    @abc.abstractmethod
    def value(self, l: Value, r: Value) -> Value:
        """The entry's share of D in nats; its sum over the vocabulary is the divergence. Never negative by choice."""

    @abc.abstractmethod
    def slope(self, l: Value, r: Value) -> Value:
        """q dD/dq, up to a multiple of q. Must stay bounded where q or p underflows."""

    def relative_slope(self, l: Value, r: Value, l0: Value, r0: Value) -> Value:
        """``q (dD/dq - dD/dq of the token with l0 and r0)``: the slope that the kernels use.

        Where one token has nearly all of q, ``slope - q c`` would be the difference of two large numbers at that token.
        Relative to it nothing is left to cancel. ``l0`` is at least -log V. To be overridden where the difference of
        two slopes has a closed form that keeps more digits than the subtraction.
        """
        return self.slope(l, r) - exp(l) * (self.slope(l0, r0) / exp(l0))

    def _check(self, field: str, low: float, high: float, *, open_ends: bool = False) -> None:
        x = getattr(self, field)
        brackets = "()" if open_ends else "[]"
        allowed = f"{field} must be in {brackets[0]}{low:g}, {high:g}{brackets[1]}"
        if isinstance(x, torch.Tensor) and x.dim():
            inside = (low < x) & (x < high) if open_ends else (low <= x) & (x <= high)
            require(inside, f"{type(self).__name__}({field}=...): {allowed} for every token", x)
        elif not is_number(x):
            raise ValueError(f"{type(self).__name__}({field}={x!r}): {allowed}, a number or a tensor of one a token")
        elif not (low < x < high if open_ends else low <= x <= high):
            raise ValueError(f"{type(self).__name__}({field}={x!r}): {allowed}")


@dataclasses.dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p, q) = sum p (log p - log q): covers the teacher's modes (Hinton et al. 2015)."""

    kl_weights = (1.0, 0.0)

    def value(self, l: Value, r: Value) -> Value:
        return kl_term(exp(r), r, exp(l), l)

    def slope(self, l: Value, r: Value) -> Value:
        return -exp(r)

    def relative_slope(self, l: Value, r: Value, l0: Value, r0: Value) -> Value:
        return self.slope(l, r)  # its sum is known to be -1: nothing to gain


@dataclasses.dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q, p) = sum q (log q - log p): seeks the teacher's main mode (MiniLLM, Gu et al. 2024)."""

    kl_weights = (0.0, 1.0)

    def value(self, l: Value, r: Value) -> Value:
        return kl_term(exp(l), l, exp(r), r)

    def slope(self, l: Value, r: Value) -> Value:
        return weighted(exp(l), l - r)


@dataclasses.dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(p, m) with m = skew p + (1 - skew) q (DistiLLM, Ko et al. 2024). ``skew`` in [0, 1), 0 is the forward KL."""

    skew: float = 0.1

    def __post_init__(self) -> None:
        self._check("skew", 0.0, 1.0 - 1e-6)

    def value(self, l: Value, r: Value) -> Value:
        p, q = exp(r), exp(l)
        return phi_term(p, self.skew * p + (1.0 - self.skew) * q, log_ratios(l, r, self.skew)[0])

    def slope(self, l: Value, r: Value) -> Value:
        p, q, s = exp(r), exp(l), self.skew
        # (1 - s) q (1 - p / m), not - (1 - s) q p / m: a multiple of q that large cancels only in slope - q c.
        return (1.0 - s) * (1.0 - s) * (q - p) * share(q, s * p + (1.0 - s) * q)

    def relative_slope(self, l: Value, r: Value, l0: Value, r0: Value) -> Value:
        # The slope above is right near the teacher, -(1 - s) q p / m far from it. Their difference is right in both.
        p, q, s, ratio = exp(r), exp(l), self.skew, exp(r0 - l0)
        factor = (1.0 - s) * (1.0 - s) / (s * ratio + (1.0 - s))
        return factor * (ratio * q - p) * share(q, s * p + (1.0 - s) * q)


@dataclasses.dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q, m) with m = skew q + (1 - skew) p (DistiLLM, Ko et al. 2024). ``skew`` in [0, 1), 0 is the reverse KL."""

    skew: float = 0.1

    def __post_init__(self) -> None:
        self._check("skew", 0.0, 1.0 - 1e-6)

    def value(self, l: Value, r: Value) -> Value:
        p, q = exp(r), exp(l)
        return phi_term(q, self.skew * q + (1.0 - self.skew) * p, log_ratios(l, r, 1.0 - self.skew)[1])

    def slope(self, l: Value, r: Value) -> Value:
        p, q, s = exp(r), exp(l), self.skew
        # log(q / m) - s (q / m - 1), not - s q / m: a multiple of q as large as s cancels only in slope - q c.
        excess = share(q - p, s * q + (1.0 - s) * p)
        return -weighted(q, log_ratios(l, r, 1.0 - s)[1] + weighted(s * (1.0 - s), excess))


@dataclasses.dataclass(frozen=True)
class JSD(Divergence):
    """beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q: the generalised JSD of GKD and TRL.

    ``beta`` in [0, 1]; the ends are the limits of JSD / beta and JSD / (1 - beta), as in TRL and Liger: 0 is the
    forward KL, 1 the reverse. DistiLLM's ``js_distance(lam)`` weights the student by ``lam``: that is ``JSD(beta=1 -
    lam)``.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        self._check("beta", 0.0, 1.0)

    def value(self, l: Value, r: Value) -> Value:
        p, q, (by_p, by_q) = exp(r), exp(l), log_ratios(l, r, self.beta)
        m = self.beta * p + (1.0 - self.beta) * q
        teacher, student, _ = self._weights()
        return teacher * phi_term(p, m, by_p) + student * phi_term(q, m, by_q)

    def slope(self, l: Value, r: Value) -> Value:
        _, student, forward = self._weights()
        by_q = log_ratios(l, r, self.beta)[1]
        return forward * (exp(l) - exp(r)) - weighted(student, weighted(exp(l), by_q))

    def _weights(self) -> tuple[Value, Value, Value]:
        """Of KL(p, m), of KL(q, m), and whether it is the forward KL."""
        forward = where(equal(self.beta, 0.0), 1.0, 0.0)
        return forward + self.beta, where(equal(self.beta, 1.0), 1.0, 1.0 - self.beta), forward


@dataclasses.dataclass(frozen=True)
class TVD(Divergence):
    """Total variation distance, half the L1 distance of p and q; in [0, 1]."""

    def value(self, l: Value, r: Value) -> Value:
        difference = exp(l) - exp(r)
        return 0.5 * sign(difference) * difference

    def slope(self, l: Value, r: Value) -> Value:
        return 0.5 * weighted(exp(l), sign(l - r))


@dataclasses.dataclass(frozen=True)
class Jeffreys(Divergence):
    """KL(p, q) + KL(q, p), the symmetric KL."""

    kl_weights = (1.0, 1.0)

    def value(self, l: Value, r: Value) -> Value:
        return weighted(exp(r) - exp(l), r - l)

    def slope(self, l: Value, r: Value) -> Value:
        return weighted(exp(l), l - r) + (exp(l) - exp(r))

    def relative_slope(self, l: Value, r: Value, l0: Value, r0: Value) -> Value:
        forward, reverse = _relative_slopes(l, r, l0, r0)
        return reverse + forward


@dataclasses.dataclass(frozen=True)
class Alpha(Divergence):
    """Amari's alpha-divergence (1 - sum p^a q^(1-a)) / (a (1 - a)), a = ``alpha`` in [0, 1].

    The ends are the limits: 0 is the reverse KL, 1 the forward.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        self._check("alpha", 0.0, 1.0)

    def value(self, l: Value, r: Value) -> Value:
        return _power_value(l, r, self.alpha, 1.0 - self.alpha)

    def slope(self, l: Value, r: Value) -> Value:
        return _power_slope(l, r, self.alpha, 1.0 - self.alpha)

    def relative_slope(self, l: Value, r: Value, l0: Value, r0: Value) -> Value:
        # -q (p/q)^a + q (p0/q0)^a over a: neither of the two need be small where their difference is.
        a, q = self.alpha, exp(l)
        at_anchor = exp(weighted(a, r0 - l0))
        difference = (r - l) - (r0 - l0)
        x = weighted(a, difference)
        near = -weighted(q, at_anchor * (difference * expm1_ratio(x)))
        far = (q * at_anchor - _power(l, r, a, 1.0 - a)) * share(1.0, a)
        return where(absolute(x) < 0.5, near, far)


@dataclasses.dataclass(frozen=True)
class AlphaBeta(Divergence):
    """The alpha-beta divergence of ABKD (Wang et al. 2025, arXiv 2505.04560), a = ``alpha``, b = ``beta``::

        (a / (a + b) sum p^(a + b) + b / (a + b) sum q^(a + b) - sum p^a q^b) / (a b)

    Both at least 0, not both 0; at 0 their limits. (1, 0) is the forward KL, (0, 1) the reverse, (a, 1 - a) the
    alpha-divergence, (1, 1) half the squared distance.
    """

    alpha: float = 0.2
    beta: float = 0.7

    def __post_init__(self) -> None:
        self._check("alpha", 0.0, 2.0)
        self._check("beta", 0.0, 2.0)
        total = torch.as_tensor(self.alpha + self.beta)
        require(total > 0, "AlphaBeta: alpha + beta must be positive", total)

    def value(self, l: Value, r: Value) -> Value:
        # With p^(a + b) and q^(a + b) for p and q it is an alpha-divergence, whose value needs no sums of 1.
        total = self.alpha + self.beta
        return _power_value(total * l, total * r, self.alpha / total, self.beta / total) / (total * total)

    def slope(self, l: Value, r: Value) -> Value:
        total = self.alpha + self.beta
        return _power_slope(total * l, total * r, self.alpha / total, self.beta / total) / total


@dataclasses.dataclass(frozen=True)
class MixedKL(Divergence):
    """w KL(p, q) + (1 - w) KL(q, p), w = ``weight`` in [0, 1], one number or one a token: the mixture of AKL and of
    entropy-aware distillation.
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        self._check("weight", 0.0, 1.0)

    @property
    def kl_weights(self) -> tuple[float, float]:  # type: ignore[override]
        return self.weight, 1.0 - self.weight

    def value(self, l: Value, r: Value) -> Value:
        p, q, w = exp(r), exp(l), self.weight
        return weighted(w, kl_term(p, r, q, l)) + weighted(1.0 - w, kl_term(q, l, p, r))

    def slope(self, l: Value, r: Value) -> Value:
        p, q, w = exp(r), exp(l), self.weight
        return weighted(1.0 - w, weighted(q, l - r)) + w * (q - p)

    def relative_slope(self, l: Value, r: Value, l0: Value, r0: Value) -> Value:
        forward, reverse = _relative_slopes(l, r, l0, r0)
        return weighted(1.0 - self.weight, reverse) + self.weight * forward


def _relative_slopes(l: Value, r: Value, l0: Value, r0: Value) -> tuple[Value, Value]:
    """Of KL(p, q) and of KL(q, p), relative to the anchor.

    The first is q p0 / q0 - p. By the difference of the two logs near the teacher: rounded normalisers would leave the
    same multiple of q in every token's, which cancels only against a sum of these very slopes, and ``memory="low"``
    makes that sum another way.
    """
    q, at_anchor, difference = exp(l), exp(r0 - l0), (l - r) - (l0 - r0)
    x = -difference
    near, far = q * at_anchor * (difference * expm1_ratio(x)), q * at_anchor - exp(r)
    return where(absolute(x) < 0.5, near, far), weighted(q, difference)


def _power(l: Value, r: Value, a: Value, b: Value) -> Value:
    """p^a q^b."""
    return exp(weighted(a, r) + weighted(b, l))


def _power_value(l: Value, r: Value, a: Value, b: Value) -> Value:
    """(a p + b q - p^a q^b) / (a b) for a + b = 1: never negative, whatever p and q sum to; its limits at the ends."""
    # With d = log(q / p) and the smaller exponent b on q: p (phi(d) - phi(b d) / b) / a, which needs no small divisor;
    # else the same with p and q, a and b exchanged.
    swap = b > a
    p, q = where(swap, exp(l), exp(r)), where(swap, exp(r), exp(l))
    d, a, b = where(swap, r - l, l - r), maximum(a, b), where(swap, a, b)
    x, inverse = weighted(b, d), share(1.0, b)
    near = (phi_term(p, q, d) - p * phi_series(x) * inverse) / a
    far = (a * p + b * q - _power(l, r, where(swap, b, a), where(swap, a, b))) * (inverse / a)
    return where(absolute(x) < 0.5, near, far)


def _power_slope(l: Value, r: Value, a: Value, b: Value) -> Value:
    """q times the derivative of the above by q, (q - p^a q^b) / a."""
    # -q (e^x - 1) / a, not -q e^x / a: where a is small, a multiple of q as large as 1 / a cancels only in slope - q c.
    x = weighted(a, r - l)
    near, far = -weighted(exp(l), (r - l) * expm1_ratio(x)), (exp(l) - _power(l, r, a, b)) * share(1.0, a)
    return where(absolute(x) < 0.5, near, far)


DIVERGENCES: dict[str, type[Divergence]] = {
    "fkl": ForwardKL,
    "rkl": ReverseKL,
    "skew_fkl": SkewForwardKL,
    "skew_rkl": SkewReverseKL,
    "jsd": JSD,
    "tvd": TVD,
    "jeffreys": Jeffreys,
    "alpha": Alpha,
    "alpha_beta": AlphaBeta,
    "mixed_kl": MixedKL,
}


def get_divergence(divergence: str | Divergence) -> Divergence:
    """An instance from a name (with the defaults) or the instance itself. Raises ``ValueError`` for an unknown name."""
    if isinstance(divergence, Divergence):
        return divergence
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence={divergence!r}: expected one of {', '.join(DIVERGENCES)} or an instance of a subclass of "
            "pocl_kernels.Divergence"
        )
    return DIVERGENCES[divergence]()
