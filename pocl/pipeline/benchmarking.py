"""`pocl evaluate`: score the models of a finished run, on its own questions or on any others. Nothing is trained.

The scores of other questions, or by other settings, lie in `evaluation/<name>/` of the run folder, one file a model.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pocl.data.corpus import is_corpus
from pocl.data.tables import values_of
from pocl.pipeline.context import Context, source_fingerprint
from pocl.pipeline.evaluating import evaluated_models, renewed_report, score_models
from pocl.pipeline.run import run
from pocl.pipeline.steps import EVALUATION, REPORT, TRAINING
from pocl.recipe import Recipe
from pocl.recipe.sections import EvaluationSection
from pocl.run_folder import RECIPE, RunFolder, RunFolderError, differences, write_text
from pocl.run_lock import only_user
from pocl.split import normalized

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console

SETTINGS = "settings.json"
ALIASES = {
    "student": "student-final",
    "initial": "student-initial",
    "warmup": "student-warmup",
    "control": "student-control",
}
# What may be asked of a run that is done; every other setting made it what it is.
FREE_DATA_KEYS = ("test", "test_split", "num_test")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was scored."""

    name: str
    """`held-out` for the run's own questions and settings, else that of the folder below `evaluation/`."""
    folder: Path
    metrics: Mapping[str, Mapping[str, Any]]
    """By model: cross_entropy, kl_to_teacher, rouge_l, exact_match, num_samples, num_tokens."""


def evaluate_run(
    recipe: Recipe,
    *,
    data: str | None = None,
    split: str = "test",
    name: str | None = None,
    models: Sequence[str] = (),
    console: Console | None = None,
) -> Evaluation:
    """Score models of a finished run.

    Args:
        recipe: that of the run, `output` its folder. Of its settings only `evaluation`, `data.test`, `data.test_split`
            and `data.num_test` may differ from the run's own.
        data: file, folder or hub id with other questions; `data.test` of the recipe when it differs from the run's.
        split: the split of `data`, where it has several.
        name: what the scores are called; made of the data and the settings when left out.
        models: of the run (`teacher`, `student-initial`, `student-warmup`, `student-control`, `student`), or folders
            and hub ids of others that share its tokenizer; those that the run compares when left out.
        console: where progress is told; standard output when left out.

    Raises:
        RunFolderError: nothing is trained yet, the recipe is another one, or the name is taken by other settings.
        ValueError: unknown models, unreadable data.
    """
    from rich.console import Console

    console = console or Console()
    path = Path(recipe.output)
    folder = RunFolder(path)
    own = _own_recipe(folder)
    _refuse_other_settings(own, recipe, path)
    if data is None and recipe.data.test != own.data.test:
        data, split = recipe.data.test, recipe.data.test_split
    if data is None and recipe.evaluation == own.evaluation and not models and name is None:
        if not own.data.num_test:
            raise ValueError(f"{path} has no questions of its own (data.num_test is 0): name some with --data FILE")
        run(own, until=EVALUATION, only=True, console=console)
        folder = RunFolder(path)
        done = Evaluation("held-out", path / "evaluation", folder.record(EVALUATION)["summary"]["metrics"])
    else:
        with only_user(path):
            done = _score_elsewhere(own, recipe, data, split, name, models, console)
    if folder.record(REPORT).get("state") == "finished":  # only one that was written is written again
        with renewed_report(path):
            pass
    return done


def _own_recipe(folder: RunFolder) -> Recipe:
    """The recipe that a run was made by.

    Raises:
        RunFolderError: the folder is not that of a run, or its training is not finished.
    """
    file = folder.path / RECIPE
    missing = f"{folder.path} has no trained student yet: run pocl distill first, with the same recipe"
    if not file.is_file():
        raise RunFolderError(missing)
    own = Recipe.model_validate({**yaml.safe_load(file.read_text(encoding="utf-8")), "output": str(folder.path)})
    if folder.record(TRAINING).get("state") != "finished" or not (folder.path / "student").is_dir():
        raise RunFolderError(missing)
    return own


