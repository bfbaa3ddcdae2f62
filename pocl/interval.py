"""How often something is done: every so many steps, or every so many minutes."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Interval:
    """One of the two is set."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, value: str | int) -> Interval:
        """`500` or `"500"` steps, `"90s"`, `"10min"`, `"2h"`.

        Raises:
            ValueError: none of these.
        """
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
        number, unit = (float(found[1]), found[2]) if found else (0.0, "")
        if unit in _UNITS and number > 0:
            return cls(seconds=number * _UNITS[unit])
        if unit == "" and number >= 1 and number == int(number):
            return cls(steps=int(number))
        raise ValueError(f"must be a number of steps (500) or a time (90s, 10min, 2h), above 0, got {value!r}")
