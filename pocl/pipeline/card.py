"""The student's model card: front matter that the hub reads, how it was made, and what it measured.

Training writes the card with all that is known by then. The report, which comes when the measures are there, writes its
front matter again and leaves the text below to whoever wrote in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl.embedded import EMBEDDED, EMBEDDED_CORPUS, EMBEDDED_TEXT
from pocl.pipeline.made import folder_of
from pocl.recipe import Recipe
from pocl.report.intervals import interval
from pocl.run_folder import write_text

CARD = "student/README.md"
_SETTINGS = "settings.json"  # of an evaluation beside the run's own
_FINAL = "student-final.json"
_EMBEDDED_MODEL = ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
_EMBEDDED_DATA = {
    EMBEDDED: "chatterbot-corpus",
    EMBEDDED_TEXT: "chatterbot-corpus and paragraphs of Wikipedia",
    EMBEDDED_CORPUS: "Python's language reference",
}
# Key of an evaluation, the hub's name of the metric, the title, and by what the value is multiplied.
_METRICS = (
    ("rouge_l", "rouge", "ROUGE-L", 100.0),
    ("exact_match", "exact_match", "exact match", 100.0),
    ("cross_entropy", "cross_entropy", "cross-entropy, nats a token", 1.0),
    ("kl_to_teacher", "kl_divergence", "KL to the teacher, nats a token", 1.0),
)
_OF_ADAPTERS = ("lora", "peft")


@dataclass(frozen=True)
class _Origin:
    """What a model's source tells of it; None where it tells nothing."""

    name: str | None = None
    """Hub id."""
    license: str | None = None


def write_card(recipe: Recipe, folder: Path, section: str) -> None:
    """A new card of the student in a folder.

    Args:
        recipe: that it was made by.
        folder: of its weights.
        section: Markdown on its training.
    """
    text = f"# {recipe.name}\n{section}\n## Recipe\n\n```yaml\n{_shown(recipe)}```\n"
    write_text(folder / "README.md", _joined(_front_matter(recipe, folder, []), text))


def renew_card(recipe: Recipe, path: Path) -> None:
    """Write the front matter of the card in a run folder again, with what was measured by now; the text stays.

    Keys that somebody added stay, too, and so does a license that somebody named.
    """
    folder = path / "student"
    card = folder / "README.md"
    if not folder.is_dir():
        return
    front, text = _parts(card.read_text(encoding="utf-8")) if card.is_file() else ({}, f"# {recipe.name}\n")
    new = _front_matter(recipe, folder, _results(recipe, path))
    kept = {key: value for key, value in front.items() if key == "license" or key not in {*new, "model-index"}}
    write_text(card, _joined({**new, **kept}, text))


def write_merged_card(source: Path, target: Path) -> None:
    """The card of an adapter's folder for the ordinary model made of it; nothing where the adapter has none."""
    card = source / "README.md"
    if not card.is_file():
        return
    front, text = _parts(card.read_text(encoding="utf-8"))
    tags = [tag for tag in front.get("tags") or [] if tag not in _OF_ADAPTERS and not tag.startswith("base_model:")]
    base = front.get("base_model") if isinstance(front.get("base_model"), list) else [front.get("base_model")]
    named = [name for name in base or [] if isinstance(name, str) and _hub_name(name)]  # PEFT writes folders, too
    front |= {"library_name": "transformers", "tags": tags or None, "base_model": named[0] if named else None}
    write_text(target / "README.md", _joined(front, text))


def _front_matter(recipe: Recipe, folder: Path, results: list[Any]) -> dict[str, Any]:
    from huggingface_hub import ModelCardData

    origin, teacher = _origin(recipe.student.model or recipe.teacher.model), _origin(recipe.teacher.model)
    # a student of one license that learnt from a teacher of another: whoever publishes it has to decide
    license_ = None if teacher.license not in (None, origin.license) else origin.license
    sources = (recipe.data.source, recipe.data.validation, recipe.data.test)
    front = ModelCardData(
        base_model=origin.name,
        datasets=list(dict.fromkeys(filter(None, map(_hub_name, sources[:1])))) or None,
        license=license_,
        library_name="peft" if (folder / "adapter_config.json").is_file() else "transformers",
        pipeline_tag="text-generation",
        tags=["knowledge-distillation", "pocl"],
        model_name=recipe.name,
        eval_results=results or None,
    )
    return dict(front.to_dict())


