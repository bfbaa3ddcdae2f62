"""What would end a run late is said before its long steps."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pocl.pipeline.context import Context
from pocl.pipeline.preflight import check_lengths, check_settings
from pocl.recipe import build_recipe
from pocl.trainer.config import POCLConfig, check_reporters


def rows_of(prompt: int, response: int) -> list[dict[str, Any]]:
    ids = [5] * (prompt + response)
    return [
        {"sample_id": 7, "input_ids": ids[:3], "labels": [-100, 5, 5]},
        {"sample_id": 9, "input_ids": ids, "labels": [-100] * prompt + [5] * response},
    ]


@pytest.fixture
def context(tiny_model_folder: Path, tiny_teacher_folder: Path, tmp_path: Path) -> Any:
    def make(*words: str) -> Context:
        values = {"teacher": str(tiny_teacher_folder), "student": str(tiny_model_folder)}
        return Context(build_recipe(values, words), tmp_path, Console(quiet=True))

    return make


def test_rows_beyond_the_context_are_told_in_the_data_step_with_the_key_to_change(context: Any) -> None:
    run = context()
    with pytest.raises(
        ValueError, match=r"sample 9 of test has 513 tokens.*student.* is 512; set data\.max_length to 512"
    ):
        check_lengths(run, "test", rows_of(500, 13))
    check_lengths(run, "test", rows_of(500, 12))


def test_a_teacher_counts_once_it_has_part_in_the_run(context: Any, make_tiny_folder: Any) -> None:
    run = context("--teacher", str(make_tiny_folder(seed=1, max_position_embeddings=64)))
    check_lengths(run, "train", rows_of(60, 40))  # a ranking may do without it
    run.summaries["models"] = {}
    with pytest.raises(ValueError, match="sample 9 of train has 100 tokens, and the context of the teacher"):
        check_lengths(run, "train", rows_of(60, 40))


def test_sampled_responses_must_fit_behind_the_prompts_that_are_trained_on(context: Any) -> None:
    run = context("--on_policy.share", "0.5", "--on_policy.max_new_tokens", "100")
    with pytest.raises(ValueError, match=r"on_policy\.max_new_tokens = 100: the prompt of sample 9 .*lower it to 92"):
        check_lengths(run, "train", rows_of(420, 5))
    check_lengths(run, "validation", rows_of(420, 5))
    check_lengths(run, "train", rows_of(412, 5))


def test_settings_of_training_are_checked_only_where_training_is_to_come(context: Any) -> None:
    recipe = context("--report_to", "tensorbord").recipe
    check_settings(recipe, ["ranking", "evaluation"])
    for step in ("warm-up", "training"):
        with pytest.raises(ValueError, match=r"training\.report_to: .*'tensorbord'; did you mean tensorboard\?"):
            check_settings(recipe, ["ranking", step])
    with pytest.raises(ValueError, match="student.dtype is float16"):
        check_settings(context("--student.dtype", "float16").recipe, ["training"])
    check_settings(context().recipe, ["training"])


def test_a_reporter_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    def missing() -> None:
        raise RuntimeError("requires x to be installed")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", missing)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["wandb"])
    with pytest.raises(ValueError, match="mlflow needs a package that is not installed: pip install mlflow"):
        check_reporters(["wandb", "mlflow"])
    for names in (None, "none", "all", [], "wandb"):
        check_reporters(names)
    with pytest.raises(ValueError, match="no reporter 'sheet'; known are none, all, "):
        POCLConfig(report_to="sheet")


def test_half_precision_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ValueError, match="fp16=True needs a GPU, and there is none here; set bf16=True"):
        POCLConfig(fp16=True)
