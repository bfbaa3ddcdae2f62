"""Reading recipes: shorthand, overrides, and errors that say what to write instead."""

from pathlib import Path

import pytest
import yaml

from pocl.recipe import Recipe, RecipeError, build_recipe, describe_keys, known_keys, load_recipe
from pocl.recipe.reader import parse_overrides

MINIMAL = {"student": {"cut": 2}}
SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_defaults_are_those_of_the_paper() -> None:
    recipe = build_recipe(MINIMAL)
    assert (recipe.curriculum.num_stages, recipe.curriculum.epochs) == (4, (8,))
    assert (recipe.curriculum.temperature, recipe.curriculum.kd_ratio) == ((1.0, 2.0), (0.7, 1.0))
    assert (recipe.ranking.k, recipe.ranking.no_repeat_ngram_size) == (60, 6)
    assert (recipe.data.max_length, recipe.data.max_prompt_length, recipe.seed) == (512, 256, 10)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes_are_valid_and_found_by_name(file: Path) -> None:
    assert load_recipe(file.stem) == load_recipe(file)


def test_a_plain_string_stands_for_the_main_key_of_its_section() -> None:
    recipe = build_recipe({"teacher": "big", "student": "small", "data": "pairs.jsonl"})
    assert (recipe.teacher.model, recipe.student.model, recipe.data.source) == ("big", "small", "pairs.jsonl")


def test_yaml_round_trip_gives_an_equal_recipe() -> None:
    recipe = build_recipe(MINIMAL, ["--curriculum.temperature", "[1, 3]", "--seed", "3"])
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


def test_overrides_reach_sections_top_level_and_unambiguous_names() -> None:
    words = ["--seed", "3", "--training.batch-size=4", "--num_stages", "2", "--teacher", "big"]
    assert parse_overrides(words) == {
        "seed": 3,
        "training.batch_size": 4,
        "curriculum.num_stages": 2,
        "teacher.model": "big",
    }
    recipe = build_recipe({"teacher": "small", **MINIMAL}, words)
    assert (recipe.seed, recipe.training.batch_size, recipe.teacher.model) == (3, 4, "big")


def test_criteria_are_names_or_say_direction_and_weight() -> None:
    assert repr(build_recipe(MINIMAL).ranking.criteria) == "(rouge_l, cross_entropy)"
    words = ["--criteria", "[response_length, {measure: kl_to_teacher, direction: descending, weight: 2}]"]
    recipe = build_recipe(MINIMAL, words)
    assert repr(recipe.ranking.criteria) == "(response_length, kl_to_teacher (descending, weight 2))"
    assert (recipe.ranking.needs_answers, recipe.ranking.needs_teacher) == (False, True)
    assert build_recipe(MINIMAL, ["--criteria", "rouge_l"]).ranking.needs_answers


