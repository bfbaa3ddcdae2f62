"""What a saved student says of itself."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from pocl.trainer.weights import name_ends

CASES = [(2, [2, 7], [2, 7]), (None, [7], 7), ([7, 2], [2, 7], [7, 2])]


@pytest.mark.parametrize(("before", "ends", "after"), CASES)
def test_a_saved_student_names_all_ends_of_an_answer(
    before: object, ends: list[int], after: object, tmp_path: Path
) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": before, "temperature": 0.6}))  # which nobody samples with
    name_ends(tmp_path, ends)
    assert json.loads(file.read_text()) == {"eos_token_id": after, "temperature": 0.6}


def test_a_student_without_a_generation_config_gets_one(tmp_path: Path) -> None:
    name_ends(tmp_path, [2, 7])
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 7]
