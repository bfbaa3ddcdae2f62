"""Whoever knows transformers' TrainingArguments is told where a recipe has them."""

import dataclasses
import re

import pytest

from pocl.recipe import RecipeError, build_recipe, known_keys
from pocl.recipe.arguments import DECIDED, place_of_argument


def test_every_field_of_training_arguments_is_answered_with_a_key_or_with_extra() -> None:
    from transformers import TrainingArguments

    keys = {key.rpartition(".")[2] for key in known_keys() if key.startswith("training.")}
    for field in dataclasses.fields(TrainingArguments):
        if field.name not in keys and field.init and not field.name.startswith("_"):
            with pytest.raises(RecipeError, match=r"of TrainingArguments a recipe takes it elsewhere"):
                build_recipe({"student": "a", "training": {field.name: 1}})
            assert place_of_argument(field.name)


def test_the_keys_that_are_named_exist() -> None:
    named = {key for place in DECIDED.values() for key in re.findall(r"\b[a-z_]+\.[a-z_0-9]+", place)} | {"output"}
    assert named <= set(known_keys())


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("--warmup_ratio", "set training.warmup_steps"),
        ("--training.num_train_epochs", "set curriculum.epochs"),
        ("--logging_steps", "set training.log_every"),
        ("--training.dataloader_num_workers", "set training.dataloader_workers"),
        ("--training.optim", "write it as training.extra: {optim: ...}"),
        ("--neftune_noise_alpha", "write it as training.extra: {neftune_noise_alpha: ...}"),
        ("--hub_token", "HF_TOKEN"),
        ("--push_to_hub", "set hub.repository"),
    ],
)
def test_on_the_command_line_too(word: str, answer: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(answer)):
        build_recipe({"student": "a"}, [word, "1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--eval_every often", "training.eval_every: must be `epoch`, or a number .*got 'often'"),
        ("--eval_every 0", "eval_every: must be `epoch`"),
        ("--warmup_steps 1.5", "warmup_steps: must be a number of steps, or a fraction .*got 1.5"),
        ("--warmup_steps -1", "warmup_steps: must be greater than or equal to 0"),
        ("--log_every 0", "log_every: must be greater than 0"),
        ("--dataloader_workers two", "dataloader_workers: must be a valid integer"),
    ],
)
def test_values_out_of_bounds(words: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe({"student": "a"}, words.split())
