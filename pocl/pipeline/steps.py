"""The steps of a run in their order, and what each depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pocl.data.encoding import FORMAT
from pocl.pipeline.card import CARD
from pocl.pipeline.context import source_fingerprint
from pocl.pipeline.curricula import curriculum_of
from pocl.pipeline.engine import Step
from pocl.pipeline.evaluating import evaluate_models, write_report
from pocl.pipeline.hub import RECORD, upload_student
from pocl.pipeline.lora import lora_settings
from pocl.pipeline.prepare import prepare_data, prepare_models
from pocl.pipeline.subsets import takes_ranking
from pocl.pipeline.teacher import cache_settings, cache_teacher, plans_cache, tail_settings
from pocl.pipeline.training import adapt_teacher, rank_samples, train_control, train_curriculum, warm_up
from pocl.recipe import Recipe

MODELS, DATA, ADAPTATION, CACHE, WARMUP, RANKING = "models", "data", "adaptation", "teacher-cache", "warm-up", "ranking"
TRAINING, CONTROL, EVALUATION, REPORT, UPLOAD = "training", "control", "evaluation", "report", "upload"


def build_steps(recipe: Recipe, *, content: Callable[..., str] = source_fingerprint) -> list[Step]:
    """Models, data, teacher cache (if used), warm-up (if any), ranking, training, evaluation, report.

    Args:
        recipe: what to do.
        content: gives what stands for the content of a model (name, revision) or of a data set (name).
    """
    values = recipe.model_dump(mode="json")
    values["student"].pop("lora")  # which matters where it is trained
    # which matter where the teacher is asked, and where the student answers
    for name in ("store", "top_k", "tail", "engine", "engine_args", "api_key_env", "in_flight"):
        values["teacher"].pop(name)
    if recipe.teacher.server is None:
        values["teacher"].pop("server")
    answers = {name: values["student"].pop(name) for name in ("engine", "engine_args")}
    answers = {"engine": answers["engine"]} if answers["engine"] != "transformers" else {}
    for name in ("save_every", "log_every", "dataloader_workers", "report_to"):  # leave the weights as they are
        values["training"].pop(name)
    values["curriculum"].pop("control")  # a step of its own
    seed = {"seed": recipe.seed}
    data = recipe.data.model_dump(mode="json")
    student_content = recipe.student.model and content(recipe.student.model, recipe.student.revision)
    # A student of one's own brings its tokenizer: its samples can be read and ranked before a teacher is there.
    own = recipe.student.model is not None
    before = [MODELS, DATA]
    steps = [
        Step(
            MODELS,
            "Get the teacher, and the student that will learn from it.",
            prepare_models,
            outputs=["student-initial"] if recipe.student.from_teacher else [],
            settings={
                **_part(values, "teacher", "student"),
                "teacher_content": recipe.teacher.server or content(recipe.teacher.model, recipe.teacher.revision),
                "student_content": student_content,
            },
        ),
        Step(
            DATA,
            "Read the questions and answers, and set some aside that the student never trains on.",
            prepare_data,
            outputs=["data"],
            needs=[] if own else [MODELS],
            settings={
                "data": {key: value for key, value in data.items() if key != "workers"},
                **seed,
                "tokenizer": student_content,
                "rows": FORMAT,  # are stored as tokens; those of another format are made anew
                "columns": "all",  # of the training rows are kept; a folder from before that has none to carry on
                "content": {
                    key: content(source)
                    for key in ("source", "validation", "test")
                    if (source := getattr(recipe.data, key))
                },
            },
        ),
    ]
    if recipe.teacher.adapt_epochs:
        steps.append(
            Step(
                ADAPTATION,
                "The teacher learns the data first, as in the paper.",
                adapt_teacher,
                shared=True,
                outputs=["adapted-teacher"],
                needs=[MODELS, DATA],
                settings={"training": in_all_stages(values), **seed},
            )
        )
        before.append(ADAPTATION)
    if plans_cache(recipe):
        steps.append(
            Step(
                CACHE,
                "Run the teacher once and keep what it thinks of every answer token; training then needs it no more.",
                cache_teacher,
                shared=True,
                outputs=["teacher-cache"],
                needs=list(before),
                settings={**_part(values, "teacher_cache"), **cache_settings(recipe)},
            )
        )
        before.append(CACHE)
    if recipe.warmup.epochs:
        steps.append(
            Step(
                WARMUP,
                "Plain distillation on all samples, so that the student speaks before it is asked what is hard.",
                warm_up,
                shared=True,
                outputs=["warmup"],
                needs=list(before),
                settings={
                    **_part(values, "warmup"),
                    **tail_settings(recipe),
                    "training": in_all_stages(values),
                    **lora_settings(recipe),
                    **seed,
                },
            )
        )
        before.append(WARMUP)
    order = "from easy to hard," if recipe.curriculum.kind in ("baby_step", "one_pass") else "ordered"
    teacherless = own and not recipe.warmup.epochs and not recipe.ranking.needs_teacher
    steps += [
        Step(
            RANKING,
            "The student answers every training question: what it answers well and expects is easy."
            if recipe.ranking.needs_answers
            else "What the student expects, or whatever the recipe's criteria say, is easy.",
            rank_samples,
            shared=True,
            outputs=["ranking"],
            needs=[name for name in before if name != CACHE and not (teacherless and name in (MODELS, ADAPTATION))],
            settings={
                "ranking": {key: value for key, value in values["ranking"].items() if key != "refresh"},
                **answers,
                "num_stages": recipe.curriculum.num_stages,
                "student": {**_part(values, "student"), "content": student_content} if own else None,
            },
        ),
        Step(
            TRAINING,
            f"Distillation in {len(curriculum_of(recipe).stages)} stage(s), {order} as the recipe says.",
            train_curriculum,
            shared=True,
            outputs=["training", "student"],
            needs=[*before, *([RANKING] if takes_ranking(recipe) else [])],
            settings={
                **_part(values, "curriculum", "loss", "on_policy", "training"),
                "refresh": recipe.ranking.refresh,
                **lora_settings(recipe, merge=True),
                **tail_settings(recipe),
                **seed,
            },
        ),
    ]
    trained = [TRAINING]
    if recipe.curriculum.control:
        (training,) = (step for step in steps if step.name == TRAINING)
        why = "A second student from the same start, by plain distillation for as many steps: what did the stages add?"
        steps.append(replace(training, name=CONTROL, why=why, run=train_control, outputs=["control"]))
        trained.append(CONTROL)
    if recipe.data.num_test:
        steps.append(
            Step(
                EVALUATION,
                "All models on the questions set aside.",
                evaluate_models,
                outputs=["evaluation"],
                needs=[*before, *trained],
                settings={**_part(values, "evaluation"), **answers},
            )
        )
    if not takes_ranking(recipe):
        steps = [step for step in steps if step.name != RANKING]
    after = [step.name for step in steps]
    why = "Tables and pictures of the run, and what was measured into the student's card."
    steps.append(Step(REPORT, why, write_report, outputs=["report"], renews=[CARD], needs=after))
    if recipe.hub.repository:
        scored = [EVALUATION] if recipe.data.num_test else []
        steps.append(
            Step(
                UPLOAD,
                f"The folder student/, and nothing else of the run, to {recipe.hub.repository}.",
                upload_student,
                outputs=[RECORD],
                needs=[TRAINING, *scored, REPORT],
                settings=_part(values, "hub"),
            )
        )
    return steps


def in_all_stages(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of training that hold outside the stages, too."""
    of_stages = ("seed", "draw", "metric", "eval_every")
    return {key: value for key, value in values["training"].items() if key not in of_stages}


def _part(values: dict[str, object], *sections: str) -> dict[str, object]:
    return {section: values[section] for section in sections}
