"""`pocl compare` as the command line shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from pocl.compare.plan import ComparisonPlan
    from pocl.recipe import Recipe


def run_command(
    recipe: Recipe, arms: str | None, seeds: int | None, jobs: int, *, dry_run: bool, console: Console
) -> None:
    """Compare, and print what came out; or print the plan."""
    from pocl.compare import compare, plan_comparison

    names = None if arms is None else arms.replace(",", " ").split()
    if dry_run:
        print_plan(recipe, plan_comparison(recipe, arms=names, seeds=seeds, jobs=jobs), jobs, console)
        return
    page = compare(recipe, arms=names, seeds=seeds, jobs=jobs, console=console)
    print_outcome(page.parent / "report.md", console)
    console.print(f"\nReport: {page}", highlight=False, soft_wrap=True)


def print_plan(recipe: Recipe, plan: ComparisonPlan, jobs: int, console: Console) -> None:
    """Cells, time and disk."""
    from pocl.pipeline.engine import duration

    console.print(f"[bold]Comparison {recipe.name}[/bold], into {recipe.output}", highlight=False)
    for arm in plan.arms:
        console.print(f"  [bold]{arm.key}[/bold]  {arm.explanation}", highlight=False, soft_wrap=True)
    left = plan.cells - plan.done
    time = "an unknown time"
    if plan.seconds is not None:
        source = "as the cells so far took" if plan.measured else "an estimate"
        time = f"{duration(plan.seconds / jobs)} ({source})"
    disk = "" if plan.disk_bytes is None else f", {plan.disk_bytes / 1e9:.1f} GB of disk at most"
    console.print(
        f"\n{plan.cells} cells of {plan.steps} optimizer steps, {plan.done} done. The other {left} take {time}{disk}; "
        "what they share is made first.",
        highlight=False,
        soft_wrap=True,
    )


def print_outcome(report: object, console: Console) -> None:
    """The sentences of the page."""
    from pathlib import Path

    from rich.markup import escape

    text = Path(str(report)).read_text(encoding="utf-8")
    for line in text.splitlines():
        if " against " in line.partition(":")[0] and not line.startswith(("#", "|")):
            console.print(escape(line), highlight=False, soft_wrap=True)
