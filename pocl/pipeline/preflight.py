"""What would end a run late, said before its long steps: reporters that are not there, rows that no model can read."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from pocl.recipe import Recipe

if TYPE_CHECKING:
    from pocl.pipeline.context import Context
    from pocl.recipe.models import StudentSection, TeacherSection


def check_settings(recipe: Recipe, pending: Collection[str]) -> None:
    """Refuses settings of training that this machine cannot keep, if training is still to be done.

    Args:
        recipe: what is asked for.
        pending: names of the steps that are not done yet.

    Raises:
        ValueError: names the key.
    """
    if not {"adaptation", "warm-up", "training"} & set(pending):
        return
    from pocl.pipeline.extra import check_extra
    from pocl.pipeline.lora import check_lora

    check_extra(recipe.training.extra)
    if recipe.training.report_to:  # the trainer's module takes a second to import
        from pocl.trainer.config import check_reporters

        try:
            check_reporters(recipe.training.report_to)
        except ValueError as error:
            raise ValueError(f"training.{error}") from error
    check_lora(recipe)
    if recipe.student.dtype == "float16" and not recipe.student.lora:  # adapters are float32 in any case
        raise ValueError(
            "student.dtype is float16, in which steps of the optimizer are lost: leave it at float32, and set "
            "training.precision for the arithmetic"
        )


def check_lengths(context: Context, split: str, rows: Any) -> None:
    """Refuses rows that the run's models are too short for, by their configurations alone.

    Args:
        context: the run.
        split: `train`, `validation` or `test`.
        rows: its token rows.

    Raises:
        ValueError: names the sample, the model and the key to change.
    """
    from pocl.data.token_rows import summarize

    recipe = context.recipe
    summary = summarize(rows, split)
    room = recipe.on_policy.max_new_tokens if recipe.on_policy.share and split == "train" else 0
    for role, source, limit in _limits(context):
        longest, prompt = summary.longest, summary.longest_prompt
        if longest.value > limit:
            raise ValueError(
                f"data: sample {longest.sample_id} of {split} has {longest.value} tokens, and the context of the "
                f"{role} in {source} is {limit}; set data.max_length to {limit} at most, and data.max_prompt_length "
                "below it"
            )
        if room and prompt.value + room > limit:
            raise ValueError(
                f"on_policy.max_new_tokens = {room}: the prompt of sample {prompt.sample_id} has {prompt.value} "
                f"tokens, and the context of the {role} in {source} is {limit}; lower it to "
                f"{max(limit - prompt.value, 1)}, or lower data.max_prompt_length"
            )


def _limits(context: Context) -> list[tuple[str, str, int]]:
    """Role, source and context of the models that this run has to do with."""
    recipe = context.recipe
    asked: list[tuple[str, str, TeacherSection | StudentSection]] = []
    if recipe.student.model:
        asked.append(("student", recipe.student.model, recipe.student))
    served = recipe.teacher.server is not None  # which tells its context itself
    if "models" in context.summaries and not served:  # a ranking may do without a teacher
        asked.append(("teacher", context.teacher_source(), recipe.teacher))
    return [(role, source, n) for role, source, section in asked if (n := _limit(source, section))]


def _limit(source: str, section: TeacherSection | StudentSection) -> int | None:
    """None where there is none, or nothing that could tell: loading the model will say what is wrong with it."""
    from pathlib import Path

    from transformers import AutoConfig

    from pocl.models.loading import adapter_base
    from pocl.models.wrappers import context_of

    with contextlib.suppress(OSError, ValueError):
        place = adapter_base(source) or source
        options = {} if Path(place).is_dir() else {"revision": section.revision}
        config = AutoConfig.from_pretrained(place, trust_remote_code=section.trust_remote_code, **options)
        return context_of(config.get_text_config(decoder=True))
    return None
