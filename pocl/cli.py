"""The command line: `pocl quickstart | distill | compare | rank | cache-teacher | evaluate | report | status | ...`.

Models, data sets and torch are imported by the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Distil a large language model into a small one, from easy to hard (POCL).",
    epilog="Settings of a recipe are changed by --key value or --section.key value; pocl keys lists them all.",
)

_OWN_PROCESS = False  # whether this process is a `pocl` command and nothing else

_OVERRIDES: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
_RecipeArgument = Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe such as quickstart.")]
_Change = Annotated[
    bool, typer.Option("--change", help="Accept a folder of another recipe: keep what still fits, redo the rest.")
]
_Plot = Annotated[
    bool, typer.Option("--plot", help="Draw the ranking into report/, and print the easiest and the hardest samples.")
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and what would end the run; do nothing.")]
_PlanJson = Annotated[bool, typer.Option("--json", help="The same as --dry-run, as one JSON object for programs.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"pocl {version('pocl')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Distil a large language model into a small one, from easy to hard (POCL)."""


@app.command(context_settings=_OVERRIDES)
def quickstart(
    context: typer.Context, dry_run: _DryRun = False, as_json: _PlanJson = False, change: _Change = False
) -> None:
    """Distil a small real model on real data, both from the Python registry, in minutes on a CPU, and write a report.

    A second run skips what is done. [dim]Further words override the recipe: --output FOLDER --seed 3[/dim]
    """
    _run("quickstart", context.args, dry_run=dry_run, as_json=as_json, change=change)


@app.command(context_settings=_OVERRIDES)
def distill(
    context: typer.Context,
    recipe: _RecipeArgument,
    dry_run: _DryRun = False,
    as_json: _PlanJson = False,
    change: _Change = False,
) -> None:
    """Do a whole recipe: models, data, teacher cache, warm-up, ranking, stages, evaluation, report.

    What is done already is skipped, what was cut off goes on. [dim]Further words override the recipe:
    --training.batch_size 8[/dim]
    """
    _run(recipe, context.args, dry_run=dry_run, as_json=as_json, change=change)


@app.command(context_settings=_OVERRIDES)
def rank(
    context: typer.Context,
    recipe: _RecipeArgument,
    dry_run: _DryRun = False,
    as_json: _PlanJson = False,
    change: _Change = False,
    plot: _Plot = False,
) -> None:
    """Only rank the recipe's training samples by difficulty for its student.

    Writes ranking/ranked.parquet in the run folder: the rows of the data with rank and subset, for any trainer. A
    student of your own needs no teacher, unless the recipe warms it up or ranks by the teacher. [dim]Further words
    override the recipe: --student FOLDER --ranking.max_new_tokens 64[/dim]
    """
    _run(recipe, context.args, until="ranking", dry_run=dry_run, as_json=as_json, change=change, plot=plot)


@app.command("cache-teacher", context_settings=_OVERRIDES)
def cache_teacher(
    context: typer.Context,
    recipe: _RecipeArgument,
    dry_run: _DryRun = False,
    as_json: _PlanJson = False,
    change: _Change = False,
) -> None:
    """Only run the recipe's teacher once over the training samples and keep its hidden states.

    [dim]Further words override the recipe: --teacher_cache.dtype bfloat16[/dim]
    """
    _run(recipe, context.args, until="teacher-cache", dry_run=dry_run, as_json=as_json, change=change)


@app.command(context_settings=_OVERRIDES)
def evaluate(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="Folder of a finished run, or its recipe.")],
    data: Annotated[
        str, typer.Option(help="Other questions: file, folder or hub id; the run's own when left out.")
    ] = "",
    split: Annotated[str, typer.Option(help="Split of --data, where it has several.")] = "test",
    name: Annotated[str, typer.Option(help="Folder below evaluation/ for the scores; made up when left out.")] = "",
    models: Annotated[
        str, typer.Option(help="Some of teacher, student-initial, student-warmup, student, or folders; comma between.")
    ] = "",
    as_json: _Json = False,
) -> None:
    """Score the models of a finished run, on its held-out questions or on any others. Trains nothing.

    Scores of other questions lie in evaluation/NAME/, and the report shows them. [dim]Further words override the
    recipe: --evaluation.temperature 1[/dim]
    """

    folders: list[Path] = []

    def work(console: Console) -> None:
        from pocl.outcome import print_outcome, print_results
        from pocl.pipeline.benchmarking import evaluate_run
        from pocl.recipe import load_recipe
        from pocl.report import results_table

        recipe = load_recipe(run, context.args)
        folders.append(Path(recipe.output))
        quiet_libraries()
        done = evaluate_run(
            recipe,
            data=data or None,
            split=split,
            name=name or None,
            models=[model for model in models.split(",") if model],
            console=_aside(console, as_json),
        )
        if as_json:
            print_json({"name": done.name, "folder": str(done.folder), "metrics": done.metrics})
        elif done.name == "held-out":
            print_outcome(Path(recipe.output), "evaluation", console)
        else:
            print_results(results_table(done.metrics, {}, intervals=False), console)
            console.print(f"\nScores:   {done.folder}", highlight=False, soft_wrap=True)

    _guarded(work, shlex.join(["pocl", *sys.argv[1:]]), folders)


