"""The control of a curriculum: plain distillation for as many steps, whatever the stages are."""

from typing import Any

import pytest

from pocl.pipeline.curricula import control_recipe, curriculum_of
from pocl.recipe import build_recipe


@pytest.mark.parametrize(
    "curriculum",
    [
        {},
        {"num_stages": 3, "epochs": [1, 2, 1], "skew": [0.1, 0.3]},
        {"num_stages": 2, "max_steps": [7, 5], "learning_rate": [1e-4, 3e-4]},
        {"kind": "one_pass", "patience": 2},
    ],
)
def test_a_control_makes_the_steps_of_all_stages_at_their_mean_ratio(curriculum: dict[str, Any]) -> None:
    recipe = build_recipe(
        {
            "teacher": "t",
            "student": "s",
            "curriculum": {**curriculum, "control": True},
            "loss": {"divergence": "skew_rkl"},
            "ranking": {"refresh": "stage"},
        }
    )
    count = recipe.curriculum.num_stages
    subsets = [i % count for i in range(41)]
    staged = curriculum_of(recipe, subsets, 4)
    steps = staged.stage_steps(subsets, 4)
    control = control_recipe(recipe, steps)
    plain = curriculum_of(control, subsets, 4)
    assert list(plain.stage_steps(subsets, 4)) == [sum(steps)]
    (stage,) = plain.stages
    for name in ("kd_ratio", "skew", "learning_rate"):
        mean = sum(n * getattr(s, name) for s, n in zip(staged.stages, steps, strict=True)) / sum(steps)
        assert getattr(stage, name) == pytest.approx(mean, abs=1e-6)
    assert stage.temperature == staged.stages[0].temperature
    assert stage.subsets == tuple(range(count))
    assert not control.curriculum.control
    assert control.ranking.refresh == "never"
