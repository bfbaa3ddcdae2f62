"""Two runs side by side: what differs, and only such differences as the questions can show."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pocl.pipeline.context import write_parquet
from pocl.report import write_report
from pocl.report.comparison import write_comparison

QUESTIONS = 40


def run(folder: Path, kl: float, noise: float, **recipe: Any) -> Path:
    """A run of one model whose KL is `kl` on average, and `noise` more or less on every other question."""
    (folder / "evaluation").mkdir(parents=True)
    (folder / "training").mkdir()
    (folder / "recipe.yaml").write_text(json.dumps({"name": folder.name, "seed": 1, **recipe}))
    (folder / "manifest.json").write_text(json.dumps({"steps": {}}))
    each = [kl + noise * (-1) ** i for i in range(QUESTIONS)]
    of_each = {"kl_to_teacher": each, "cross_entropy": each, "num_tokens": [4] * QUESTIONS}
    for key, more in (("student-initial", 0.02 * kl), ("student-final", 0.0)):
        measured = {name: [v + more for v in of_each[name]] for name in ("kl_to_teacher", "cross_entropy")}
        means = {name: sum(values) / QUESTIONS for name, values in measured.items()}
        result = {**means, "num_samples": QUESTIONS, "of_each": {**of_each, **measured}, "responses": []}
        (folder / "evaluation" / f"{key}.json").write_text(json.dumps(result))
    test = {"id": [0, 1], "prompt": ["a", "b"], "response": ["c", "d"]}
    write_parquet(Dataset.from_dict(test), folder / "data" / "test.parquet")
    log = [{"step": s, "stage": 0, "eval_cross_entropy": 3.0 - s, "eval_kl_to_teacher": kl} for s in (0, 1)]
    (folder / "training" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def test_settings_results_and_paired_differences_stand_side_by_side(tmp_path: Path) -> None:
    one = run(tmp_path / "one", 2.0, 0.3, loss={"divergence": "fkl"})
    other = run(tmp_path / "other", 1.5, 0.3, loss={"divergence": "rkl"})
    page = write_comparison(one, other)
    assert page == one / "report" / "compare-other" / "index.html"
    text = (page.parent / "comparison.md").read_text()
    assert "| loss.divergence | fkl | rkl |" in text
    assert "| seed |" not in text
    assert "| KL to teacher | -0.5000 | -0.5000 to -0.5000 | yes |" in text
    assert (page.parent / "validation.png").stat().st_size > 5_000


def test_a_difference_within_the_noise_is_not_called_one(tmp_path: Path) -> None:
    one, other = run(tmp_path / "one", 2.0, 0.0), run(tmp_path / "other", 1.999, 0.5)
    text = (write_comparison(one, other).parent / "comparison.md").read_text()
    assert text.count("no difference that so many questions could show") == 2


def test_other_questions_do_not_compare(tmp_path: Path) -> None:
    one, other = run(tmp_path / "one", 2.0, 0.0), run(tmp_path / "other", 1.0, 0.0)
    test = {"id": [0], "prompt": ["another"], "response": ["c"]}
    write_parquet(Dataset.from_dict(test), other / "data" / "test.parquet")
    assert "do not compare" in (write_comparison(one, other).parent / "comparison.md").read_text()


def test_a_run_is_not_compared_with_itself_or_with_nothing(tmp_path: Path) -> None:
    one = run(tmp_path / "one", 2.0, 0.0)
    with pytest.raises(ValueError, match="compared with itself"):
        write_comparison(one, tmp_path / "one")
    with pytest.raises(ValueError, match="not the folder of a run"):
        write_comparison(one, tmp_path)


@pytest.mark.parametrize(
    ("noise", "headline"),
    [
        (0.0, "from 2.040 to 2.000 nats per token: closer."),
        (None, "from 2.040 to 2.000 nats per token: no difference that so many samples could show."),
    ],
)
def test_the_headline_claims_no_more_than_the_samples_tell(tmp_path: Path, noise: float | None, headline: str) -> None:
    folder = run(tmp_path / "one", 2.0, 0.1)
    if noise is None:  # the samples moved to and fro, a little more of them down than up
        file = folder / "evaluation" / "student-final.json"
        result = json.loads(file.read_text())
        result["of_each"]["kl_to_teacher"] = [2.04 - 0.04 + (-1) ** i * 1.5 for i in range(QUESTIONS)]
        file.write_text(json.dumps(result))
    write_report(folder)
    assert headline in (folder / "report" / "report.md").read_text()
    shutil.rmtree(folder)
