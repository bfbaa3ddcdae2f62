"""`pocl compare` on tiny models: what arms share is made once, cells survive kills, and the page says what came out."""

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pocl.cli import app
from pocl.compare import cells as cells_of


@pytest.fixture
def recipe(
    tmp_path: Path, tiny_model_folder: Path, tiny_teacher_folder: Path, tiny_pairs: list[dict[str, str]]
) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs))
    values = {
        "name": "tiny",
        "output": str(tmp_path / "comparison"),
        "teacher": str(tiny_teacher_folder),
        "student": str(tiny_model_folder),
        "data": {
            "source": str(tmp_path / "pairs.jsonl"),
            "num_validation": 4,
            "num_test": 8,
            "template": "plain",
            "max_length": 64,
            "max_prompt_length": 32,
        },
        "warmup": {"epochs": 1},
        "ranking": {"max_new_tokens": 4},
        "curriculum": {"num_stages": 2, "epochs": 1, "learning_rate": 1e-2, "control": True},  # left out: plain is one
        "training": {"batch_size": 8, "metric": "kl_to_teacher", "draw": 24},
        "evaluation": {"max_new_tokens": 4},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def pocl(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is trained and ranked from here on."""
    from pocl import difficulty
    from pocl.trainer import POCLTrainer

    seen: list[str] = []
    train, score = POCLTrainer.train, difficulty.score

    def training(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(self.curriculum.name)
        return train(self, *args, **options)

    def scoring(*args: Any, **options: Any) -> Any:
        seen.append("ranking")
        return score(*args, **options)

    monkeypatch.setattr(POCLTrainer, "train", training)
    monkeypatch.setattr(difficulty, "score", scoring)
    return seen


def dies_at(owner: Any, name: str, number: int) -> None:
    function, left = getattr(owner, name), [number]

    def dying(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, dying)


def in_the_second_cell() -> None:
    from pocl.trainer import POCLTrainer

    dies_at(POCLTrainer, "training_step", 15)  # 5 of the warm-up, 4 or 5 of a cell


def while_the_cell_is_judged() -> None:
    from pocl.pipeline import evaluating

    dies_at(evaluating, "score_models", 3)


def table_of(folder: Path) -> list[str]:
    """The page without times."""
    text = (folder / "report.md").read_text()
    return [line for line in text.splitlines() if line.startswith("|") and not re.search(r"\d s \|", line)]


@pytest.mark.slow
def test_killed_twice_it_ends_in_the_same_table_and_shares_what_arms_have_in_common(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["compare", recipe, "--arms", "pocl,plain", "--seeds", "2"]
    for arrange in (in_the_second_cell, while_the_cell_is_judged):

        def child(arrange: Callable[[], None] = arrange) -> None:
            arrange()
            pocl(*words)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, arrange
    cut = pocl(*words)
    assert "of 4 cells are done already" in cut
    seen = count_calls(monkeypatch)
    whole = pocl(*words, "--output", tmp_path / "whole")
    assert table_of(tmp_path / "comparison") == table_of(tmp_path / "whole")
    assert sorted(seen) == ["baby_step", "baby_step", "constant", "constant", "ranking", "warm-up"]
    assert "pocl against plain: " in whole
    results = [json.loads(file.read_text()) for file in sorted((tmp_path / "whole" / "results").iterdir())]
    assert [(r["arm"], r["seed"]) for r in results] == [("plain", 1), ("plain", 2), ("pocl", 1), ("pocl", 2)]
    assert {r["steps"] for r in results} == {5}  # 12 and 24 of 24 samples, 8 at a time
    assert all(r["of_each"]["sample_id"] == results[0]["of_each"]["sample_id"] for r in results)
    assert list((tmp_path / "whole" / "cells").iterdir()) == []
    seen.clear()
    assert "4 of 4 cells are done already" in pocl(*words, "--output", tmp_path / "whole")
    assert seen == []


@pytest.mark.slow
def test_cells_in_processes_of_their_own_end_as_those_of_a_single_one(recipe: Path, tmp_path: Path) -> None:
    words = ["compare", recipe, "--arms", "plain,pocl", "--seeds", "1"]
    pocl(*words)
    said = pocl(*words, "--jobs", 2, "--output", tmp_path / "beside")
    assert "cell 2 of 2" in said
    assert table_of(tmp_path / "comparison") == table_of(tmp_path / "beside")
    assert list((tmp_path / "beside" / "cells").iterdir()) == []


def test_a_single_seed_has_no_interval_and_arms_of_ones_own_are_compared(recipe: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["compare"] = {
        "arms": {"plain": None, "fast": {"from": "plain", "curriculum.learning_rate": 0.02}},
        "seeds": 1,
    }
    recipe.write_text(yaml.safe_dump(values))
    said = pocl("compare", recipe)
    assert "fast against plain" in said
    assert "cannot be told with one seed" in said
    page = (tmp_path / "comparison" / "index.html").read_text()
    assert "There is a single seed, so there are no intervals" in page
    assert "as plain, but curriculum.learning_rate = 0.02" in page
    plan = pocl("compare", recipe, "--seeds", "3", "--dry-run")
    assert "6 cells of 5 optimizer steps, 2 done. The other 4 take" in plan
    assert "(as the cells so far took)" in plan


def test_an_arm_that_diverges_is_shown_and_counted(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocl.trainer import POCLTrainer

    step = POCLTrainer.training_step

    def breaking(self: Any, *args: Any, **options: Any) -> Any:
        loss = step(self, *args, **options)
        if self.curriculum.name == "baby_step" and self.args.seed == 2:
            raise FloatingPointError("the loss is not finite")
        return loss

    monkeypatch.setattr(POCLTrainer, "training_step", breaking)
    said = pocl("compare", recipe, "--seeds", "2")
    assert "pocl, seed 2: diverged: the loss is not finite" in said
    assert "pocl against plain: it diverged in 1 seed(s), plain in 0" in said
    summary = json.loads((tmp_path / "comparison" / "results.json").read_text())
    assert {row["verdict"] for row in summary["differences"]} == {"harms"}
    assert "1 seed(s), plain 0" in (tmp_path / "comparison" / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "plain,ordr"], "there is no arm 'ordr'; did you mean order?"),
        (["--arms", "plain,plain"], "the arm 'plain' is named twice"),
        (["--arms", "pocl"], "a comparison needs two arms at least, got pocl"),
        (["--arms", "temperature,restarts", "--curriculum.temperature", "1"], "train alike; leave one out"),
        (["--seeds", "0"], "seeds must be a number >= 1"),
        (["--data.num_test", "0"], "arms are judged on test samples"),
        (["--curriculum.kind", "reversed"], "a recipe to compare is one of kind baby_step"),
        (["--training.draw", "99"], "training.draw = 99, but there are"),
        (["--jobs", "0"], "jobs must be a number of processes >= 1"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(recipe: Path, words: list[str], message: str) -> None:
    assert message in pocl("compare", recipe, *words, code=2)


def test_cells_of_another_recipe_are_refused(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(folder: Path, cell: Any) -> dict[str, Any]:
        each = {"sample_id": [1, 2], "num_tokens": [3, 4], "cross_entropy": [1.0, 2.0]}
        result = {
            "arm": cell.arm.name, "level": "", "seed": cell.seed, "mark": cell.mark(), "settings": cell.settings(),
            "start": "", "machine": {}, "diverged": None, "metrics": dict.fromkeys(cells_of.METRICS), "of_each": each,
            "seconds": {"training": 1.0, "evaluation": 1.0}, "steps": 5, "curve": [], "teacher_samples": 0,
        }  # fmt: skip
        cells_of.write_text(cells_of.result_file(folder, cell), json.dumps(result))
        return result

    monkeypatch.setattr("pocl.compare.run.run_cell", made)
    monkeypatch.setattr("pocl.compare.run.make_shared", lambda *_: None)
    monkeypatch.setattr("pocl.compare.run.judge_start", lambda *_: {})
    said = pocl("compare", recipe, "--seeds", "2")
    assert "cross-entropy is the same in every sample" in said
    assert "KL cannot be told (KL was not measured)" in said
    message = "belongs to another comparison: training.batch_size: 8 in the folder, 4 now"
    assert message in pocl("compare", recipe, "--batch_size", "4", code=2)
    assert message in pocl("compare", recipe, "--batch_size", "4", "--dry-run", code=2)
    values = yaml.safe_load(recipe.read_text())
    values["compare"] = {"arms": {"plain": {"from": "plain", "curriculum.learning_rate": 0.02}, "pocl": None}}
    recipe.write_text(yaml.safe_dump(values))
    assert "plain-1.json is the cell of another comparison: curriculum.learning_rate" in pocl("compare", recipe, code=2)
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text().replace("w1", "w2"))
    values["compare"] = {"arms": ["plain", "pocl"]}
    recipe.write_text(yaml.safe_dump(values))
    assert "the content of a model or of the data" in pocl("compare", recipe, code=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "is not the folder of a comparison" in pocl("compare", recipe, "--output", tmp_path / "other", code=2)


def test_arms_are_compared_on_texts_by_their_blocks(recipe: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"w{(7 * i + j) % 900}" for j in range(40))} for i in range(16)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data.source", tmp_path / "texts.jsonl", "--data.template", "auto", "--ranking.criteria=cross_entropy"]
    words += ["--data.max_length=16", "--data.max_prompt_length=8", "--data.blocks=joined", "--warmup.epochs=0"]
    words = ["compare", recipe, *words, "--data.num_test=2", "--data.num_validation=2", "--arms", "plain,order"]
    planned = pocl(*words, "--seeds", "1", "--dry-run")  # more blocks are drawn than there are texts
    assert "2 cells of 5 optimizer steps, 0 done" in planned
    pocl(*words, "--seeds", "1")
    results = json.loads((tmp_path / "comparison" / "results" / "order-1.json").read_text())
    assert results["metrics"]["kl_to_teacher"] > 0
    assert results["metrics"]["rouge_l"] is None
    assert "2 cells of 5 optimizer steps, 2 done" in pocl(*words, "--seeds", "1", "--dry-run")
