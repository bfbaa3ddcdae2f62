"""The student's card begins with what the hub reads: origin, data, license, measures with their intervals."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from pocl.digests import content_fingerprint
from pocl.pipeline import run
from pocl.pipeline.card import CARD, renew_card, write_card, write_merged_card
from pocl.pipeline.engine import Step
from pocl.recipe import Recipe, load_recipe
from pocl.run_folder import MANIFEST

from ..conftest import pocl


def front(card: Path) -> dict[str, Any]:
    """The front matter, as the hub's own library accepts it."""
    return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=False).data.to_dict()


def changed(recipe: Recipe, **sections: Any) -> Recipe:
    for section, values in sections.items():
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
    return recipe


def renewed(run: Path, **sections: Any) -> dict[str, Any]:
    renew_card(changed(load_recipe(run / "recipe.yaml"), **sections), run)
    return front(run / CARD)


def written(folder: Path, recipe: Path, **sections: Any) -> dict[str, Any]:
    write_card(changed(load_recipe(recipe), **sections), folder, "")
    return front(folder / "README.md")


def models_untouched(before: dict[str, Any], run: Path) -> None:
    """Every step but the report is as it was."""
    assert pocl("distill", run).exit_code == 0
    after = json.loads((run / MANIFEST).read_text())["steps"]
    for name in set(before) - {"report"}:
        assert after[name]["finished_at"] == before[name]["finished_at"], name
        assert after[name]["seconds"] == before[name]["seconds"], name


def test_a_finished_run_has_a_card_with_its_measures(finished: Path) -> None:
    run = finished / "run"
    data = front(run / CARD)
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["knowledge-distillation", "pocl"]
    assert not {"base_model", "license", "datasets"} & set(data)  # local folders have no name
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"name": "pairs.jsonl", "type": "unlisted pairs.jsonl", "split": "test"}
    metrics = {metric["type"]: metric for metric in result["metrics"]}
    measured = json.loads((run / "evaluation" / "student-final.json").read_text())
    assert set(metrics) == {"rouge", "exact_match", "cross_entropy", "kl_divergence"}
    assert metrics["cross_entropy"]["value"] == pytest.approx(measured["cross_entropy"], abs=1e-4)
    assert metrics["rouge"]["value"] == pytest.approx(100 * measured["rouge_l"], abs=1e-4)
    low, high = metrics["cross_entropy"]["args"]["interval_95"]
    assert low < measured["cross_entropy"] < high
    assert metrics["cross_entropy"]["name"].endswith(f"(95 % of 6 samples: {low:.4g} to {high:.4g})")
    text = (run / CARD).read_text()
    assert text.count("\n---\n") == 1
    assert "## Distillation" in text
    assert yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])["student"] == {"cut": 2}
    assert str(finished) not in text  # what others read tells nothing of this machine


def test_a_started_again_run_does_nothing(copied_run: Path) -> None:
    before = (copied_run / MANIFEST).read_bytes()
    result = pocl("distill", copied_run)
    assert result.exit_code == 0
    assert result.output.count("done before") == len(json.loads(before)["steps"])
    assert (copied_run / MANIFEST).read_bytes() == before


def test_writing_it_again_changes_nothing_but_what_was_measured(copied_run: Path) -> None:
    before = (copied_run / CARD).read_text()
    renewed(copied_run)
    assert (copied_run / CARD).read_text() == before
    (copied_run / "evaluation" / "student-final.json").unlink()
    assert "model-index" not in renewed(copied_run)
    assert (copied_run / CARD).read_text().partition("\n---\n")[2] == before.partition("\n---\n")[2]


def test_a_kill_between_card_and_record_redoes_no_other_step(copied_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException): ...

    def dies(path: Path) -> Path:
        raise Killed

    steps = json.loads((copied_run / MANIFEST).read_text())["steps"]
    monkeypatch.setattr("pocl.report.write_report", dies)
    monkeypatch.setattr("pocl.run_folder.RunFolder.pause", lambda *_, **__: None)  # which a kill leaves out
    (copied_run / CARD).write_text((copied_run / CARD).read_text() + "\nA word of mine.\n")
    with pytest.raises(Killed):
        run(load_recipe(copied_run))
    monkeypatch.undo()
    models_untouched(steps, copied_run)
    assert "A word of mine." in (copied_run / CARD).read_text()
    test_a_started_again_run_does_nothing(copied_run)


