"""The guess of how long training may take."""

from pathlib import Path
from typing import Any

import pytest

from pocl.embedded import cut_layers
from pocl.pipeline import guess
from pocl.recipe import Recipe, build_recipe


def recipe(teacher: Path | str, **sections: Any) -> Recipe:
    return build_recipe(
        {"teacher": str(teacher), "student": {"cut": 2}, "data": {"max_length": 100, "max_prompt_length": 50}}
        | sections
    )


def test_parameters_are_counted_by_configurations_alone(
    tiny_teacher_folder: Path, tiny_model_folder: Path, make_tiny_model: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_teacher_folder / "config.json").read_bytes())
    teacher = make_tiny_model(seed=1, hidden_size=48, num_layers=3)
    made = recipe(tmp_path)
    assert guess.num_parameters(made, student=False) == teacher.num_parameters()
    assert guess.num_parameters(made, student=True) == cut_layers(teacher, 2).num_parameters()
    own = recipe(tmp_path, student=str(tiny_model_folder))
    assert guess.num_parameters(own, student=True) == make_tiny_model().num_parameters()


def test_a_step_costs_the_flops_of_its_tokens(tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guess, "flops_per_second", lambda recipe: 1e9)
    made = recipe(tiny_teacher_folder, training={"batch_size": 3, "gradient_accumulation_steps": 2})
    student, teacher = (guess.num_parameters(made, student=student) for student in (True, False))
    assert student is not None
    assert teacher is not None
    texts = ["a" * 40, "a" * 80, "a" * 9999]  # 10, 20 and, cut, 100 tokens
    tokens = 6 * (10 + 20 + 100) / 3
    cached, online = (guess.seconds_per_step(made, texts, cached=cached) for cached in (True, False))
    assert cached == pytest.approx(tokens * 6 * student / 0.5e9)
    assert online == pytest.approx(tokens * (6 * student + 2 * teacher) / 0.5e9)


def test_no_guess_is_made_without_sizes_or_texts(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    assert guess.seconds_per_step(recipe(tmp_path), ["text"], cached=True) is None
    assert guess.seconds_per_step(recipe(tiny_teacher_folder), [], cached=True) is None


def test_the_speed_of_this_machine_is_measured(tiny_teacher_folder: Path) -> None:
    assert 1e6 < guess.flops_per_second(recipe(tiny_teacher_folder), size=64) < 1e16
