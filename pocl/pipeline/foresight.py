"""How long the rest of a run will take: estimated once its rows are there, corrected by what its steps then took."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl.run_folder import write_text

if TYPE_CHECKING:
    from pocl.pipeline.context import Context

ESTIMATE = "estimate.json"
_SAMPLES = 1_000
_BELIEVED = (0.2, 5.0)  # what steps took against their estimates; beyond, something else was going on


def foresee(context: Context, names: Sequence[str]) -> None:
    """Estimate the steps in `names` and keep that in the run folder, for `pocl status`; a second or two.

    Where a model is not on this machine nothing is kept, and nothing said: a run needs none of this.
    """
    from pocl.pipeline.context import SPLITS
    from pocl.pipeline.estimate import estimate, lengths_of

    if not names or not context.has_rows("train"):
        return
    rows = context.rows("train")
    counts = {split: len(context.rows(split)) if context.has_rows(split) else 0 for split in SPLITS}
    lengths = lengths_of(rows.select(range(min(len(rows), _SAMPLES))))
    try:
        made = estimate(context.recipe, names, counts, lengths, corpus=context.is_corpus())
    except (OSError, RuntimeError, ValueError):  # as a step will say itself, if it matters
        return
    finally:
        context.release()
    if made is not None:
        seconds = {step.name: round(step.seconds, 1) for step in made.steps}
        write_text(context.path / ESTIMATE, json.dumps({"seconds": seconds}, indent=2) + "\n")


def seconds_left(
    folder: Path, planned: Sequence[str], records: Mapping[str, Any], progress: Mapping[str, float], *, running: bool
) -> tuple[float, dict[str, float]] | None:
    """Seconds until all planned steps are done, and of each that is not; None where nothing was estimated.

    Args:
        folder: of the run.
        planned: names of its steps.
        records: what the manifest says of them.
        progress: of a step that tells it, the share that is done.
        running: whether a process is at work; the clock of a step that was cut off stands.
    """
    try:
        told = json.loads((folder / ESTIMATE).read_text(encoding="utf-8"))["seconds"]
    except (OSError, ValueError, KeyError):
        return None
    spent = {name: _spent(records.get(name, {}), running) for name in planned}
    # what is known of how true the estimates are: steps that are done, and the part of one that tells its progress
    known = [(told[n], spent[n]) for n in planned if n in told and records.get(n, {}).get("state") == "finished"]
    known += [(told[n] * share, spent[n]) for n, share in progress.items() if n in told and share > 0.02]
    estimated, true = (sum(values) for values in zip(*known, strict=True)) if known else (0, 0)
    ratio = min(_BELIEVED[1], max(_BELIEVED[0], true / estimated)) if estimated else 1.0
    left: dict[str, float] = {}
    for name in planned:
        if records.get(name, {}).get("state") == "finished":
            continue
        if name not in told:
            return None
        whole = ratio * told[name]
        share = progress.get(name, 0.0)
        # a step that tells nothing has a tenth before it, however long it takes already
        left[name] = whole * (1 - share) if share else max(whole - spent[name], 0.1 * whole)
    return sum(left.values()), left


def _spent(record: Mapping[str, Any], running: bool) -> float:
    counts = running and record.get("state") == "started" and "started_at" in record
    since = time.time() - record["started_at"] if counts else 0.0
    return float(record.get("seconds", 0.0)) + since
