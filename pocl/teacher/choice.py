"""Whether storing the teacher's hidden states pays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherChoice:
    """`cached` or not, and the sentence that says why."""

    cached: bool
    reason: str


def choose_teacher(passes: float, cache_bytes: int, free_bytes: int, on_policy: bool = False) -> TeacherChoice:
    """Decide between the online teacher and a cache.

    Args:
        passes: times the average sample is trained on (`Curriculum.passes`).
        cache_bytes: size of the cache (`HiddenStateCache.estimate_bytes`).
        free_bytes: space on the disk that would hold it.
        on_policy: whether responses are sampled from the student while it trains.
    """
    size, free = _readable(cache_bytes), _readable(free_bytes)
    if on_policy:
        return TeacherChoice(False, "online: responses sampled while training cannot be stored beforehand")
    if passes <= 1:
        return TeacherChoice(
            False, f"online: {passes:g} passes over the samples are planned, a cache would cost one as well"
        )
    if cache_bytes > 0.9 * free_bytes:
        return TeacherChoice(False, f"online: the cache would take {size}, and {free} are free")
    saved = passes - 1
    return TeacherChoice(True, f"cached: {size} on disk and one pass of the teacher replace {saved:g} further passes")


def _readable(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
