"""The front matter of the student's model card: what it was made of, and its measures with their intervals."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl.embedded import EMBEDDED
from pocl.pipeline.made import PREFIX
from pocl.report.intervals import half_width
from pocl.run_folder import write_text

if TYPE_CHECKING:
    from pocl.pipeline.context import Context

_EMBEDDED_MODEL = ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
# Key of an evaluation, the hub's name of the metric, the title, and by what the value is multiplied.
_METRICS = (
    ("rouge_l", "rouge", "ROUGE-L", 100.0),
    ("exact_match", "exact_match", "exact match", 100.0),
    ("cross_entropy", "cross_entropy", "cross-entropy, nats a token", 1.0),
    ("kl_to_teacher", "kl_divergence", "KL to the teacher, nats a token", 1.0),
)


def write_front_matter(context: Context) -> None:
    """Put the metadata that the hub reads at the head of `student/README.md`, in place of any that is there."""
    from huggingface_hub import ModelCardData
    from huggingface_hub.repocard_data import EvalResult

    card = context.path / "student" / "README.md"
    if not card.is_file():
        return
    recipe = context.recipe
    origin = recipe.student.model or recipe.teacher.model
    base, license_ = _base(origin)
    data = _hub_name(recipe.data.source)
    found = context.path / "evaluation" / "student-final.json"
    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data or "private",
            dataset_name=data or Path(recipe.data.source).name,
            dataset_split="test",
            metric_type=kind,
            metric_value=value,
            metric_name=title,
        )
        for kind, title, value in _measures(json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {})
    ]
    front = ModelCardData(
        base_model=base,
        datasets=[data] if data else None,
        license=license_,
        library_name="peft" if (card.parent / "adapter_config.json").is_file() else "transformers",
        pipeline_tag="text-generation",
        tags=["knowledge-distillation", "pocl"],
        model_name=recipe.name,
        eval_results=measured or None,
    )
    text = _without_front_matter(card.read_text(encoding="utf-8"))
    write_text(card, f"---\n{front.to_yaml()}\n---\n{text}")


def _measures(result: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    found = []
    for key, kind, title, factor in _METRICS:
        value = result.get(key)
        if isinstance(value, (int, float)):
            width = half_width(result, key)
            within = "" if width is None else f" (± {factor * width:.2g}, 95 % over samples)"
            found.append((kind, title + within, round(factor * value, 4)))
    return found


def _base(origin: str) -> tuple[str | None, str | None]:
    """The hub's id and the license of the model that the student began as, as far as they are known."""
    if origin == EMBEDDED or origin.startswith(PREFIX):
        return _EMBEDDED_MODEL if origin == EMBEDDED else (None, None)
    card = Path(origin).expanduser() / "README.md"
    if not card.is_file():
        return _hub_name(origin), None
    import yaml
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError, yaml.YAMLError):  # a card of any kind; what it says is of use, not needed
        return None, None
    base = data.get("base_model")
    return base if isinstance(base, str) else None, data.get("license")


def _hub_name(source: str) -> str | None:
    """The source if it is a name on the hub: two words with a stroke between, and nothing of the kind on the disk."""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists()
    return source if is_name and not source.startswith(".") and not Path(source).suffix.startswith(".json") else None


def _without_front_matter(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)
