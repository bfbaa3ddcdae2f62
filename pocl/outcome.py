"""What a command shows when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def plot_ranking(folder: Path, console: Console) -> None:
    """Draw the ranking, and print the samples at both of its ends in words."""
    from rich.markup import escape

    from pocl.report import Run, extreme_samples, write_report

    write_report(folder)
    for title, table in zip(("easiest", "hardest"), extreme_samples(Run.read(folder).ranked), strict=True):
        console.print(f"\n[bold]The {title} samples[/bold]")
        for row in table.rows:
            cells = list(enumerate(zip(table.header, row, strict=True)))
            measures = ", ".join(f"{name} {text}" for column, (name, text) in cells if column in table.numbers)
            console.print(f"  {measures}", highlight=False, soft_wrap=True)
            for _, (name, text) in (cell for cell in cells if cell[0] not in table.numbers):
                console.print(f"    [dim]{name}:[/dim] {escape(text)}", highlight=False, soft_wrap=True)


def print_results(content: Any, console: Console) -> None:
    """A table of the report."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column, title in enumerate(content.header):
        table.add_column(title, justify="right" if column in content.numbers else "left")
    for index, row in enumerate(content.rows):
        table.add_row(*row, style="bold" if index == content.strong else None)
    console.print()
    console.print(table)
    console.print("[dim]Cross-entropy and KL in nats per token, lower is better; ROUGE-L, higher is better.[/dim]")


def print_outcome(folder: Path, until: str, console: Console) -> None:
    """The results, where there are new ones, and where everything lies."""
    from pocl.report import Run, results_table

    if until in ("evaluation", "report"):
        run = Run.read(folder)
        content = results_table(run.results, run.parameters, intervals=False)
        print_results(content, console)
    shown = {"Student": "student", "Report": "report/index.html", "Ranking": "ranking/ranked.parquet"}
    console.print()
    for title, name in shown.items():
        if (folder / name).exists():
            console.print(f"{title + ':':9} {folder / name}", highlight=False, soft_wrap=True)
