"""The divergences between a teacher's next-token distribution p and a student's q.

Each is a sum over the vocabulary of ``value(l, r)`` with ``l = log q`` and ``r = log p``; its gradient needs only the
*weighted slope* ``slope(l, r) = q dD/dq``. The kernels own the rest (softmax, temperature, chunks, parallelism):

    D = sum_k value(l_k, r_k)     c = sum_k slope(l_k, r_k)     dD/dz_k = (slope(l_k, r_k) - q_k c) / T

The slope is defined up to a multiple of q, which cancels. A new divergence is one frozen dataclass with these two
functions, written in the language of :mod:`pocl_kernels.scalar`; its float fields are run-time parameters of the
kernels, so that a schedule may change them at every step. Pass an instance wherever a name is accepted.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Self

from pocl_kernels.scalar import Value, absolute, exp, kl_term, log_mixture, phi_series, share, sign, weighted, where


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

    def parameters(self) -> list[float]:
        """The values of the fields: the run-time parameters of the kernels.

        Raises:
            TypeError: for a field that is no number.
        """
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
                raise TypeError(
                    f"{type(self).__name__}.{field.name} is {value!r}: the fields of a divergence are numbers, the "
                    "run-time parameters of its kernels. Make anything else a class variable"
                )
        return values

    @classmethod
    def from_parameters(cls, values: Sequence[float]) -> Self:
        """The instance that has these values in its fields, as they are: nothing is checked or changed."""
        made = object.__new__(cls)
        for field, value in zip(dataclasses.fields(cls), values, strict=True):
            object.__setattr__(made, field.name, value)
        return made

    @abc.abstractmethod
    def value(self, l: Value, r: Value) -> Value:
        """The entry's share of D in nats; its sum over the vocabulary is the divergence. Never negative by choice."""

    @abc.abstractmethod
    def slope(self, l: Value, r: Value) -> Value:
        """q dD/dq, up to a multiple of q. Must stay bounded where q or p underflows."""

    def _check(self, field: str, low: float, high: float, *, open_ends: bool = False) -> None:
        x = getattr(self, field)
        inside = low < x < high if open_ends else low <= x <= high
        if not inside:
            brackets = "()" if open_ends else "[]"
            raise ValueError(
                f"{type(self).__name__}({field}={x!r}): {field} must be in {brackets[0]}{low:g}, {high:g}{brackets[1]}"
            )


@dataclasses.dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p, q) = sum p (log p - log q): covers the teacher's modes (Hinton et al. 2015)."""

    kl_weights = (1.0, 0.0)

    def value(self, l: Value, r: Value) -> Value:
        return kl_term(exp(r), r, exp(l), l)

    def slope(self, l: Value, r: Value) -> Value:
        return -exp(r)


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
        return kl_term(p, r, self.skew * p + (1.0 - self.skew) * q, log_mixture(r, l, self.skew))

    def slope(self, l: Value, r: Value) -> Value:
        p, q, s = exp(r), exp(l), self.skew
        # (1 - s) q (1 - p / m), not - (1 - s) q p / m: a multiple of q that large cancels only in slope - q c.
        return (1.0 - s) * (1.0 - s) * (q - p) * share(q, s * p + (1.0 - s) * q)


@dataclasses.dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q, m) with m = skew q + (1 - skew) p (DistiLLM, Ko et al. 2024). ``skew`` in [0, 1), 0 is the reverse KL."""

    skew: float = 0.1

    def __post_init__(self) -> None:
        self._check("skew", 0.0, 1.0 - 1e-6)

    def value(self, l: Value, r: Value) -> Value:
        p, q = exp(r), exp(l)
        return kl_term(q, l, self.skew * q + (1.0 - self.skew) * p, log_mixture(l, r, self.skew))

    def slope(self, l: Value, r: Value) -> Value:
        p, q, s = exp(r), exp(l), self.skew
        # log(q / m) - s (q / m - 1), not - s q / m: a multiple of q as large as s cancels only in slope - q c.
        excess = share(q - p, s * q + (1.0 - s) * p)
        return weighted(q, l - log_mixture(l, r, s) - weighted(s * (1.0 - s), excess))


@dataclasses.dataclass(frozen=True)
class JSD(Divergence):
    """beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q: the generalised JSD of GKD and TRL.

    ``beta`` in (0, 1). DistiLLM's ``js_distance(lam)`` weights the student by ``lam``: that is ``JSD(beta=1 - lam)``.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        self._check("beta", 0.0, 1.0, open_ends=True)

    def value(self, l: Value, r: Value) -> Value:
        p, q, log_m = exp(r), exp(l), log_mixture(r, l, self.beta)
        m = self.beta * p + (1.0 - self.beta) * q
        return self.beta * kl_term(p, r, m, log_m) + (1.0 - self.beta) * kl_term(q, l, m, log_m)

    def slope(self, l: Value, r: Value) -> Value:
        return (1.0 - self.beta) * weighted(exp(l), l - log_mixture(r, l, self.beta))


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
        return weighted(exp(l), l - r) - exp(r)


@dataclasses.dataclass(frozen=True)
class Alpha(Divergence):
    """Amari's alpha-divergence (1 - sum p^a q^(1-a)) / (a (1 - a)), a = ``alpha`` in (0, 1); a -> 1 is forward KL."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        self._check("alpha", 0.0, 1.0, open_ends=True)

    def value(self, l: Value, r: Value) -> Value:
        a, b = self.alpha, 1.0 - self.alpha
        # With d = l - r the closed form is p (b phi(d) - phi(b d)); near d = 0 only the series keeps its digits.
        d = l - r
        near = exp(r) * (b * phi_series(d) - phi_series(b * d))
        far = a * exp(r) + b * exp(l) - exp(a * r + b * l)
        return where(absolute(d) < 0.5, near, far) / (a * b)

    def slope(self, l: Value, r: Value) -> Value:
        a = self.alpha
        x = a * (r - l)
        # -q (e^x - 1), not -q e^x: where a is small, a multiple of q as large as 1 / a cancels only in slope - q c.
        near, far = -exp(l) * (x + phi_series(x)), exp(l) - exp(a * r + (1.0 - a) * l)
        return where(absolute(x) < 0.5, near, far) / a


DIVERGENCES: dict[str, type[Divergence]] = {
    "fkl": ForwardKL,
    "rkl": ReverseKL,
    "skew_fkl": SkewForwardKL,
    "skew_rkl": SkewReverseKL,
    "jsd": JSD,
    "tvd": TVD,
    "jeffreys": Jeffreys,
    "alpha": Alpha,
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
