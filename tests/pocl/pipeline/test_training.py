"""From a recipe to the curriculum, the divergence and the number of teacher passes."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pocl.pipeline import plan, training
from pocl.pipeline.context import write_parquet
from pocl.pipeline.curricula import curriculum_of, teacher_passes
from pocl.pipeline.steps import build_steps
from pocl.pipeline.training import divergence_of
from pocl.recipe import Recipe, build_recipe
from pocl_kernels import DIVERGENCES, JSD, Alpha, SkewReverseKL


def recipe(*words: str) -> Recipe:
    return build_recipe({"student": {"cut": 2}}, words)


def test_the_default_recipe_is_the_papers_curriculum() -> None:
    stages = curriculum_of(recipe()).stages
    assert [stage.subsets for stage in stages] == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]
    assert [stage.temperature for stage in stages] == pytest.approx([1, 4 / 3, 5 / 3, 2])
    assert [stage.kd_ratio for stage in stages] == pytest.approx([0.7, 0.8, 0.9, 1.0])
    assert {(stage.epochs, stage.learning_rate, stage.skew) for stage in stages} == {(8, 1e-4, None)}
    assert teacher_passes(recipe()) == 20


@pytest.mark.parametrize("kind", ["one_pass", "reversed", "shuffled"])
def test_controls_keep_stages_and_schedules(kind: str) -> None:
    made, paper = curriculum_of(recipe("--curriculum.kind", kind)), curriculum_of(recipe())
    assert made.name == kind
    assert [s.temperature for s in made.stages] == [s.temperature for s in paper.stages]


def test_plain_distillation_makes_as_many_passes_as_the_stages() -> None:
    words = ["--curriculum.kind", "constant", "--curriculum.temperature", "2", "--curriculum.kd_ratio", "1"]
    plain = recipe(*words)
    (stage,) = curriculum_of(plain).stages
    assert (stage.subsets, stage.epochs, stage.temperature) == ((0, 1, 2, 3), 20, 2)
    assert teacher_passes(plain) == teacher_passes(recipe())


def test_the_warm_up_counts_as_teacher_passes() -> None:
    assert teacher_passes(recipe("--warmup.epochs", "2")) == 22


def test_stages_may_count_steps() -> None:
    counted = recipe("--curriculum.max_steps", "[5, 10, 15, 20]", "--training.batch_size", "4")
    assert [stage.max_steps for stage in curriculum_of(counted).stages] == [5, 10, 15, 20]
    assert teacher_passes(counted, 100) == 2
    assert teacher_passes(counted) == math.inf
    words = ["--curriculum.kind", "constant", "--curriculum.temperature", "2", "--curriculum.kd_ratio", "1"]
    plain = recipe(*words, "--curriculum.max_steps", "50")
    assert [stage.max_steps for stage in curriculum_of(plain).stages] == [50]


@pytest.mark.parametrize(
    ("words", "cached"),
    [
        ([], True),
        (["--teacher_cache.mode", "online"], False),
        (["--on_policy.share", "0.5"], False),
        (["--on_policy.share", "0.5", "--teacher_cache.mode", "cached"], True),
        (["--curriculum.epochs", "1", "--curriculum.kind", "one_pass"], False),  # the cache would cost a pass as well
        (["--curriculum.max_steps", "5"], True),  # unknown before the data are read
    ],
)
def test_the_plan_says_how_often_the_teacher_runs_as_the_steps_do(words: list[str], cached: bool) -> None:
    made = recipe(*words, "--source", "missing.jsonl")
    steps = [step.name for step in build_steps(made, content=lambda *_: "")]
    assert ("teacher-cache" in steps) is cached
    assert plan(made).teacher.startswith("runs once" if cached else "runs at every step")


def test_pairs_may_be_spread_in_equal_factors() -> None:
    words = ["--curriculum.spacing", "geometric", "--curriculum.temperature", "[1, 8]", "--curriculum.kd_ratio", "0.5"]
    assert [stage.temperature for stage in curriculum_of(recipe(*words)).stages] == pytest.approx([1, 2, 4, 8])
    with pytest.raises(ValueError, match="needs kd_ratio above 0"):
        recipe(*words[:2], "--curriculum.kd_ratio", "[0, 1]")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--divergence", "jsd", "--beta", "0.9"], JSD(beta=0.9)),
        (["--divergence", "alpha", "--loss.alpha", "0.3"], Alpha(alpha=0.3)),
        (["--divergence", "skew_rkl"], SkewReverseKL()),
    ],
)
def test_divergences_take_their_parameters_from_the_recipe(words: list[str], expected: Any) -> None:
    assert divergence_of(recipe(*words)) == expected


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_every_divergence_can_be_named(name: str) -> None:
    assert type(divergence_of(recipe("--loss.divergence", name))) is DIVERGENCES[name]


def test_the_skew_of_the_stages_goes_to_skewed_divergences_alone() -> None:
    words = ["--curriculum.skew", "[0.1, 0.12]"]
    assert {stage.skew for stage in curriculum_of(recipe(*words)).stages} == {None}
    skewed = curriculum_of(recipe(*words, "--divergence", "skew_fkl")).stages
    assert (skewed[0].skew, skewed[-1].skew) == (0.1, 0.12)


def test_epochs_may_differ_by_stage() -> None:
    stages = curriculum_of(recipe("--curriculum.epochs", "[1, 2, 3, 4]")).stages
    assert [stage.epochs for stage in stages] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("step", "divergence", "choice", "scaled"),
    [
        ("train_curriculum", "fkl", "authors", True),
        ("train_curriculum", "rkl", "authors", False),
        ("train_curriculum", "rkl", "true", True),
        ("train_curriculum", "fkl", "false", False),
        ("warm_up", "rkl", "authors", True),  # the warm-up is a forward KL whatever the stages are
    ],
)
def test_whether_the_temperature_scales_the_loss_reaches_the_trainer(
    step: str, divergence: str, choice: str, scaled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    options: dict[str, Any] = {}

    def stop(*_: Any, **given: Any) -> None:
        options.update(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_trainer", stop)
    write_parquet(Dataset.from_dict({"sample_id": range(4), "subset": range(4)}), tmp_path / "ranking/ranked.parquet")
    context = SimpleNamespace(
        recipe=recipe("--loss.divergence", divergence, "--loss.scale_by_temperature", choice, "--warmup.epochs", "1"),
        path=tmp_path,
        rows=lambda split: Dataset.from_dict({"sample_id": range(4)}),
        load_student=lambda source, **_: None,
        student_source=str,
        warm_student_source=str,
    )
    with pytest.raises(KeyboardInterrupt):
        getattr(training, step)(context)
    assert options["scale_by_temperature"] is scaled


def test_evaluations_by_steps_and_further_keys_reach_every_stage(tmp_path: Path, finished: Path) -> None:
    import json

    from ..conftest import pocl

    words = ["--output", tmp_path / "run", "--warmup.epochs", "0", "--num_test", "0", "--warmup_steps", "2",
             "--log_every", "1", "--dataloader_workers", "1", "--eval_every", "4", "--metric", "loss",
             "--curriculum.epochs", "2", "--training.extra", "{adam_epsilon: 1.0e-6}"]  # fmt: skip
    result = pocl("distill", finished / "recipe.yaml", *words)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "run" / "training" / "log.jsonl").read_text().splitlines()]
    for stage in (0, 1):
        rates = [line["learning_rate"] for line in lines if line.get("stage") == stage and "loss" in line]
        assert len(rates) >= 3
        assert (rates[0], rates[1], rates[2]) == (0, 5e-5, 1e-4)  # two steps to the peak, in each stage anew
    measured = [line["step"] for line in lines if "eval_loss" in line]
    assert measured == [0, 4, 6, 10, 14, 18]  # stages of 6 and 12 steps: the last of each is among them
