"""What a recipe's stages are, and what is said of them where they did harm."""

from typing import Any

import pytest

from pocl.pipeline.curricula import advice_on_stages
from pocl.recipe import build_recipe


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({}, True),
        ({"loss": {"divergence": "jsd"}}, True),
        ({"loss": {"divergence": "rkl"}}, False),  # ended level in every arm
        ({"curriculum": {"temperature": 1.0}}, False),
        ({"curriculum": {"kd_ratio": 0.9}}, False),
        ({"curriculum": {"temperature": [2.0, 1.0]}}, False),
        ({"curriculum": {"kind": "constant", "temperature": 1.0, "kd_ratio": 1.0}}, False),
    ],
)
def test_rising_temperature_and_ratio_are_advised_against_where_they_harmed(
    sections: dict[str, Any], told: bool
) -> None:
    said = advice_on_stages(build_recipe({"teacher": "t", "student": "s", **sections}))
    assert (said is not None) == told
    if said:
        assert "docs/evidence.md" in said
        assert "pocl compare" in said
