"""The JSON schema of recipes takes what the models take, and names every key."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl.recipe import build_recipe, known_keys, recipe_schema

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
BOUNDS = {
    "minimum": lambda a, b: a >= b,
    "maximum": lambda a, b: a <= b,
    "exclusiveMinimum": lambda a, b: a > b,
    "exclusiveMaximum": lambda a, b: a < b,
}
TEXT = {"title", "description", "default", "$schema", "$defs", "required", "additionalProperties", "prefixItems"}


def takes(schema: dict[str, Any], value: Any, whole: dict[str, Any]) -> bool:
    """As much of JSON schema as this one uses; a word that is not known fails."""
    if "$ref" in schema:
        return takes(whole["$defs"][schema["$ref"].rpartition("/")[2]], value, whole)
    if "anyOf" in schema and not any(takes(part, value, whole) for part in schema["anyOf"]):
        return False
    kind = schema.get("type")
    if kind == "null":
        return value is None
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        return False
    if kind == "array":
        items = schema.get("items", {})
        return len(value) >= schema.get("minItems", 0) and all(takes(items, part, whole) for part in value)
    if kind == "object":
        known = schema.get("properties", {})
        more = schema.get("additionalProperties", True)
        return set(schema.get("required", ())) <= set(value) and all(
            takes(known[key], part, whole) if key in known else (more if isinstance(more, bool) else True)
            for key, part in value.items()
        )
    unknown = set(schema) - TEXT - {"anyOf", "type", "enum", "const", *BOUNDS}
    assert not unknown, unknown
    return all(law(value, schema[name]) for name, law in BOUNDS.items() if name in schema)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes_are_taken_as_written_and_as_resolved(file: Path) -> None:
    schema, values = recipe_schema(), yaml.safe_load(file.read_text())
    assert takes(schema, values, schema)
    assert takes(schema, build_recipe(values).model_dump(mode="json"), schema)


@pytest.mark.parametrize(
    "section",
    [
        "curriculum: {temperature: 1, epochs: 3, learning_rate: [1e-4, 2e-4], kd_ratio: '0.7,1'}",
        "curriculum: {max_steps: [3, 4, 5, 6], patience: null}",
        "ranking: {criteria: rouge_l}",
        "ranking: {criteria: [response_length, {measure: kl_to_teacher, weight: 2}]}",
        "training: {save_every: 500, report_to: tensorboard}",
        "student: {drop: 10-12}",
        "student: {drop: [3, 4]}",
        "teacher: gpt2",
        "compare: {arms: 'plain,pocl', seeds: [1, 2], across: {loss.divergence: [fkl, rkl]}}",
        "data: {template_kwargs: {enable_thinking: false}}",
        "loss: {scale_by_temperature: authors}",
    ],
)
def test_short_forms_that_the_models_take_are_taken(section: str) -> None:
    values = {"student": "small", **yaml.safe_load(section)}
    if isinstance(numbers := values.get("curriculum", {}).get("learning_rate"), list):
        values["curriculum"]["learning_rate"] = [float(number) for number in numbers]
    build_recipe(values)
    assert takes(recipe_schema(), values, recipe_schema())


@pytest.mark.parametrize(
    "section",
    ["foo: 1", "training: 4", "training: {batchsize: 4}", "training: {batch_size: 0}", "seed: true", "seed: -1",
     "loss: {divergence: kl}", "curriculum: {kind: baby}", "data: {max_length: 7}"],
)  # fmt: skip
def test_what_the_models_refuse_in_one_key_is_refused(section: str) -> None:
    values = {"student": "small", **yaml.safe_load(section)}
    with pytest.raises(ValueError, match="problem"):
        build_recipe(values)
    assert not takes(recipe_schema(), values, recipe_schema())


def test_every_key_has_its_type_and_its_description() -> None:
    schema = recipe_schema()
    for key in known_keys():
        *sections, leaf = key.split(".")
        model = schema
        for section in sections:
            name = re.search(r"#/\$defs/(\w+)", str(model["properties"][section]))
            assert name
            model = schema["$defs"][name[1]]
        assert leaf in model["properties"], key