@app.command(context_settings=_OVERRIDES)
def compare(
    context: typer.Context,
    recipe: _RecipeArgument,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Named arms with commas between: plain, pocl, order, temperature, ratio, rising, restarts, reversed, "
            "shuffled, one_pass, reranked; those of compare.arms when left out."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds of each arm; five or more tell something.")] = None,
    jobs: Annotated[int, typer.Option(help="Cells at a time, each in a process of its own.")] = 1,
    dry_run: _DryRun = False,
) -> None:
    """Train arms of one recipe side by side and say what helps: differences to plain distillation, with intervals.

    Ranking, cache and warm-up are made once. Cells that are done are skipped, what was cut off goes on. [dim]Arms of
    your own stand in the recipe, under compare.arms. Further words override the recipe: --loss.divergence rkl[/dim]
    """

    def work(console: Console) -> None:
        from pocl.compare.command import run_command
        from pocl.recipe import load_recipe

        settings = load_recipe(recipe, context.args)
        quiet_libraries()
        run_command(settings, arms, seeds, jobs, dry_run=dry_run, console=console)

    _guarded(work, shlex.join(["pocl", *sys.argv[1:]]))


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, at work or not.")] = Path("runs/quickstart"),
    as_json: _Json = False,
) -> None:
    """Say what a run has done, what it is at, how long it will still take, its last figures and its size on disk."""

    def work(console: Console) -> None:
        from pocl.status import print_status, status_of

        found = status_of(folder)
        if as_json:
            print_json(found)
        else:
            print_status(found, console)

    _guarded(work, f"pocl status {shlex.quote(str(folder))}", [folder])


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="Folder of a run whose student is an adapter, or of an adapter.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; student-merged in the run's, or ADAPTER-merged.")
    ] = None,
) -> None:
    """Write the ordinary model that an adapter (student.lora) makes of its base: it then needs no peft and no base."""

    def work(console: Console) -> None:
        from pocl.pipeline.lora import merge_student

        quiet_libraries()
        console.print(f"Merged: {merge_student(folder, output)}", highlight=False, soft_wrap=True)

    _guarded(work, shlex.join(["pocl", *sys.argv[1:]]), [folder])


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")] = Path("runs/quickstart"),
    compare: Annotated[Path | None, typer.Option(help="Folder of another run, to be put beside it.")] = None,
) -> None:
    """Write the report of a run again: report/index.html, report/report.md and pictures.

    With --compare OTHER, write compare-OTHER/ in its report folder: what differs in the recipes, and in the results on
    the questions that both answered.
    """

    def work(console: Console) -> None:
        from pocl.pipeline.evaluating import renewed_report

        with renewed_report(folder) as page:
            console.print(f"Report: {page}", highlight=False)
            if compare is not None:
                from pocl.report.comparison import write_comparison

                console.print(f"Comparison: {write_comparison(folder, compare)}", highlight=False)

    _guarded(work, f"pocl report {shlex.quote(str(folder))}", [folder])


@app.command(context_settings={**_OVERRIDES, "help_option_names": []}, add_help_option=False)
def bench(
    context: typer.Context,
    subject: Annotated[str, typer.Argument(help="What to measure: loss, training, ...; without one, the list.")] = "",
    as_json: _Json = False,
) -> None:
    """Measure on this machine: pocl's parts against their floor and their peers.

    pocl bench lists the subjects; pocl bench SUBJECT --help shows the options of one; --json prints the results as one
    JSON object, for programs.
    """

    def work(console: Console) -> None:
        from pocl.bench import run_benchmark, subjects

        if subject in ("", "--help"):
            console.print(
                f"pocl bench SUBJECT [--json] [OPTIONS], with one of: {', '.join(subjects())}", highlight=False
            )
        elif (results := run_benchmark(subject, context.args, as_json=as_json)) is not None:
            print_json(results)

    _guarded(work, shlex.join(["pocl", *sys.argv[1:]]), resumes=False)


