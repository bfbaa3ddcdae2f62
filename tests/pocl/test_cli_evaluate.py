"""`pocl evaluate` scores what is there and trains nothing; `pocl status` says what is there."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pocl.cli import app
from pocl.run_lock import only_user


def pocl(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def questions(tmp_path: Path, tiny_pairs: list[dict[str, str]]) -> Path:
    """Three questions, the first of them one that the student trained on or was asked before."""
    rows = [tiny_pairs[0], *({"instruction": f"w{i} w{i + 1}", "output": f"w{i}"} for i in (3, 4))]
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def untrained(copied_run: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fails the test if anything trains, or if a weight of the student has changed at the end."""
    from pocl.trainer import POCLTrainer

    monkeypatch.setattr(POCLTrainer, "train", lambda *_: pytest.fail("training"))
    weights = (copied_run / "student" / "model.safetensors").read_bytes()
    yield
    assert (copied_run / "student" / "model.safetensors").read_bytes() == weights


@pytest.mark.usefixtures("untrained")
def test_other_questions_are_scored_beside_the_runs_own_and_shown_in_the_report(
    copied_run: Path, finished: Path, questions: Path
) -> None:
    own = {file.name: file.read_bytes() for file in (copied_run / "evaluation").glob("*.json")}
    result = pocl("evaluate", copied_run, "--data", questions, "--models", "teacher,student")
    assert result.exit_code == 0, result.output
    assert "evaluation/other  3 questions, teacher, student-final" in result.output
    scores = {f.stem: json.loads(f.read_text()) for f in (copied_run / "evaluation" / "other").glob("*.json")}
    assert set(scores) == {"settings", "teacher", "student-final"}
    assert scores["student-final"]["num_samples"] == 3
    assert own == {file.name: file.read_bytes() for file in (copied_run / "evaluation").glob("*.json")}
    assert "other, 3 questions" in (copied_run / "report" / "report.md").read_text()
    # the run is still whole: nothing to do, nothing to refuse
    again = pocl("distill", finished / "recipe.yaml", "--output", copied_run)
    assert again.exit_code == 0, again.output
    assert again.output.count("done before") == 8


@pytest.mark.usefixtures("untrained")
def test_the_runs_own_questions_with_other_settings_get_a_folder_of_their_own(copied_run: Path) -> None:
    words = ["evaluate", copied_run / "recipe.yaml", "--models", "student", "--json"]
    result = pocl(*words, "--evaluation.max_new_tokens", "4")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["name"] == "held-out-max_new_tokens-4"
    assert set(told["metrics"]) == {"student-final"}
    before = json.loads((copied_run / "evaluation" / "student-final.json").read_text())
    assert told["metrics"]["student-final"]["kl_to_teacher"] == before["kl_to_teacher"]


@pytest.mark.usefixtures("untrained")
def test_without_further_words_the_runs_evaluation_is_shown_again(copied_run: Path) -> None:
    result = pocl("evaluate", copied_run)
    assert result.exit_code == 0, result.output
    assert "after the stages" in result.output
    (copied_run / "evaluation" / "teacher.json").unlink()
    result = pocl("evaluate", copied_run)
    assert result.exit_code == 0, result.output
    assert (copied_run / "evaluation" / "teacher.json").is_file()


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--curriculum.kd_ratio", "0.5"], "curriculum.kd_ratio: [0.7, 1.0] in the folder, [0.5] now"),
        (["--data.source", "QUESTIONS"], "trains nothing: it takes evaluation.*, --data, --models"),
        (["--models", "studnet"], "there is no 'studnet' in this run"),
        (["--data", "nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["--data", "QUESTIONS", "--name", "../x"], "name must be of letters"),
    ],
)
def test_mistakes_are_told_in_words(words: list[str], message: str, copied_run: Path, questions: Path) -> None:
    result = pocl("evaluate", copied_run, *[{"QUESTIONS": questions}.get(word, word) for word in words])
    assert result.exit_code != 0
    assert message in result.stderr


def test_a_name_keeps_the_settings_it_was_made_with(copied_run: Path, questions: Path) -> None:
    words = ["evaluate", copied_run, "--data", questions, "--models", "student", "--name", "mine"]
    assert pocl(*words).exit_code == 0
    result = pocl(*words, "--evaluation.max_new_tokens", "3")
    assert result.exit_code != 0
    assert "holds scores of other settings" in result.stderr
    assert "--name" in result.stderr


def test_a_run_that_is_not_trained_is_told_what_to_do(recipe: Path, tmp_path: Path) -> None:
    result = pocl("evaluate", recipe)
    assert result.exit_code != 0
    assert "has no trained student yet: run pocl distill" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_at_work_is_refused_to_all_commands(copied_run: Path, finished: Path, questions: Path) -> None:
    with only_user(copied_run):
        for words in (
            ["distill", finished / "recipe.yaml", "--output", copied_run],
            ["evaluate", copied_run, "--data", questions],
        ):
            result = pocl(*words)
            assert result.exit_code != 0
            assert f"in use by process {os.getpid()}" in result.stderr


def test_status_says_what_is_done(copied_run: Path, recipe: Path) -> None:
    result = pocl("status", copied_run)
    assert result.exit_code == 0, result.output
    assert "tiny in" in result.output
    assert result.output.count("finished ") == 8
    found = json.loads(pocl("status", copied_run, "--json").stdout)
    assert found["state"] == "finished"
    assert found["training"]["step"] == found["training"]["steps"] == 8
    assert found["results"]["student-final"]["num_samples"] == 6
    assert {"loss", "kl_to_teacher"} < set(found["training"]["validation"])
    assert "runtime" not in result.output
    assert "per second" not in result.output.replace("tokens per second", "")
    assert found["bytes"] > 10_000
    with only_user(copied_run):
        assert json.loads(pocl("status", copied_run, "--json").stdout)["state"] == "running"
    assert "not the folder of a run" in pocl("status", copied_run.parent).stderr


def test_the_version_is_that_of_the_package() -> None:
    import pocl as package

    result = pocl("--version")
    assert result.exit_code == 0
    assert result.stdout == f"pocl {package.__version__}\n"
