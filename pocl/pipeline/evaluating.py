"""The steps after training: compare all models on held-out samples, and write the report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pocl.data.corpus import is_corpus
from pocl.pipeline.card import CARD, renew_card
from pocl.pipeline.context import Context
from pocl.pipeline.teacher import is_apart
from pocl.recipe import Recipe
from pocl.run_folder import RECIPE, RunFolder, write_text
from pocl.run_lock import in_use_by

if TYPE_CHECKING:
    from datasets import Dataset


def evaluated_models(context: Context) -> dict[str, str]:
    """The models to compare and where they lie: teacher, student before, after warm-up, control, after the stages."""
    here = context.recipe.evaluation.include_teacher and not is_apart(context.recipe)
    found = {"teacher": context.teacher_source()} if here else {}
    found["student-initial"] = context.student_source()
    if context.recipe.warmup.epochs:
        found["student-warmup"] = context.warm_student_source()
    if context.recipe.curriculum.control:
        found["student-control"] = str(context.path / "control" / "student")
    found["student-final"] = str(context.path / "student")
    return found


def evaluate_models(context: Context) -> Mapping[str, Any]:
    """Cross-entropy, KL to the teacher and ROUGE-L of every model; one file each, so that a restart goes on."""
    samples = context.judged_rows("test")
    metrics = score_models(context, evaluated_models(context), samples, context.path / "evaluation")
    kind = "blocks" if context.is_corpus() else "questions"
    return {"metrics": metrics, "note": f"{metrics['student-final']['num_samples']} {kind}."}


def score_models(
    context: Context, models: Mapping[str, str], examples: Dataset, folder: Path
) -> dict[str, dict[str, Any]]:
    """The metrics of each model on examples; `folder/<key>.json` holds them with the answers.

    Args:
        context: the run, with the evaluation section to go by.
        models: what each is called, and its folder or hub id.
        examples: what `load_examples` gives, or token rows; texts of a corpus are not answered.
        folder: a model whose file is there already is not evaluated again.
    """
    from pocl.evaluate import evaluate
    from pocl.generation import GenerationSettings

    section = context.recipe.evaluation
    sampled = section.temperature > 0
    settings = GenerationSettings(
        max_new_tokens=section.max_new_tokens,
        do_sample=sampled,
        temperature=section.temperature if sampled else 1.0,
    )
    corpus = is_corpus(examples.column_names)
    if corpus and "text" in examples.column_names:
        examples = context.tokenize(examples)
    options = {} if "input_ids" in examples.column_names else context.text_options()
    metrics: dict[str, Any] = {}
    for key, source in models.items():
        file = folder / f"{key}.json"
        if not file.is_file():
            is_teacher = key == "teacher"
            alone = is_teacher or is_apart(context.recipe)
            section_of_model = context.recipe.teacher if is_teacher else context.recipe.student
            result = evaluate(
                context.teacher() if is_teacher else context.load_student(source),
                context.tokenizer(),
                examples,
                teacher=None if alone else context.teacher(),
                engine=section_of_model.engine,
                engine_args=section_of_model.engine_args,
                generation=settings,
                seeds=section.seeds if sampled else (),
                words=section.words,
                progress=not context.console.quiet,
                num_generated=0 if corpus else None,
                **options,
            )
            record = dataclasses.asdict(result)
            if is_teacher:
                record["kl_to_teacher"] = 0.0
            write_text(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        record = json.loads(file.read_text(encoding="utf-8"))
        metrics[key] = {name: value for name, value in record.items() if name not in ("responses", "of_each")}
    return metrics


def write_report(context: Context) -> Mapping[str, Any]:
    """Tables and pictures, Markdown and HTML; and the student's card learns what was measured."""
    from pocl.report import write_report as write

    renew_card(context.recipe, context.path)
    return {"note": f"{write(context.path)}"}


@contextlib.contextmanager
def renewed_report(path: Path) -> Iterator[Path]:
    """Write the report of a run again, and where its own step wrote one before, the student's card; gives the page.

    What the block writes below `report/` belongs to it.

    Raises:
        ValueError: the folder is not that of a run.
    """
    from pocl.pipeline.steps import REPORT
    from pocl.report import write_report as write

    folder = RunFolder(path)
    if folder.record(REPORT).get("state") != "finished" or in_use_by(path):  # its process keeps the manifest
        yield write(path)
        return
    with folder.refreshing(REPORT, ["report"], [CARD]):
        renew_card(Recipe.model_validate(yaml.safe_load((path / RECIPE).read_text(encoding="utf-8"))), path)
        yield write(path)