def _results(recipe: Recipe, path: Path) -> list[Any]:
    """Measures of the student on the run's own questions, and on those of further evaluations."""
    folder = path / "evaluation"
    found = _of_dataset(folder / _FINAL, recipe.data.test or recipe.data.source, "test")
    for settings in sorted(folder.glob(f"*/{_SETTINGS}")):
        said = json.loads(settings.read_text(encoding="utf-8"))
        if said["data"] != "held-out":  # the same questions by other settings would look like a contradiction
            found += _of_dataset(settings.with_name(_FINAL), said["data"], said["split"])
    return found


def _of_dataset(file: Path, source: str, split: str) -> list[Any]:
    from huggingface_hub.repocard_data import EvalResult

    if not file.is_file():
        return []
    result, hub = json.loads(file.read_text(encoding="utf-8")), _hub_name(source)
    name = hub or _EMBEDDED_DATA.get(source, Path(source).name)
    found = []
    for key, kind, title, factor in _METRICS:
        value = result.get(key)
        if not isinstance(value, (int, float)):
            continue
        ends, samples = interval(result, key), result["num_samples"]
        low, high = (round(factor * end, 4) for end in ends) if ends else (None, None)
        within = f" (95 % of {samples} samples: {low:.4g} to {high:.4g})" if low is not None else ""
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=hub or f"unlisted {name}",  # results of one type would be told as those of one data set
                dataset_name=name,
                dataset_split=split,
                metric_type=kind,
                metric_value=round(factor * value, 4),
                metric_name=f"{title}{within}",
                metric_args={"num_samples": samples} | ({"interval_95": [low, high]} if ends else {}),
            )
        )
    return found


def _origin(source: str) -> _Origin:
    if source == EMBEDDED:
        return _Origin(*_EMBEDDED_MODEL)
    card = Path(folder_of(source) or source).expanduser() / "README.md"
    if not card.is_file():
        return _Origin(_hub_name(source))
    front, _ = _parts(card.read_text(encoding="utf-8", errors="replace"))
    base, license_ = front.get("base_model"), front.get("license")
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    return _Origin(_hub_name(base) if isinstance(base, str) else None, license_ if isinstance(license_, str) else None)


def _hub_name(source: str | None) -> str | None:
    """The source if it is a name on the hub: one or two words with a stroke between, and nothing of the kind here."""
    if source is None or source in _EMBEDDED_DATA or Path(source).exists() or Path(source).suffix in _FILES:
        return None
    return source if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source) else None


_FILES = {".jsonl", ".json", ".csv", ".txt", ".parquet", ".arrow", ".gz", ".zst"}


def _shown(recipe: Recipe) -> str:
    """The settings that are no defaults; of folders and files the last name, as a card is for others to read."""
    import yaml

    values = recipe.model_dump(mode="json", exclude_defaults=True)
    for key in ("output", "hub", "compare"):
        values.pop(key, None)
    for section, names in (("teacher", ["model"]), ("student", ["model"]), ("data", ["source", "validation", "test"])):
        for name in names:
            value = values.get(section, {}).get(name)
            if value and (Path(value).expanduser().exists() or Path(value).is_absolute()):
                values[section][name] = Path(value).name
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def _parts(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card; what stands there and cannot be read as front matter is text."""
    import yaml

    found = re.match(r"\A---[ \t]*\r?\n(.*?\n)??---[ \t]*(\r?\n|\Z)", card, flags=re.DOTALL)
    if found is None:
        return {}, card
    try:
        front = yaml.safe_load(found[1] or "") or {}
    except yaml.YAMLError:
        return {}, card
    return (dict(front), card[found.end() :]) if isinstance(front, Mapping) else ({}, card)


def _joined(front: Mapping[str, Any], text: str) -> str:
    import yaml

    written = {key: value for key, value in front.items() if value is not None}
    return f"---\n{yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=120)}---\n{text}"
