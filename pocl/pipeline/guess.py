"""How long training may take, guessed before any weight is loaded: the flops of a step over this machine's speed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import Any

from pocl.embedded import EMBEDDED, evenly_spaced, shortened, teacher_folder
from pocl.pipeline.made import folder_of, recipe_of
from pocl.recipe import Recipe
from pocl.recipe.models import StudentSection, TeacherSection

CHARACTERS_PER_TOKEN = 4.0  # of English in the usual vocabularies
EFFICIENCY = 0.5  # of a training step against one large matrix product


def seconds_per_step(recipe: Recipe, texts: Iterable[str], *, cached: bool) -> float | None:
    """Seconds of one optimizer step of one process, without evaluations and sampled responses; a guess, within some 3x.

    A token costs 6 flops for each parameter of the student, and 2 for each of an online teacher.

    Args:
        recipe: what is planned.
        texts: prompt and response of some samples, for their mean length.
        cached: whether the teacher's hidden states come from a cache.

    Returns:
        None where a model's configuration is not on this machine, or no text is.
    """
    lengths = [min(len(text) / CHARACTERS_PER_TOKEN, recipe.data.max_length) for text in texts]
    student, teacher = num_parameters(recipe, student=True), num_parameters(recipe, student=False)
    if not lengths or student is None or teacher is None:
        return None
    rows = recipe.training.batch_size * recipe.training.gradient_accumulation_steps
    tokens = rows * sum(lengths) / len(lengths)
    return tokens * (6 * student + (0 if cached else 2 * teacher)) / (EFFICIENCY * flops_per_second(recipe))


def num_parameters(recipe: Recipe, *, student: bool) -> int | None:
    """Parameters by the model's configuration alone; None where that is not on this machine."""
    model = skeleton(recipe, student=student)
    return None if model is None else sum(parameter.numel() for parameter in model.parameters())


def skeleton(recipe: Recipe, *, student: bool) -> Any:
    """The model without weights, by its configuration alone; None where that is not on this machine."""
    import torch
    from transformers import AutoModelForCausalLM

    other = recipe_of(recipe.student.model if student else recipe.teacher.model)
    if other is not None:
        return skeleton(other, student=True)  # whether it is made or not
    section: TeacherSection | StudentSection = recipe.teacher
    if student and recipe.student.model:
        section = recipe.student
    with contextlib.suppress(Exception):  # a plan is possible without, whatever a configuration holds
        config = _configuration(section)
        if student and recipe.student.from_teacher:
            total, dropped = config.num_hidden_layers, recipe.student.drop or ()
            cut = recipe.student.cut
            config = shortened(
                config, evenly_spaced(total, cut) if cut else [i for i in range(total) if i not in dropped]
            )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code)
    return None


def _configuration(section: TeacherSection | StudentSection) -> Any:
    from transformers import AutoConfig

    from pocl.models import adapter_base

    source = str(folder_of(section.model or "") or section.model)
    if source == EMBEDDED:

        def not_now(text: str) -> None:
            raise LookupError(text)

        source = str(teacher_folder(on_convert=not_now))
    source = adapter_base(str(source)) or source
    return AutoConfig.from_pretrained(
        source, revision=section.revision, trust_remote_code=section.trust_remote_code, local_files_only=True
    )


def flops_per_second(recipe: Recipe, size: int | None = None) -> float:
    """Of a square matrix product in the recipe's precision, on the device that trains; takes about 0.1 s."""
    import torch

    from pocl.devices import accelerator

    device = accelerator() or torch.device("cpu")
    size = size or (1024 if device.type == "cpu" else 8192)
    matrix = torch.ones(size, size, device=device, dtype=getattr(torch, recipe.training.precision))
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # the number makes the host wait for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
