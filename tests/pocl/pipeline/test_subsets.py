"""What the stages train on: the ranking, drawn by a seed, measured again; and teachers and students made on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pocl.digests import content_fingerprint
from pocl.embedded import cache_folder
from pocl.pipeline import made, run
from pocl.pipeline.context import Context, read_parquet, source_fingerprint
from pocl.pipeline.curricula import curriculum_of
from pocl.pipeline.subsets import drawn_rows, stored_subsets
from pocl.recipe import Recipe, build_recipe


@pytest.fixture
def recipe_of(
    tmp_path: Path, tiny_model_folder: Path, tiny_teacher_folder: Path, tiny_pairs: list[dict[str, str]]
) -> Callable[..., Recipe]:
    """A factory: a small recipe with command-line overrides."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs))
    values = {
        "student": str(tiny_model_folder),
        "teacher": str(tiny_teacher_folder),
        "output": str(tmp_path / "run"),
        "data": {
            "source": str(data),
            "num_validation": 6,
            "num_test": 0,
            "template": "plain",
            "max_length": 64,
            "max_prompt_length": 32,
        },
        "ranking": {"max_new_tokens": 4},
        "curriculum": {"num_stages": 2, "epochs": 1, "start": "last", "learning_rate": 1e-2},
        "training": {"batch_size": 8, "metric": "loss"},
    }
    return lambda *words: build_recipe(values, words)


@pytest.mark.parametrize("kind", ["constant", "one_pass", "reversed", "shuffled", "whole"])
@pytest.mark.parametrize("count", [9, 40, 83])
def test_every_control_makes_as_many_optimizer_steps_as_the_curriculum(
    recipe_of: Callable[..., Recipe], kind: str, count: int
) -> None:
    subsets = [min(i // (count // 4), 3) for i in range(count)]
    words = ["--num_stages", "4", "--curriculum.epochs", "3"]
    paper = curriculum_of(recipe_of(*words), subsets, 8).stage_steps(subsets, 8)
    plain = ["--curriculum.temperature", "1", "--curriculum.kd_ratio", "1"]
    control = curriculum_of(recipe_of(*words, *plain, "--curriculum.kind", kind), subsets, 8)
    steps = control.stage_steps(subsets, 8)
    assert steps == paper if len(steps) > 1 else steps == (sum(paper),)


def test_the_seed_of_the_stages_draws_the_samples_and_leaves_the_steps_before_alone(
    recipe_of: Callable[..., Recipe],
) -> None:
    base = recipe_of("--draw", "20", "--training.seed", "1")
    path = run(base, until="ranking", console=Console(quiet=True))
    other = recipe_of("--draw", "20", "--training.seed", "2")
    before = (path / "ranking" / "ranked.parquet").stat().st_mtime_ns
    run(other, until="ranking", change=True, console=Console(quiet=True))
    assert (path / "ranking" / "ranked.parquet").stat().st_mtime_ns == before
    chosen = {}
    for made_of in (base, other, recipe_of()):
        context = Context(made_of, path, Console(quiet=True))
        rows = drawn_rows(context)
        chosen[made_of.training.seed] = list(rows["sample_id"])
        subsets = stored_subsets(context, rows)
        assert sorted(subsets) == [0] * (len(rows) // 2) + [1] * (len(rows) // 2)
    assert len(chosen[1]) == len(chosen[2]) == 20
    assert chosen[1] != chosen[2]
    assert len(chosen[None]) == 42
    with pytest.raises(ValueError, match=r"training.draw = 43, but there are 42 training samples"):
        drawn_rows(Context(recipe_of("--draw", "43"), path, Console(quiet=True)))


def test_difficulty_is_measured_again_with_the_student_of_each_stage(recipe_of: Callable[..., Recipe]) -> None:
    path = run(
        recipe_of("--refresh", "stage", "--curriculum.epochs", "2"), until="training", console=Console(quiet=True)
    )
    first = read_parquet(path / "ranking" / "scores.parquet")
    second = read_parquet(path / "training" / "ranking-1" / "scores.parquet")
    assert second["sample_id"][:] == first["sample_id"][:]
    assert sum(second["cross_entropy"]) < 0.95 * sum(first["cross_entropy"])  # it has learned in between


def test_the_teacher_learns_the_data_first_where_the_recipe_says_so(recipe_of: Callable[..., Recipe]) -> None:
    words = ["--adapt_epochs", "2", "--adapt_learning_rate", "0.01", "--teacher_cache.mode", "cached"]
    path = run(recipe_of(*words), until="teacher-cache", console=Console(quiet=True))
    steps = json.loads((path / "manifest.json").read_text())["steps"]
    assert list(steps) == ["models", "data", "adaptation", "teacher-cache"]
    log = [json.loads(line) for line in (path / "adapted-teacher" / "log.jsonl").read_text().splitlines()]
    losses = [line["cross_entropy"] for line in log if "cross_entropy" in line]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    context = Context(recipe_of(*words), path, Console(quiet=True))
    assert context.teacher_source() == str(path / "adapted-teacher" / "teacher")
    assert content_fingerprint(Path(context.teacher_source())) != content_fingerprint(
        Path(context.base_teacher_source())
    )


def test_a_student_of_another_recipe_is_made_once_and_known_before(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "small.yaml"
    file.write_text(recipe_of("--num_stages", "1").to_yaml())
    taker = recipe_of("--student", f"recipe:{file}")
    mark = source_fingerprint(f"recipe:{file}")
    folder = made.folder_of(f"recipe:{file}")
    assert folder is not None
    assert folder.parent.parent == cache_folder() / "students"
    told: list[str] = []
    for _ in range(2):
        made.make_models(taker, told.append)
    assert len(told) == 1
    assert (folder / "model.safetensors").is_file()
    assert source_fingerprint(f"recipe:{file}") == mark
    context = Context(taker, tmp_path / "run", Console(quiet=True))
    assert context.student_source() == str(folder)
    file.write_text(recipe_of("--num_stages", "1", "--seed", "3").to_yaml())
    assert source_fingerprint(f"recipe:{file}") != mark


def test_a_recipe_whose_student_another_recipe_makes_cannot_be_taken(
    recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    file = tmp_path / "nested.yaml"
    file.write_text(recipe_of("--student", "recipe:quickstart").to_yaml())
    with pytest.raises(ValueError, match="cannot ask for one that another recipe makes"):
        made.recipe_of(f"recipe:{file}")
    with pytest.raises(ValueError, match="no recipe at nothing"):
        made.recipe_of("recipe:nothing")
