"""How often something is done, as people write it."""

import pytest

from pocl.interval import Interval


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (500, Interval(steps=500)),
        ("500", Interval(steps=500)),
        ("90s", Interval(seconds=90)),
        ("10min", Interval(seconds=600)),
        (" 1.5 H ", Interval(seconds=5400)),
    ],
)
def test_steps_and_times_are_read(written: str | int, meant: Interval) -> None:
    assert Interval.parse(written) == meant


@pytest.mark.parametrize("written", ["", "0", 0, -3, "1.5", "ten minutes", "0min", "5 days", "1e3", None])
def test_anything_else_is_refused_with_what_is_allowed(written: str | int) -> None:
    with pytest.raises(ValueError, match=r"a number of steps \(500\) or a time \(90s, 10min, 2h\)"):
        Interval.parse(written)
