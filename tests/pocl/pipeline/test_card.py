"""The student's card begins with what the hub reads: origin, data, license, measures with their intervals."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from pocl.pipeline.card import write_front_matter
from pocl.pipeline.context import Context
from pocl.recipe import load_recipe

from ..conftest import pocl


def front(run: Path) -> dict[str, Any]:
    return ModelCard.load(run / "student" / "README.md").data.to_dict()


def rewritten(run: Path, **changes: Any) -> dict[str, Any]:
    recipe = load_recipe(run / "recipe.yaml")
    for section, values in changes.items():
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
    write_front_matter(Context(recipe, run, None))  # type: ignore[arg-type]
    return front(run)


def test_a_finished_run_has_a_card_with_its_measures(finished: Path) -> None:
    run = finished / "run"
    data = front(run)
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["knowledge-distillation", "pocl"]
    assert not {"base_model", "license", "datasets"} & set(data)  # local folders have no name
    metrics = {m["type"]: m for m in data["model-index"][0]["results"][0]["metrics"]}
    measured = json.loads((run / "evaluation" / "student-final.json").read_text())
    assert metrics["cross_entropy"]["value"] == pytest.approx(measured["cross_entropy"], abs=1e-4)
    assert metrics["rouge"]["value"] == pytest.approx(100 * measured["rouge_l"], abs=1e-4)
    assert "95 % over samples" in metrics["rouge"]["name"]
    text = (run / "student" / "README.md").read_text()
    assert text.count("\n---\n") == 1
    assert "## Distillation" in text


def test_it_is_written_again_without_a_trace_of_the_first(copied_run: Path) -> None:
    before = (copied_run / "student" / "README.md").read_text()
    rewritten(copied_run)
    assert (copied_run / "student" / "README.md").read_text() == before
    assert pocl("distill", copied_run).exit_code == 0


def test_names_of_the_hub_are_told(copied_run: Path, tmp_path: Path) -> None:
    data = rewritten(copied_run, student={"model": "org/small"}, data={"source": "org/pairs"})
    assert (data["base_model"], data["datasets"]) == ("org/small", ["org/pairs"])
    data = rewritten(copied_run, teacher={"model": "embedded"}, data={"source": "data/pairs.jsonl"})
    assert (data["base_model"], data["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert "datasets" not in data
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nbase_model: org/first\n---\n# A model\n")
    data = rewritten(copied_run, student={"model": str(tmp_path / "base")})
    assert (data["base_model"], data["license"]) == ("org/first", "mit")
    (tmp_path / "base" / "README.md").write_text("---\n: [\n---\n")
    assert "license" not in rewritten(copied_run, student={"model": str(tmp_path / "base")})
