"""What is said of a model before its weights are loaded."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from pocl.embedded import cut_layers, drop_layers
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


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_by_the_files_without_a_models_code(
    tied: bool, make_tiny_model: Any, make_tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"num_layers": 3, "tie_word_embeddings": tied}
    folder, teacher = make_tiny_folder(**options), make_tiny_model(**options)
    if tied:  # a file may hold both names of a tied weight
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, folder / "model.safetensors")
    monkeypatch.setattr(guess, "skeleton", lambda *_, **__: pytest.fail("a model was made"))
    assert guess.num_parameters(recipe(folder), student=False) == teacher.num_parameters()
    assert guess.num_parameters(recipe(folder), student=True) == cut_layers(teacher, 2).num_parameters()
    made = recipe(folder, student={"drop": [1]})
    assert guess.num_parameters(made, student=True) == drop_layers(teacher, [1]).num_parameters()
    assert guess.num_parameters(recipe(folder, student=str(folder)), student=True) == teacher.num_parameters()


def test_nothing_is_said_of_what_is_not_here(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    assert guess.num_parameters(made, student=True) is None
    assert guess.configuration_of(made, student=False) is None


def test_files_that_do_not_fit_the_configuration_are_not_believed(make_tiny_model: Any, make_tiny_folder: Any) -> None:
    folder = make_tiny_folder(num_layers=3)
    weights = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in weights.items() if ".2." not in name}, folder / "model.safetensors")
    assert guess.num_parameters(recipe(folder), student=False) == make_tiny_model(num_layers=3).num_parameters()