def test_a_card_that_training_has_recorded_is_taken_over_before_it_is_written(copied_run: Path) -> None:
    manifest = json.loads((copied_run / MANIFEST).read_text())
    steps = manifest["steps"]  # as a run that was killed before its report, or an older release, left them
    steps["training"]["files"][CARD] = steps.pop("report")["files"][CARD]
    (copied_run / MANIFEST).write_text(json.dumps(manifest))
    (copied_run / "evaluation" / "student-final.json").unlink()  # the card will change with the measures
    models_untouched({name: step for name, step in steps.items() if name != "evaluation"}, copied_run)
    test_a_started_again_run_does_nothing(copied_run)


def test_the_report_and_an_evaluation_write_it_again(copied_run: Path, tmp_path: Path) -> None:
    steps = json.loads((copied_run / MANIFEST).read_text())["steps"]
    (copied_run / CARD).write_text("---\nlicense: mit\nlanguage: en\n---\n# Mine\n")
    assert pocl("report", copied_run).exit_code == 0
    data = front(copied_run / CARD)
    assert (data["license"], data["language"]) == ("mit", "en")
    assert (copied_run / CARD).read_text().endswith("---\n# Mine\n")
    (tmp_path / "more.jsonl").write_text('{"prompt": "w4 w5", "response": "w6 w7"}\n' * 3)
    assert pocl("evaluate", copied_run, "--data", tmp_path / "more.jsonl", "--models", "student").exit_code == 0
    names = [each["dataset"]["name"] for each in front(copied_run / CARD)["model-index"][0]["results"]]
    assert names == ["pairs.jsonl", "more.jsonl"]
    models_untouched(steps, copied_run)


@pytest.mark.parametrize(
    "there", ["", "---\n: [\n---\n# Mine\n", "---\n- 3\n---\n# Mine\n", "# Mine\n", "---\r\na: 1\r\n---\r\n"]
)
def test_a_card_of_any_kind_gets_front_matter_that_can_be_read(there: str, copied_run: Path) -> None:
    (copied_run / CARD).write_text(there, newline="")
    assert renewed(copied_run)["pipeline_tag"] == "text-generation"
    assert ("# Mine" in (copied_run / CARD).read_text()) == ("# Mine" in there)
    (copied_run / CARD).unlink()
    renewed(copied_run)
    assert "# tiny" in (copied_run / CARD).read_text()


def test_names_of_the_hub_are_told_and_a_license_is_never_guessed(recipe: Path, tmp_path: Path) -> None:
    def made(**sections: Any) -> dict[str, Any]:
        return written(tmp_path, recipe, **sections)

    data = made(student={"model": "org/small"}, data={"source": "org/pairs"})
    assert (data["base_model"], data["datasets"]) == ("org/small", ["org/pairs"])
    assert "license" not in data
    assert made(student={"model": "gpt2"})["base_model"] == "gpt2"
    data = made(teacher={"model": "embedded"}, data={"source": "data/pairs.jsonl"})
    assert (data["base_model"], data["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert "datasets" not in data
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: org/first\n---\n# A model\n")
    data = made(student={"model": str(base)})
    assert (data["base_model"], data["license"]) == ("org/first", "mit")
    assert "license" not in made(teacher={"model": "embedded"}, student={"model": str(base)})  # mit and apache-2.0
    for broken in ("---\n: [\n---\n", "---\nlicense: [mit, 3]\nbase_model: /home/me/model\n---\n", "no front matter"):
        (base / "README.md").write_text(broken)
        assert not {"license", "base_model"} & set(made(student={"model": str(base)}))


def test_a_merged_adapter_is_an_ordinary_model(tmp_path: Path) -> None:
    source, target = tmp_path / "adapter", tmp_path / "merged"
    source.mkdir()
    write_merged_card(source, target)
    assert not target.exists()
    given = {"base_model": "org/a", "library_name": "peft", "license": "mit", "tags": ["pocl", "base_model:x", "lora"]}
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(given)}---\n# Mine\n")
    write_merged_card(source, target)
    assert front(target / "README.md") == {**given, "library_name": "transformers", "tags": ["pocl"]}
    (source / "README.md").write_text(f"---\n{yaml.safe_dump({**given, 'base_model': '/home/me/a'})}---\n# Mine\n")
    write_merged_card(source, target)
    assert "base_model" not in front(target / "README.md")


def test_a_card_is_no_part_of_a_models_content(copied_run: Path) -> None:
    folder = copied_run / "student"
    mark = content_fingerprint(folder)
    (folder / "README.md").write_text("another")
    assert content_fingerprint(folder) == mark
    (folder / "config.json").write_text("{}")
    assert content_fingerprint(folder) != mark


def test_only_the_report_renews_what_another_step_wrote(finished: Path) -> None:
    from pocl.pipeline.steps import build_steps

    steps: list[Step] = build_steps(load_recipe(finished / "run"), content=lambda *_: "")
    assert {step.name: list(step.renews) for step in steps if step.renews} == {"report": [CARD]}
