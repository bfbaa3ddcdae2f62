"""The steps after training: compare all models on held-out samples, and write the report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from pocl.pipeline.context import Context
from pocl.run_folder import write_text


def evaluated_models(context: Context) -> dict[str, str]:
    """The models to compare and where they lie: teacher, student before, after warm-up, after the stages."""
    found = {"teacher": context.teacher_source()} if context.recipe.evaluation.include_teacher else {}
    found["student-initial"] = context.student_source()
    if context.recipe.warmup.epochs:
        found["student-warmup"] = context.warm_student_source()
    found["student-final"] = str(context.path / "student")
    return found


def evaluate_models(context: Context) -> Mapping[str, Any]:
    """Cross-entropy, KL to the teacher and ROUGE-L of every model; one file each, so that a restart goes on."""
    from pocl.evaluate import evaluate
    from pocl.generation import GenerationSettings

    section = context.recipe.evaluation
    sampled = section.temperature > 0
    settings = GenerationSettings(
        max_new_tokens=section.max_new_tokens,
        do_sample=sampled,
        temperature=section.temperature if sampled else 1.0,
    )
    metrics: dict[str, Any] = {}
    for key, source in evaluated_models(context).items():
        file = context.path / "evaluation" / f"{key}.json"
        if not file.is_file():
            is_teacher = key == "teacher"
            result = evaluate(
                context.teacher() if is_teacher else context.load_student(source),
                context.tokenizer(),
                context.examples("test"),
                teacher=None if is_teacher else context.teacher(),
                generation=settings,
                seeds=section.seeds if sampled else (),
                **context.text_options(),
            )
            record = dataclasses.asdict(result)
            if is_teacher:
                record["kl_to_teacher"] = 0.0
            write_text(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        metrics[key] = {k: v for k, v in json.loads(file.read_text(encoding="utf-8")).items() if k != "responses"}
    return {"metrics": metrics, "note": f"{metrics['student-final']['num_samples']} questions."}


def write_report(context: Context) -> Mapping[str, Any]:
    """Tables and pictures, Markdown and HTML."""
    from pocl.report import write_report as write

    return {"note": f"{write(context.path)}"}