def _refuse_other_settings(own: Recipe, recipe: Recipe, path: Path) -> None:
    data = recipe.data.model_copy(update={key: getattr(own.data, key) for key in FREE_DATA_KEYS})
    same = recipe.model_copy(update={"data": data, "evaluation": own.evaluation, "output": own.output})
    lines = differences(own.model_dump(mode="json"), same.model_dump(mode="json"))
    if lines:
        listing = "\n  ".join(lines)
        raise RunFolderError(
            f"{path} was made with other settings:\n  {listing}\n`pocl evaluate` scores what is there and trains "
            f"nothing: it takes evaluation.*, --data, --models. For another student: another --output"
        )


def _score_elsewhere(
    own: Recipe,
    recipe: Recipe,
    data: str | None,
    split: str,
    name: str | None,
    models: Sequence[str],
    console: Console,
) -> Evaluation:
    from pocl.data import load_examples

    path = Path(own.output)
    context = Context(own.model_copy(update={"evaluation": recipe.evaluation}), path, console)
    settings = {
        "data": data or "held-out",
        "split": split if data else "",
        "num_test": recipe.data.num_test if data else own.data.num_test,
        "content": source_fingerprint(data) if data else "",
        "evaluation": recipe.evaluation.model_dump(mode="json", exclude={"include_teacher"}),
    }
    name = name or _name_of(data, own.evaluation, recipe.evaluation)
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ValueError(f"name must be of letters, digits and _ . + -, got {name!r}: it names a folder")
    target = path / "evaluation" / name
    _claim(target, settings)
    chosen = _models_of(context, models)
    if data:
        part = "train" if Path(data).is_file() else split
        examples: Any = load_examples(data, split=part, limit=recipe.data.num_test or None)
        _tell_overlap(context, examples)
    else:
        examples = context.judged_rows("test")
    console.print(f"[bold]evaluation/{name}[/bold]  {len(examples)} questions, {', '.join(chosen)}", highlight=False)
    return Evaluation(name, target, score_models(context, chosen, examples, target))


def _name_of(data: str | None, before: EvaluationSection, now: EvaluationSection) -> str:
    """`vicuna` for `sets/vicuna.jsonl`, with settings that differ from the run's: `held-out-temperature-1.0`."""
    parts = [Path(data).name.split(".")[0] if data else "held-out"]
    for key, value in now:
        if value != getattr(before, key) and key != "include_teacher":
            parts += [key, "-".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return re.sub(r"[^\w.+-]+", "-", "-".join(parts))


def _claim(target: Path, settings: Mapping[str, Any]) -> None:
    file = target / SETTINGS
    if file.is_file():
        lines = differences(json.loads(file.read_text(encoding="utf-8")), settings)
        if lines:
            listing = "\n  ".join(lines)
            raise RunFolderError(
                f"{target} holds scores of other settings:\n  {listing}\nGive these another name with --name NAME"
            )
        return
    write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _models_of(context: Context, names: Sequence[str]) -> dict[str, str]:
    """What to score: models of the run by name, others by folder or hub id."""
    known = evaluated_models(context) | {"teacher": context.teacher_source()}
    if not names:
        return evaluated_models(context)
    found: dict[str, str] = {}
    for name in names:
        key = ALIASES.get(name, name)
        if key in known:
            found[key] = known[key]
        elif Path(name).is_dir() or "/" in name:
            found[re.sub(r"[^\w.+-]+", "-", Path(name).name) if Path(name).is_dir() else name.replace("/", "--")] = name
        else:
            raise ValueError(
                f"models: there is no {name!r} in this run, and no such folder; it has {', '.join(known)} "
                "(`student` is the last); others are named by folder or hub id"
            )
    return found


def _tell_overlap(context: Context, examples: Dataset) -> None:
    """Questions that the student trained on flatter it."""
    if is_corpus(examples.column_names):
        return
    trained = {normalized(prompt) for prompt in values_of(context.examples("train"), "prompt")}
    count = sum(normalized(prompt) in trained for prompt in values_of(examples, "prompt"))
    if count:
        context.say(
            f"[yellow]{count} of {len(examples)} questions are among those that the student trained on.[/yellow]"
        )
