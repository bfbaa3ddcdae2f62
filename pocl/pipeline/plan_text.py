"""A plan on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from pocl.pipeline.disk import size_in_words
from pocl.pipeline.engine import duration
from pocl.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from pocl.pipeline.plan import Plan


def print_plan(made: Plan, recipe: Recipe, console: Console) -> None:
    """Steps with what becomes of each, samples, loss, stages, disk, and what would end the run."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    found = made.findings
    of = made.estimate.steps if made.estimate else []
    took = {step.name: f" [dim]~{duration(step.seconds)}, {size_in_words(step.bytes)}[/dim]" for step in of}
    say(f"[bold]Plan of {escape(recipe.name)}[/bold], into {escape(recipe.output)}")
    for number, (name, why) in enumerate(made.steps, start=1):
        state = found.steps.get(name, "to do")
        note = "" if state == "to do" else f" [yellow]({escape(state)})[/yellow]"
        say(f"  {number}. [bold]{name}[/bold]{note}{took.get(name, '')}  {why}")
    samples = f"{made.num_samples:,} training samples" if made.num_samples else "An unknown number of samples"
    if made.unread:
        samples += f" ({'at most; ' if made.num_samples else ''}the data cannot be read: {escape(made.unread)})"
    say(f"\n{samples}. The teacher {made.teacher}.")
    say(f"Loss: {made.loss}.")
    if found.disk:
        listing = ", ".join(f"{name} {size_in_words(size)}" for name, size in found.disk.items())
        say(f"Disk while it runs: {size_in_words(sum(found.disk.values()))} at the least ({listing}).")
    if made.estimate:
        say(
            f"About {duration(made.estimate.seconds)} and {size_in_words(made.estimate.bytes)} in the end, by layers "
            "of the models' shapes timed on this machine just now."
        )
    if found.cache:
        say(f"About {escape(found.cache)}")
    # one space between columns, so that the longest table fits into 80
    table = Table(*made.stages[0], box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for row in made.stages:
        table.add_row(*row.values())
    console.print()
    console.print(table)
    for text in found.unknown:
        say(f"[yellow]Not looked at:[/yellow] {escape(text)}")
    for text in found.problems:
        say(f"[red]Would fail:[/red] {escape(text)}")
