"""The report of a run folder, whole or in parts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pocl.pipeline.context import write_parquet
from pocl.report import Run, write_report
from pocl.report.figures import smooth
from pocl.report.run import read_log

COUNT = 24


def lines(count: int, stages: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step + 1,
            "stage": step * stages // count,
            "loss": 1.0,
            "divergence": 2.0 / (step + 1),
            "cross_entropy": 5.0,
            "temperature": 1.0 + step * stages // count,
            "kd_ratio": 0.7,
            "learning_rate": 1e-3 * math.cos(step / count),
        }
        for step in range(count)
    ]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run as the pipeline leaves it, with made-up numbers."""
    for name in ("training", "warmup", "evaluation"):
        (tmp_path / name).mkdir()
    (tmp_path / "recipe.yaml").write_text("name: made up\n")
    steps = {
        "models": {"state": "finished", "seconds": 3.0, "summary": {"parameters": {"teacher": 2e6, "student": 1e6}}},
        "training": {"state": "finished", "seconds": 60.0, "summary": {"stage_samples": [12, 24], "note": "trained"}},
    }
    (tmp_path / "manifest.json").write_text(json.dumps({"steps": steps}))
    ranked = {
        "sample_id": range(COUNT),
        "cross_entropy": [1.0 + i / 10 for i in range(COUNT)],
        "rouge_l": [0.5] * COUNT,
        "rank_cross_entropy": range(1, COUNT + 1),
        "rank_rouge_l": range(COUNT, 0, -1),
        "rank": range(1, COUNT + 1),
        "subset": [i * 2 // COUNT for i in range(COUNT)],
        "question": ["a column of the data"] * COUNT,
        "student_response": ["an answer\nof two lines"] * COUNT,
    }
    write_parquet(Dataset.from_dict({k: list(v) for k, v in ranked.items()}), tmp_path / "ranking" / "ranked.parquet")
    train = {
        "id": list(range(COUNT))[::-1],
        "prompt": [f"question {i} | with a bar" for i in range(COUNT)][::-1],
        "response": ["answer"] * COUNT,
    }
    write_parquet(Dataset.from_dict(train), tmp_path / "data" / "train.parquet")
    test = {"id": [0, 1], "prompt": ["held-out question", "b"], "response": ["reference", "d"]}
    write_parquet(Dataset.from_dict(test), tmp_path / "data" / "test.parquet")
    validation = [{"step": 12, "stage": 0, "eval_cross_entropy": 1.0, "eval_rouge_l": 0.2}]
    log = [*lines(20, 2), *validation]
    (tmp_path / "training" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (tmp_path / "warmup" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(5, 1)))
    for index, key in enumerate(("teacher", "student-initial", "student-warmup", "student-final")):
        result = {
            "cross_entropy": 2.0 + index,
            "kl_to_teacher": (0.0, 16.0, 4.0, 2.0)[index],
            "rouge_l": 0.1,
            "exact_match": 0.0,
            "num_samples": 2,
            "responses": [f"what {key} says", "x"],
        }
        (tmp_path / "evaluation" / f"{key}.json").write_text(json.dumps(result))
    return tmp_path


def test_the_report_of_a_whole_run_tells_all_of_it(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    text = (run_folder / "report" / "report.md").read_text()
    for piece in (
        "8.0 times closer",
        "The easiest samples",
        "question 0",
        f"question {COUNT - 1}",
        "what student-final says",
        "held-out question",
        "made up",
        "AutoModelForCausalLM" if (run_folder / "student").exists() else "What was done",
    ):
        assert piece in page
        assert piece in text
    pictures = {path.name for path in (run_folder / "report").glob("*.png")}
    assert pictures == {"results.png", "difficulty.png", "stages.png", "losses.png", "validation.png"}
    assert page.count("data:image/png") == len(pictures)
    assert all((run_folder / "report" / name).stat().st_size > 5_000 for name in pictures)


def test_an_unfinished_run_has_a_report_of_what_there_is(run_folder: Path) -> None:
    for name in ("training/log.jsonl", "ranking/ranked.parquet", *(f"evaluation/{key}.json" for key in ("teacher",))):
        (run_folder / name).unlink()
    page = write_report(run_folder).read_text()
    assert "The stages" not in page
    assert "The easiest samples" not in page
    assert "Results on held-out questions" in page


def test_a_run_that_only_ranked_has_a_report_of_a_ranking(run_folder: Path) -> None:
    for file in ("training/log.jsonl", *(f"evaluation/{path.name}" for path in (run_folder / "evaluation").iterdir())):
        (run_folder / file).unlink()
    write_report(run_folder)
    text = (run_folder / "report" / "report.md").read_text()
    assert text.startswith("# Ranking report: made up\n")
    assert f"Here {COUNT} samples were ranked, and cut into 2 parts." in text
    assert "teacher" not in text.split("##")[0]
    write_text = (run_folder / "training" / "log.jsonl").write_text
    write_text("".join(json.dumps(line) + "\n" for line in lines(20, 2)))
    write_report(run_folder)
    assert (run_folder / "report" / "report.md").read_text().startswith("# Distillation report: made up\n")


def test_stages_are_read_off_the_log(run_folder: Path) -> None:
    first, second = Run.read(run_folder).stages()
    assert (first["first_step"], first["last_step"], first["num_samples"]) == (0, 10, 12)
    assert (second["first_step"], second["last_step"], second["num_samples"]) == (10, 20, 24)
    assert first["divergence"] == [2.0, 0.2]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the folder of a run"):
        write_report(tmp_path)


def test_a_log_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]


def test_smoothing_keeps_constants_and_the_first_value() -> None:
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 5.0])[0] == 1.0


@pytest.mark.parametrize(
    ("control", "said"),
    [
        (3.0, "ends at 3.000: the stages ended 1.000 to 1.000 nats closer (95 % interval over samples)."),
        (1.5, "ends at 1.500: the stages ended 0.500 to 0.500 nats farther away (95 % interval over samples)."),
        (2.0, "ends at 2.000: between the two, so many samples can show no difference."),
    ],
)
def test_a_control_says_what_the_stages_added(run_folder: Path, control: float, said: str) -> None:
    for key, kl in (("student-control", control), ("student-final", 2.0)):
        result = json.loads((run_folder / "evaluation" / "student-final.json").read_text())
        result |= {"kl_to_teacher": kl, "of_each": {"kl_to_teacher": [kl] * 4, "num_tokens": [1, 2, 3, 4]}}
        (run_folder / "evaluation" / f"{key}.json").write_text(json.dumps(result))
    write_report(run_folder)
    text = (run_folder / "report" / "report.md").read_text()
    assert f"Plain distillation from the same start, for as many steps, {said}" in text
    assert text.index("| plain, as many steps |") < text.index("| **after the stages** |")