@app.command()
def keys(
    section: Annotated[str, typer.Argument(help="A section, such as training, or a key; all when left out.")] = "",
    as_json: _Json = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """List the settings of a recipe with their defaults and meanings."""

    def work(console: Console) -> None:
        from rich.markup import escape
        from rich.table import Table

        from pocl.recipe import describe_keys, recipe_schema

        rows = describe_keys(section)
        if schema or as_json:
            listed = [{"key": key, "default": default, "meaning": meaning} for key, default, meaning in rows]
            print_json(recipe_schema() if schema else listed)
            return
        table = Table("setting", "default", "meaning", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)

    _guarded(work, shlex.join(["pocl", "keys", *([section] if section else [])]), resumes=False)


def _run(
    name: str,
    overrides: Sequence[str],
    *,
    until: str = "report",
    dry_run: bool = False,
    as_json: bool = False,
    change: bool = False,
    plot: bool = False,
) -> None:
    """Read a recipe and run it up to a step; `plot`: show the ranking."""
    folders: list[Path] = []

    def work(console: Console) -> None:
        from pocl.recipe import load_recipe

        recipe = load_recipe(name, overrides)
        folders.append(Path(recipe.output))
        if (dry_run or as_json) and _OWN_PROCESS:
            from pocl.pipeline.lean import import_leanly

            import_leanly()
        quiet_libraries()
        if dry_run or as_json:
            from pocl.pipeline import plan
            from pocl.pipeline.plan_text import print_plan

            made = plan(recipe, until=until, change=change)
            if as_json:
                print_json(dataclasses.asdict(made))
            else:
                print_plan(made, recipe, console)
            if made.findings.problems:
                raise typer.Exit(2)
            return
        from pocl.outcome import plot_ranking, print_outcome
        from pocl.pipeline import run
        from pocl.pipeline.curricula import advice_on_stages

        if until == "report" and _is_first_process() and (advice := advice_on_stages(recipe)):
            console.print(f"[yellow]Note:[/yellow] {advice}", highlight=False, soft_wrap=True)
        folder = run(recipe, until=until, change=change, console=console)
        if plot and _is_first_process():
            plot_ranking(folder, console)
        print_outcome(folder, until, console)

    _guarded(work, shlex.join(["pocl", *sys.argv[1:]]), folders)


def _is_first_process() -> bool:
    """Of those that `torchrun` or `accelerate launch` started, the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _guarded(
    work: Callable[[Console], None], command: str, folders: Sequence[Path] = (), *, resumes: bool = True
) -> None:
    """Run a command's work; what goes wrong is told in words, and its traceback kept in a file.

    Args:
        work: gets a console to speak on.
        command: how the user called it.
        folders: the run folder, if there is one; `work` may append it once it is known.
        resumes: whether the command goes on where it was stopped.
    """
    from rich.console import Console

    from pocl.errors import exit_code, tell

    console = Console(quiet=not _is_first_process())
    try:
        work(console)
    except KeyboardInterrupt:
        kept = "Nothing is lost; go on with the same command:" if resumes else "Nothing is kept of it; to start again:"
        console.print(f"\n[yellow]Stopped.[/yellow] {kept}", highlight=False)
        console.print(f"  {command}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except Exception as error:
        tell(error, command, folders)
        raise typer.Exit(exit_code(error)) from None


def quiet_libraries() -> None:
    """Leave the bars and the warnings to the steps' own."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # for when it is loaded, which takes seconds and need not be: a finished run reads no data
    os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "DATASETS_VERBOSITY": "critical"}  # it logs what it raises
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _aside(console: Console, as_json: bool) -> Console:
    """Where progress is told: apart from the JSON object that a program reads."""
    from rich.console import Console

    return Console(stderr=True, quiet=console.quiet) if as_json else console


def main() -> None:
    """Entry point of the `pocl` command. A polite kill is told and resumed from like Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    global _OWN_PROCESS
    _OWN_PROCESS = True
    app()


if __name__ == "__main__":
    main()
