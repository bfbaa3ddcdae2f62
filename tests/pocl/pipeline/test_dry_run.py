"""`--dry-run` says what would end a run and what becomes of its folder, and touches nothing."""

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocl.pipeline.disk import check_disk, disk_needs
from pocl.recipe import load_recipe
from pocl.run_lock import only_user

from ..conftest import pocl

STEPS = ["models", "data", "warm-up", "training"]


def states(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def planned(*words: Any, code: int = 0) -> dict[str, Any]:
    result = pocl("distill", *words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_a_run_that_would_work_has_no_problem_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    before = states(tmp_path)
    made = planned(recipe)
    assert made["findings"]["problems"] == made["findings"]["unknown"] == []
    assert set(made["findings"]["steps"].values()) == {"to do"}
    assert made["num_samples"] == 38
    assert [name for name, _ in made["steps"]][-1] == "report"
    assert states(tmp_path) == before


def test_a_part_of_a_run_is_planned_alone(recipe: Path) -> None:
    result = pocl("rank", recipe, "--warmup.epochs", "0", "--json")
    assert [name for name, _ in json.loads(result.stdout)["steps"]] == ["models", "data", "ranking"]
    result = pocl("cache-teacher", recipe, "--teacher_cache.mode", "online", "--dry-run")
    assert (result.exit_code, "has no step 'teacher-cache'" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--report_to", "nosuch"], "no reporter 'nosuch'"),
        (["--precision", "float16"], "needs a GPU, and there is none here"),
        (["--data.source", "none.jsonl"], "'none.jsonl' does not exist"),
        (["--num_test", "48"], "leave none to train on"),
        (["--num_stages", "40"], "38 training samples cannot fill the 40 stages"),
        (["--teacher", "./none"], "there is no folder './none' here"),
        (["--teacher", "SHORT"], "the context of the teacher in .* is 8|context"),
        (["--student", "CUT OFF"], "is damaged or cut off"),
        (["--student", "OTHER"], "w1"),
        (["--output", "FILE"], "is a file, and a folder is needed"),
        (["--output", "FULL"], "recipe.yaml is another recipe, and no run has begun there"),
    ],
)
def test_what_would_end_the_run_is_told(
    words: list[str], message: str, recipe: Path, tmp_path: Path, make_tiny_folder: Callable[..., Path]
) -> None:
    places = {"FILE": tmp_path / "pairs.jsonl", "FULL": tmp_path}
    if (kind := words[-1]) in ("SHORT", "CUT OFF", "OTHER"):
        options = {"max_position_embeddings": 8} if kind == "SHORT" else {}
        places[kind] = make_tiny_folder(seed=5, **options)
    if kind == "CUT OFF":
        weights = places[kind] / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:3000])
    if kind == "OTHER":
        file = places[kind] / "tokenizer.json"
        file.write_text(file.read_text().replace('"w1"', '"w0 "'))
    before = states(tmp_path)
    result = pocl("distill", recipe, "--dry-run", *[places.get(word, word) for word in words])
    assert result.exit_code == 2
    told = " ".join(result.stdout.split())
    assert "Would fail:" in told
    assert re.search(message, told.partition("Would fail:")[2]), told
    assert states(tmp_path) == before


def test_all_problems_are_told_at_once(recipe: Path) -> None:
    words = ["--report_to", "nosuch", "--teacher", "./none", "--data.source", "none.jsonl"]
    problems = planned(recipe, *words, code=2)["findings"]["problems"]
    assert len(problems) == 3


def test_what_lies_at_the_hub_is_unknown_and_no_problem(recipe: Path) -> None:
    found = planned(recipe, "--teacher", "org/none")["findings"]
    assert found["problems"] == []
    assert "there is no folder 'org/none' here" in found["unknown"][0]


def test_a_finished_run_says_what_a_change_would_delete(finished: Path, copied_run: Path) -> None:
    words = [finished / "recipe.yaml", "--output", copied_run]
    before = states(copied_run)
    assert set(planned(*words)["findings"]["steps"].values()) == {"done"}
    changed = [*words, "--curriculum.kd_ratio", "0.5"]
    found = planned(*changed, code=2)["findings"]
    assert "curriculum.kd_ratio: [0.7, 1.0] in the folder, [0.5] now" in found["problems"][0]
    found = planned(*changed, "--change")["findings"]
    assert found["problems"] == []
    assert found["steps"]["ranking"] == "done"
    assert found["steps"]["training"].startswith("deletes ")
    assert f"{copied_run / 'student'} (" in found["steps"]["training"]
    assert states(copied_run) == before


def test_a_folder_in_use_is_told(recipe: Path, tmp_path: Path) -> None:
    with only_user(tmp_path / "run"):
        assert "is in use by process" in planned(recipe, code=2)["findings"]["problems"][0]


def test_a_disk_that_is_too_small_ends_the_run_before_it_begins(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = disk_needs(load_recipe(recipe), STEPS)
    assert needs is not None
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, sum(needs.values()) - 1))
    result = pocl("distill", recipe)
    assert result.exit_code == 2
    assert "needs at least 3.2 MB (students 1.1 MB, checkpoints 2.2 MB), and 3.2 MB are free there" in result.stderr
    assert "Would fail" in pocl("distill", recipe, "--dry-run").stdout
    assert not (tmp_path / "run" / "student-initial").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, sum(needs.values())))
    check_disk(load_recipe(recipe), STEPS)


def test_what_a_run_needs_is_counted_by_its_models(recipe: Path, tiny_model_folder: Path) -> None:
    made = load_recipe(recipe)
    size = (tiny_model_folder / "model.safetensors").stat().st_size
    own = load_recipe(recipe, ["--student", str(tiny_model_folder)])
    needs = disk_needs(own, STEPS)
    assert needs is not None
    assert needs["students"] == pytest.approx(2 * size, rel=0.05)  # after the warm-up and at the end
    assert needs["checkpoints"] == pytest.approx(6 * size, rel=0.05)
    assert disk_needs(made, ["evaluation", "report"]) == {}
    assert disk_needs(load_recipe(recipe, ["--teacher", "org/none"]), STEPS) is None
