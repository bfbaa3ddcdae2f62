"""Steps in order: each is skipped when its work is done, resumed when it was cut off, and told to the user."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pocl.run_folder import RunFolder, fingerprint

if TYPE_CHECKING:
    from rich.console import Console

    from pocl.difficulty.processes import Processes
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
    renews: Sequence[str] = ()
    """Files of earlier steps that this one writes again; from then on they are its own."""
    shared: bool = False
    """Whether all processes do it together; else the first one does, and the others wait."""


def fingerprints(steps: Sequence[Step]) -> dict[str, str]:
    """The fingerprint of every step: its settings and those of all it builds on."""
    marks: dict[str, str] = {}
    for step in steps:
        marks[step.name] = fingerprint({"settings": step.settings, "needs": {name: marks[name] for name in step.needs}})
    return marks


def run_steps(
    steps: Sequence[Step],
    context: Context,
    folder: RunFolder,
    console: Console,
    processes: Processes,
    *,
    after: Mapping[str, Callable[[], None]] | None = None,
) -> None:
    """Run what is not done yet, in order; `after` a step that is done, by its name, the first process does more.

    Only the first process writes the folder's manifest; all come out of a step together.

    Raises:
        RunFolderError: a step was finished with other inputs (see `RunFolder.start`).
    """
    marks = fingerprints(steps)
    for number, step in enumerate(steps, start=1):
        head = f"[bold]\\[{number}/{len(steps)}] {step.name}[/bold]"
        record, resumes = processes.first(partial(_begin, folder, step, marks[step.name]))
        if record is not None:
            console.print(f"{head} [dim]done before, in {duration(record['seconds'])}[/dim]", highlight=False)
            context.summaries[step.name] = record["summary"]
            processes.first((after or {}).get(step.name, _nothing))
            continue
        note = " [yellow](goes on where it was cut off)[/yellow]" if resumes else ""
        console.print(f"{head}  {step.why}{note}", highlight=False, soft_wrap=True)
        started = time.perf_counter()
        try:
            summary = _do(step, context, processes)
        except BaseException as error:
            error.add_note(f"In the step {step.name!r}")
            if processes.rank == 0:
                with contextlib.suppress(OSError):  # a disk that is full: what failed first is what to tell
                    folder.pause(step.name, seconds=time.perf_counter() - started)
            raise
        finally:
            context.release()
            gc.collect()
        seconds = time.perf_counter() - started
        processes.first(
            partial(folder.finish, step.name, [*step.outputs, *step.renews], seconds=seconds, summary=summary)
        )
        context.summaries[step.name] = summary
        took = duration(time.perf_counter() - started)
        console.print(f"      [green]done[/green] in {took}. {summary['note']}", highlight=False, soft_wrap=True)
        processes.first((after or {}).get(step.name, _nothing))


def _nothing() -> None: ...


def _begin(folder: RunFolder, step: Step, mark: str) -> tuple[dict[str, Any] | None, bool]:
    """The record of a step that is done, or else None and whether there are leftovers to go on from."""
    if folder.is_finished(step.name, mark):
        return folder.record(step.name), False
    return None, folder.start(step.name, mark, step.settings, step.outputs, step.renews)


def _do(step: Step, context: Context, processes: Processes) -> dict[str, Any]:
    """Does the work of a step; returns the summary of the first process on all, once all are done."""
    if not step.shared:
        return dict(processes.first(lambda: step.run(context)))
    outcome = dict(step.run(context))
    processes.wait()
    return dict(processes.first(lambda: outcome))


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
