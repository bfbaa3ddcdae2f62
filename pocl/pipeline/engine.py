"""Steps in order: each is skipped when its work is done, resumed when it was cut off, and told to the user."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pocl.run_folder import RunFolder, fingerprint

if TYPE_CHECKING:
    from rich.console import Console

    from pocl.pipeline.context import Context


@dataclass(frozen=True)
class Step:
    """One piece of a run."""

    name: str
    why: str
    """What the step is for, in one line for a newcomer."""
    run: Callable[[Context], Mapping[str, Any]]
    """Does the work and returns a summary: numbers and texts that later steps and the report read. Its entry `note` is
    printed when the step ends."""
    outputs: Sequence[str]
    """Files and folders that the step writes, relative to the run folder."""
    needs: Sequence[str] = ()
    """Steps whose outcome this one depends on."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the outcome depends on besides: parts of the recipe and fingerprints of outside inputs."""


def fingerprints(steps: Sequence[Step]) -> dict[str, str]:
    """The fingerprint of every step: its settings and those of all it builds on."""
    marks: dict[str, str] = {}
    for step in steps:
        marks[step.name] = fingerprint({"settings": step.settings, "needs": {name: marks[name] for name in step.needs}})
    return marks


def run_steps(steps: Sequence[Step], context: Context, folder: RunFolder, console: Console) -> None:
    """Run what is not done yet, in order.

    Raises:
        RunFolderError: a step was finished with other inputs (see `RunFolder.start`).
    """
    marks = fingerprints(steps)
    for number, step in enumerate(steps, start=1):
        head = f"[bold]\\[{number}/{len(steps)}] {step.name}[/bold]"
        if folder.is_finished(step.name, marks[step.name]):
            record = folder.record(step.name)
            console.print(f"{head} [dim]done before, in {duration(record['seconds'])}[/dim]", highlight=False)
            context.summaries[step.name] = record["summary"]
            continue
        resumes = folder.start(step.name, marks[step.name], step.settings, step.outputs)
        note = " [yellow](goes on where it was cut off)[/yellow]" if resumes else ""
        console.print(f"{head}  {step.why}{note}", highlight=False, soft_wrap=True)
        started = time.perf_counter()
        try:
            summary = dict(step.run(context))
        except BaseException:
            folder.pause(step.name, seconds=time.perf_counter() - started)
            raise
        finally:
            context.release()
            gc.collect()
        folder.finish(step.name, step.outputs, seconds=time.perf_counter() - started, summary=summary)
        context.summaries[step.name] = summary
        took = duration(time.perf_counter() - started)
        console.print(f"      [green]done[/green] in {took}. {summary['note']}", highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
