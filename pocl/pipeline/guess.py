"""What a model is, said before any weight is loaded: its configuration, its parameters, a skeleton of it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocl.embedded import EMBEDDED, evenly_spaced, shortened, teacher_folder
from pocl.pipeline.made import folder_of, recipe_of
from pocl.recipe import Recipe
from pocl.recipe.models import StudentSection, TeacherSection

CHARACTERS_PER_TOKEN = 4.0  # of English in the usual vocabularies


def num_parameters(recipe: Recipe, *, student: bool) -> int | None:
    """Parameters, tied ones once, by the names and shapes in the files of the weights, or the configuration alone.

    None where neither is on this machine. The files are asked first: a model's code takes seconds to import.
    """
    with contextlib.suppress(Exception):  # whatever files hold: the configuration tells, too
        if (counted := _counted(recipe, student=student)) is not None:
            return counted
    model = skeleton(recipe, student=student)
    return None if model is None else sum(parameter.numel() for parameter in model.parameters())


def _counted(recipe: Recipe, *, student: bool) -> int | None:
    from safetensors import safe_open

    section, kept = _section(recipe, student=student)
    if section is None:
        return None
    config = _configuration(section)
    text = config.get_text_config(decoder=True)
    total = text.num_hidden_layers
    layers, rest = dict.fromkeys(range(total), 0), 0
    files = _weights(section)
    if not files or text is not config or getattr(config, "quantization_config", None):
        return None
    for file in files:
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                shape = weights.get_slice(name).get_shape()
                mask = len(shape) == 4 and shape[:2] == [1, 1]  # of GPT-2's files: a constant
                if mask or (name.endswith("lm_head.weight") and config.tie_word_embeddings):
                    continue
                found = re.search(r"\.(\d+)\.", f".{name}")
                if found is None:
                    rest += math.prod(shape)
                elif (layer := int(found[1])) in layers:
                    layers[layer] += math.prod(shape)
                else:
                    return None
    return rest + sum(layers[layer] for layer in kept(total)) if all(layers.values()) else None


def _weights(section: TeacherSection | StudentSection) -> list[Path]:
    """The files of a model's weights, in its folder or in the hub's cache; none of an adapter."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(_place(section))
    if not folder.is_dir():
        config = try_to_load_from_cache(str(folder), "config.json", revision=section.revision)
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    return [] if (folder / "adapter_config.json").is_file() else sorted(folder.glob("*.safetensors"))


def _section(recipe: Recipe, *, student: bool) -> tuple[TeacherSection | StudentSection | None, Any]:
    """The section that a model's files go by, and which of its layers are kept; None of one that a recipe makes."""
    if recipe_of(recipe.student.model if student else recipe.teacher.model) is not None:
        return None, None
    if student and recipe.student.model:
        return recipe.student, range
    if not student:
        return recipe.teacher, range
    return recipe.teacher, lambda total: kept_layers(recipe.student, total)


def kept_layers(section: StudentSection, total: int) -> Sequence[int]:
    """The layers of a teacher with `total` that the student takes."""
    check_kept(section, total)
    dropped = section.drop or ()
    return evenly_spaced(total, section.cut) if section.cut else [i for i in range(total) if i not in dropped]


def check_kept(section: StudentSection, total: int) -> None:
    """Refuses a student of layers that its teacher, of `total`, does not have.

    Raises:
        ValueError: names the key.
    """
    if section.cut and section.cut > total:
        raise ValueError(f"student.cut must lie in 1 to {total}, the layers of the teacher, got {section.cut}")
    if outside := sorted(layer for layer in section.drop or () if layer >= total):
        raise ValueError(
            f"student.drop names the layers {', '.join(map(str, outside))}; the teacher has {total} layers, 0 to "
            f"{total - 1}"
        )
    if len(set(section.drop or ())) == total:
        raise ValueError(f"student.drop names all {total} layers of the teacher; leave at least one")


def check_student(recipe: Recipe) -> None:
    """`check_kept` of a recipe, as far as this machine can tell without weights."""
    if not recipe.student.from_teacher or recipe_of(recipe.teacher.model) is not None:
        return
    total = None
    with contextlib.suppress(Exception):  # preparing the models says what is wrong with a configuration
        total = _configuration(recipe.teacher).num_hidden_layers
    if total is not None:
        check_kept(recipe.student, total)


def configuration_of(recipe: Recipe, *, student: bool) -> Any:
    """The model's configuration, with the layers that it has; None where it is not on this machine."""
    other = recipe_of(recipe.student.model if student else recipe.teacher.model)
    if other is not None:
        return configuration_of(other, student=True)  # whether it is made or not
    section: TeacherSection | StudentSection = recipe.teacher
    if student and recipe.student.model:
        section = recipe.student
    with contextlib.suppress(Exception):  # a plan is possible without, whatever a configuration holds
        config = _configuration(section)
        if student and recipe.student.from_teacher:
            return shortened(config, kept_layers(recipe.student, config.num_hidden_layers))
        return config
    return None


def skeleton(recipe: Recipe, *, student: bool) -> Any:
    """The model without weights, by its configuration alone; None where that is not on this machine."""
    import torch
    from transformers import AutoModelForCausalLM

    config = configuration_of(recipe, student=student)
    section = recipe.student if student and recipe.student.model else recipe.teacher
    if config is None:
        return None
    with contextlib.suppress(Exception), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code)
    return None


def hidden_size(recipe: Recipe) -> int | None:
    """Of the teacher, by its configuration; None where that is not on this machine."""
    if recipe.teacher.server is None:
        with contextlib.suppress(Exception):
            return int(_configuration(recipe.teacher).get_text_config(decoder=True).hidden_size)
    return None


def _configuration(section: TeacherSection | StudentSection) -> Any:
    from transformers import AutoConfig

    from pocl.models import adapter_base

    source = _place(section)
    source = adapter_base(source) or source
    return AutoConfig.from_pretrained(
        source, revision=section.revision, trust_remote_code=section.trust_remote_code, local_files_only=True
    )


def _place(section: TeacherSection | StudentSection) -> str:
    source = str(folder_of(section.model or "") or section.model)
    if source != EMBEDDED:
        return source

    def not_now(text: str) -> None:
        raise LookupError(text)

    return str(teacher_folder(on_convert=not_now))
