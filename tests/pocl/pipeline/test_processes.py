"""Several processes on one recipe: they share the ranking and the training, and leave what one would leave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocl.pipeline import run
from pocl.pipeline.context import read_parquet
from pocl.recipe import Recipe, build_recipe


@pytest.fixture
def recipe_of(
    tmp_path: Path, tiny_model_folder: Path, tiny_teacher_folder: Path, tiny_pairs: list[dict[str, str]]
) -> Callable[..., Recipe]:
    """A factory: a recipe that writes below the test's folder, with overrides."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs * 4))
    values = {
        "student": str(tiny_model_folder),
        "teacher": str(tiny_teacher_folder),
        "data": {"source": str(data), "template": "plain", "max_length": 64, "max_prompt_length": 32},
        "ranking": {"max_new_tokens": 8},
        "curriculum": {"num_stages": 2, "epochs": 1, "start": "last"},
        "training": {"batch_size": 8, "metric": "loss"},
    }

    def make(output: str, **data_options: Any) -> Recipe:
        return build_recipe(
            {**values, "data": {**values["data"], **data_options}}, ["--output", str(tmp_path / output)]
        )

    return make


def test_two_processes_rank_a_recipe_as_one_does(
    recipe_of: Callable[..., Recipe],
    start_processes: Callable[..., list[Any]],
    tmp_path: Path,
    tiny_pairs: list[dict[str, str]],
) -> None:
    options = {"num_validation": 0, "num_test": 0}
    run(recipe_of("one", **options), until="ranking")
    for process in (processes := start_processes(lambda: run(recipe_of("two", **options), until="ranking"), 2)):
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    for name in ("ranked", "scores"):
        one, two = (tmp_path / folder / "ranking" / f"{name}.parquet" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    ranked = read_parquet(tmp_path / "two" / "ranking" / "ranked.parquet")
    assert ranked["output"][:] == [(tiny_pairs * 4)[number]["output"] for number in ranked["sample_id"]]
    assert len(list((tmp_path / "two" / "ranking" / "shards").iterdir())) == 2
    steps = json.loads((tmp_path / "two" / "manifest.json").read_text())["steps"]
    assert {name: step["state"] for name, step in steps.items()} == {"data": "finished", "ranking": "finished"}
