"""The JSON schema of recipes, by which editors complete and check them as they are written."""

from __future__ import annotations

from typing import Any

from pocl.recipe.sections import SHORTHAND, Recipe

LOOSE: dict[str, list[dict[str, Any]]] = {  # what else may stand for a value, made into it by the models
    "drop": [{"type": "string"}, {"type": "integer"}],
    "save_every": [{"type": "integer"}],
    "criteria": [{"type": "string"}, {"type": "object"}],
    "arms": [{"type": "string"}, {"type": "object"}],
}


def recipe_schema() -> dict[str, Any]:
    """A schema (draft 2020-12) that takes what a recipe's file may hold, short forms included.

    What depends on several keys at once, such as the length of a schedule, is judged by `load_recipe` alone.
    """
    schema = Recipe.model_json_schema()
    for model in [schema, *schema["$defs"].values()]:
        for name, value in model.get("properties", {}).items():
            model["properties"][name] = _with_short_forms(name, value)
    criterion = schema["$defs"]["RankingSection"]["properties"]["criteria"]["anyOf"][0]["items"]
    schema["$defs"]["RankingSection"]["properties"]["criteria"]["anyOf"][0]["items"] = {
        "anyOf": [criterion, {"type": "string"}]
    }
    for name in SHORTHAND:
        value = schema["properties"][name]
        text: dict[str, Any] = {key: value.pop(key) for key in ("default", "description") if key in value}
        schema["properties"][name] = {"anyOf": [value, {"type": "string"}], **text}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _with_short_forms(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """One value where a list is meant, and what `LOOSE` lists."""
    text: dict[str, Any] = {key: value[key] for key in ("default", "description", "title") if key in value}
    kind = {key: inner for key, inner in value.items() if key not in text}
    kinds = kind["anyOf"] if set(kind) == {"anyOf"} else [kind]
    more = [inner["items"] for inner in kinds if inner.get("type") == "array" and inner.get("items")]
    more += [{"type": "string"}] if any(inner.get("type") == "array" for inner in kinds) else []
    more += LOOSE.get(name, [])
    return {"anyOf": [*kinds, *more], **text} if more else value
