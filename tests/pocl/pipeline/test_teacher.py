"""What a run keeps of its teacher: hidden states or likely tokens, from this process or from a server."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl.recipe import RecipeError, load_recipe
from pocl.teacher import TopKCache

from ..conftest import pocl
from ..engines.small_server import serving


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "training" / "log.jsonl").read_text().splitlines()]


def changed(recipe: Path, **sections: Any) -> Path:
    values = yaml.safe_load(recipe.read_text())
    values |= {name: section for name, section in sections.items() if not isinstance(section, dict)}
    for name, section in sections.items():
        if isinstance(section, dict):
            before = values.get(name)
            values[name] = {**(before if isinstance(before, dict) else {}), **section}
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def test_likely_tokens_are_kept_where_the_recipe_says_so(recipe: Path, tmp_path: Path) -> None:
    teacher = yaml.safe_load(recipe.read_text())["teacher"]
    changed(recipe, teacher={"model": teacher, "store": "top_k", "top_k": 16, "tail": "uniform"})
    planned = pocl("distill", recipe, "--dry-run").output
    sizes = r"answer tokens of the teacher take .* as hidden states \(48 float32 numbers a token\) or .* as the 16 like"
    for output in (planned, pocl("distill", recipe).output):
        assert re.search(sizes, output), output
        assert "which of the others gets how much of the rest is lost (teacher.tail is uniform)" in output
    assert "The teacher runs once, its 16 likeliest tokens serve all" in planned
    cache = TopKCache.open(tmp_path / "run" / "teacher-cache")
    assert cache.top_k == 16
    assert log_of(tmp_path / "run")[-1]["stage"] == 1
    evaluation = json.loads((tmp_path / "run" / "evaluation" / "student-final.json").read_text())
    assert evaluation["kl_to_teacher"] > 0
    again = pocl("distill", recipe, "--teacher.top_k", "8", "--change", "--dry-run", "--json")
    steps = json.loads(again.stdout)["findings"]["steps"]
    assert steps["models"] == steps["data"] == "done"
    assert steps["teacher-cache"].startswith("deletes")


def test_a_teacher_on_a_server_is_learned_from(
    recipe: Path, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocl.pipeline.teacher._SERVED_SHARD_MB", 0)  # a sample in each
    with serving() as server:
        changed(
            recipe,
            teacher={"server": server.url, "model": "big", "top_k": 12},
            student={"model": str(tiny_model_folder), "cut": None},
            training={"metric": "kl_to_teacher"},
            on_policy={"share": 0.5, "max_new_tokens": 4},
        )
        planned = pocl("distill", recipe, "--dry-run")
        assert planned.exit_code == 0, planned.output
        assert f"The teacher runs once on the server {server.url}, its 12 likeliest tokens serve all" in planned.output
        assert not server.asked
        result = pocl("distill", recipe)
        assert result.exit_code == 0, result.output
        assert "the 12 likeliest tokens leave" in result.output
        asked = len(server.asked)
        assert len(list((tmp_path / "run" / "teacher-cache").glob("shard-*.safetensors"))) > 9  # each is kept
        assert asked > 42, "the rows of training and validation, and what the student says"
        done = pocl("distill", recipe)
        assert (done.exit_code, len(server.asked)) == (0, asked), done.output
    lines = log_of(tmp_path / "run")
    assert all(line["eval_kl_to_teacher"] > 0 for line in lines if "eval_kl_to_teacher" in line)
    judged = json.loads((tmp_path / "run" / "evaluation" / "student-final.json").read_text())
    assert judged["kl_to_teacher"] is None
    assert judged["cross_entropy"] > 0
    assert not (tmp_path / "run" / "evaluation" / "teacher.json").exists()


def test_a_server_that_is_not_there_is_told_before_the_data_is_read(
    recipe: Path, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pocl.engines.http.Client.__init__.__kwdefaults__",
        {"api_key_env": None, "connections": 1, "timeout": 5.0, "retries": 0, "backoff": 0.0},
    )
    monkeypatch.setattr(
        "pocl.engines.server.ServerEngine.__init__.__kwdefaults__",
        {"api_key_env": None, "in_flight": 1, "timeout": 5.0, "retries": 0, "backoff": 0.0},
    )
    changed(
        recipe,
        teacher={"server": "http://127.0.0.1:9", "model": "big"},
        student={"model": str(tiny_model_folder), "cut": None},
    )
    result = pocl("distill", recipe)
    assert result.exit_code == 2
    assert "the server at http://127.0.0.1:9 cannot be reached" in result.stderr
    assert not (tmp_path / "run" / "data").exists()


SERVER = {"server": "http://localhost:8000", "model": "big"}
OWN = {"student": {"model": "student"}}
REFUSED = {
    "no student can be cut from a teacher that is not here": {"teacher": SERVER},
    "server needs model, the name that the server lists it under": {"teacher": {"server": SERVER["server"]}, **OWN},
    "a server gives no hidden states": {"teacher": {**SERVER, "store": "hidden"}, **OWN},
    "server runs the teacher already": {"teacher": {**SERVER, "engine": "vllm"}, **OWN},
    "cannot be adapted": {"teacher": {**SERVER, "adapt_epochs": 1}, **OWN},
    "api_key_env is for a server": {"teacher": {"api_key_env": "KEY"}, **OWN},
    "engine_args are arguments of vLLM, and engine is transformers": {"teacher": {"engine_args": {"seed": 1}}, **OWN},
    "leave teacher_cache.mode at auto": {"teacher": SERVER, "teacher_cache": {"mode": "online"}, **OWN},
    "the teacher is not here to rank by": {"teacher": SERVER, "ranking": {"criteria": ["kl_to_teacher"]}, **OWN},
    "on_policy.share needs the teacher here": {"teacher": {"engine": "vllm"}, "on_policy": {"share": 0.5}, **OWN},
    "teacher.adapt_epochs needs the teacher here": {"teacher": {"engine": "vllm", "adapt_epochs": 1}, **OWN},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_do_not_fit_the_teachers_place_are_refused(message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"student": {"cut": 2}, **REFUSED[message]}))
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)
