"""A run on texts: the same stages, without a question or an answer; and rows that are tokenised once for all steps."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pocl.cli import app
from pocl.data import encoding
from pocl.pipeline import run
from pocl.pipeline.prepare import split_examples
from pocl.recipe import build_recipe, load_recipe
from pocl.report import Run


def values(folder: Path, teacher: Path, data: Path) -> dict[str, Any]:
    return {
        "output": str(folder / "run"),
        "teacher": str(teacher),
        "student": {"cut": 2},
        "data": {
            "source": str(data),
            "num_validation": 3,
            "num_test": 3,
            "max_length": 16,
            "max_prompt_length": 8,
            "workers": 2,
        },
        "curriculum": {"num_stages": 2, "epochs": 1},
        "training": {"batch_size": 8},
    }


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """24 texts of known words, one of them empty."""
    rows = [{"text": " ".join(f"w{(7 * i + j) % 900}" for j in range(4 + 3 * i)), "topic": i} for i in range(24)]
    rows[5]["text"] = ""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "texts.jsonl"


def test_texts_go_through_every_step(
    tmp_path: Path, tiny_teacher_folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made: list[int] = []
    maker = encoding.RowMaker.__init__
    monkeypatch.setattr(encoding.RowMaker, "__init__", lambda self, *a, **k: (made.append(1), maker(self, *a, **k))[1])
    recipe = build_recipe(values(tmp_path, tiny_teacher_folder, texts))
    folder = run(recipe)
    assert len(made) == 3  # train, validation and test, once for all steps
    ranked = pq.read_table(folder / "ranking" / "ranked.parquet").to_pydict()
    assert "rank_cross_entropy" in ranked
    assert "rank_rouge_l" not in ranked
    assert set(ranked["subset"]) == {0, 1}
    assert all(text.count("<eos>") == last - first for text, first, last in _inner(ranked))
    found = Run.read(folder)
    assert found.results["student-final"]["kl_to_teacher"] < found.results["student-initial"]["kl_to_teacher"]
    assert {result["rouge_l"] for result in found.results.values()} == {None}
    assert "eval_loss" in (folder / "training" / "log.jsonl").read_text()
    report = (folder / "report" / "report.md").read_text()
    assert "| text |" in report
    assert "Results on held-out texts" in report
    assert not re.search("reference answer|question|ROUGE", report.partition("## Recipe")[0].replace("ROUGE-L |", ""))
    printed = capsys.readouterr().out
    assert "The data is a corpus: there are no answers to compare, so rouge_l is left out" in printed
    assert "1 documents without text left out" in printed
    shutil.rmtree(folder / "evaluation")
    run(recipe)
    assert len(made) == 3
    result = CliRunner().invoke(
        app, ["evaluate", str(folder / "recipe.yaml"), "--output", str(folder), "--data", str(texts)]
    )
    assert result.exit_code == 0, result.output


def _inner(ranked: dict[str, list[Any]]) -> list[tuple[str, int, int]]:
    """Blocks that neither begin nor end at the border of a text, nor hold the place of the empty one."""
    rows = zip(ranked["text"], ranked["first_document"], ranked["last_document"], strict=True)
    return [row for row in rows if not row[0].endswith("<eos>") and row[2] - row[1] < 2 and not row[1] <= 5 <= row[2]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranking.criteria", "rouge_l"], "is a corpus, which has no answers to compare: rank it by another measure"),
        (
            ["--on_policy.share", "0.5"],
            "whose texts are no questions that the student could answer: set on_policy.share",
        ),
    ],
)
def test_settings_that_need_answers_are_refused_before_any_work(
    tmp_path: Path, texts: Path, words: list[str], message: str
) -> None:
    recipe = build_recipe(values(tmp_path, tmp_path, texts), words)
    with pytest.raises(ValueError, match=message):
        split_examples(recipe)


def test_the_shipped_recipe_reads_its_texts_from_python_itself() -> None:
    parts = split_examples(load_recipe("corpus"))
    assert {name: len(part) for name, part in parts.items()} == {"train": 16, "validation": 4, "test": 6}
    assert all(len(text) > 100 for text in parts["train"]["text"])
