"""A recipe that runs in seconds, and a run of it that is finished, for the tests of the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pocl.cli import app


def pocl(*words: Any) -> Any:
    """Run `pocl` with words; returns exit code and output."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def write_recipe(folder: Path, teacher: Path, data: Path) -> Path:
    values = {
        "name": "tiny",
        "output": str(folder / "run"),
        "teacher": str(teacher),
        "student": {"cut": 2},
        "data": {
            "source": str(data),
            "num_validation": 4,
            "num_test": 6,
            "template": "plain",
            "max_length": 64,
            "max_prompt_length": 32,
        },
        "warmup": {"epochs": 1},
        "ranking": {"max_new_tokens": 8},
        "curriculum": {"num_stages": 2, "epochs": 1},
        "training": {"batch_size": 8},
        "evaluation": {"max_new_tokens": 8},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def recipe(tmp_path: Path, tiny_teacher_folder: Path, tiny_pairs: list[dict[str, str]]) -> Path:
    """A recipe that cuts two layers of the three-layer teacher and trains two stages."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs))
    return write_recipe(tmp_path, tiny_teacher_folder, data)


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_folder: Path, tiny_pairs: list[dict[str, str]]
) -> Path:
    """A folder with a recipe, the finished run of it in `run`, and what it printed. Copy the run before changing it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs))
    made = write_recipe(folder, tiny_teacher_folder, folder / "pairs.jsonl")
    result = pocl("distill", made)
    assert result.exit_code == 0, result.output
    (folder / "output.txt").write_text(result.output)
    return folder


@pytest.fixture
def copied_run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))