def test_naming_a_student_replaces_the_cut_and_the_reverse() -> None:
    assert build_recipe(MINIMAL, ["--student.model", "own"]).student.cut is None
    assert build_recipe({"student": "own"}, ["--student.cut", "3"]).student.model is None
    assert build_recipe(MINIMAL, ["--student.drop", "2-3"]).student.cut is None
    assert build_recipe({"student": {"drop": 3}}, ["--student.cut", "3"]).student.drop is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.batch_sise", "3"], "unknown key training.batch_sise; did you mean training.batch_size?"),
        (["--tempereture", "3"], r"unknown key tempereture; did you mean \w+.temperature"),
        (["--temperature", "3"], "ambiguous: write one of --warmup.temperature"),
        (["--training", "3"], "is a section; set one of its keys: training.batch_size"),
        (["--seed"], "--seed has no value"),
        (["seed", "3"], "unexpected argument 'seed'"),
        (["--curriculum.temperature", "0"], "curriculum.temperature.0: must be greater than 0, got 0"),
        (["--curriculum.kd_ratio", "[0.5, 1.5]"], "curriculum.kd_ratio.1: must be less than or equal to 1, got 1.5"),
        (["--curriculum.skew", "1"], "curriculum.skew.0: must be less than 1, got 1"),
        (["--curriculum.temperature", "[1, 2, 3]"], "temperature must have 1 or 2 or 4 numbers with 4 stages, got 3"),
        (["--curriculum.epochs", "[1, 2]"], "epochs must have 1 or 4 numbers with 4 stages, got 2"),
        (["--curriculum.kind", "constant"], "single stage: give temperature as one number"),
        (
            [f"--curriculum.{word}" for word in ("kind=constant", "temperature=1", "kd_ratio=1", "control=true")],
            "curriculum: control: kind = 'constant' is plain distillation itself; leave control out",
        ),
        (["--curriculum.kind", "baby"], "curriculum.kind: must be 'baby_step', 'constant'"),
        (["--data.num_train", "3"], "data.num_train = 3 samples cannot fill curriculum.num_stages = 4"),
        (["--data.max_length", "100"], "max_prompt_length must be below max_length = 100, got 256"),
        (["--data.num_validation", "0"], "need validation samples"),
        (["--ranking.criteria", "[perplexity]"], r"ranking.criteria.0.measure: must be 'rouge_l', 'cross_entropy'"),
        (["--ranking.criteria", "[rouge_l, rouge_l]"], "criteria name a measure twice: rouge_l, rouge_l"),
        (["--ranking.criteria", "[]"], "ranking.criteria: "),
        (["--ranking.criteria", "{measure: rouge_l, weight: 0}"], "ranking.criteria.0.weight: must be greater than 0"),
    ],
)
def test_bad_settings_say_what_is_wrong_and_what_is_allowed(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe(MINIMAL, words)


def test_all_problems_of_a_recipe_are_told_at_once() -> None:
    values = {"student": {"model": "a", "cut": 2}, "trainin": {}, "data": {"num_test": -1}}
    with pytest.raises(RecipeError) as error:
        build_recipe(values, origin="mine.yaml")
    text = str(error.value)
    assert "mine.yaml: 3 problem(s)" in text
    assert "trainin: unknown key; did you mean training?" in text
    assert "student: name one of `model`" in text
    assert "data.num_test: must be greater than or equal to 0, got -1" in text


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe at nowhere; shipped recipes are: .*quickstart"):
        load_recipe("nowhere")
    file = tmp_path / "list.yaml"
    file.write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match="expected `key: value` lines, got list"):
        load_recipe(file)
    file.write_text("a: [1\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(file)


def test_every_key_is_described() -> None:
    rows = describe_keys()
    assert [key for key, _, _ in rows] == known_keys()
    assert all(meaning for _, _, meaning in rows)
    meanings = {key: meaning for key, _, meaning in rows}
    assert meanings["curriculum.optimizer"].startswith("One of fresh, carried. ")
    assert meanings["teacher_cache.dtype"].startswith("One of float32, bfloat16, float16. ")


@pytest.mark.parametrize(
    ("given", "layers"),
    [("10-12", (10, 11, 12)), ("7, 2-3", (2, 3, 7)), (4, (4,)), ([9, "1-2"], (1, 2, 9)), ((5, 6), (5, 6))],
)
def test_layers_to_drop_are_numbers_ranges_and_lists_of_both(given: object, layers: tuple[int, ...]) -> None:
    made = build_recipe({"student": {"drop": given}})
    assert made.student.drop == layers
    assert build_recipe(yaml.safe_load(made.to_yaml())) == made


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("19-10", "'19-10' is no layer and no range of layers; write 12, 10-19"),
        ("middle", "'middle' is no layer"),
        (-1, "'-1' is no layer"),
        ("3,1-4", "layer 3 is named twice"),
        ([], "at least 1 item"),
        (True, "student.drop"),
    ],
)
def test_layers_that_cannot_be_dropped_are_refused_in_words(given: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe({"student": {"drop": given}})


def test_a_student_has_one_source() -> None:
    with pytest.raises(RecipeError, match="name one of `model`.*`cut`.*`drop`"):
        build_recipe({"student": {"drop": 3, "cut": 4}})
