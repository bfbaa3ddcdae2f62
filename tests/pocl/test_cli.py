"""Whole runs of the command line on a random model of two or three layers and 1,000 words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pocl.cli import app

STEPS = ["models", "data", "teacher-cache", "warm-up", "ranking", "training", "evaluation", "report"]


@pytest.fixture
def recipe(tmp_path: Path, tiny_teacher_folder: Path, tiny_pairs: list[dict[str, str]]) -> Path:
    """A recipe that cuts two layers of the three-layer teacher and trains two stages."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs))
    values = {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "teacher": str(tiny_teacher_folder),
        "student": {"cut": 2},
        "data": {"source": str(data), "num_validation": 4, "num_test": 6, "template": "plain", "max_length": 64},
        "warmup": {"epochs": 1},
        "ranking": {"max_new_tokens": 8},
        "curriculum": {"num_stages": 2, "epochs": 1},
        "training": {"batch_size": 8},
        "evaluation": {"max_new_tokens": 8},
    }
    values["data"]["max_prompt_length"] = 32
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def pocl() -> Callable[..., Any]:
    """Run `pocl` with words; returns exit code and output."""

    def call(*words: Any) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)

    return call


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["steps"]


def test_distill_makes_a_loadable_student_and_a_report_and_then_skips_everything(
    recipe: Path, tmp_path: Path, pocl: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tmp_path / "run"
    first = pocl("distill", recipe)
    assert first.exit_code == 0, first.output
    assert list(manifest(run)) == STEPS
    assert all(record["state"] == "finished" for record in manifest(run).values())
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert student.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(run / "student").eos_token == "<eos>"
    results = {file.stem: json.loads(file.read_text()) for file in (run / "evaluation").glob("*.json")}
    assert set(results) == {"teacher", "student-initial", "student-warmup", "student-final"}
    assert results["teacher"]["kl_to_teacher"] == 0
    assert results["student-final"]["kl_to_teacher"] < results["student-initial"]["kl_to_teacher"]
    page = (run / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == page.count("<img") >= 4

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    second = pocl("distill", recipe)
    assert second.exit_code == 0
    assert second.output.count("done before") == len(STEPS)
    changed = {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed <= {"recipe.yaml"}
