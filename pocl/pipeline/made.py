"""Models that a recipe makes at their first use: `recipe:healed-student` where a model is asked for.

Such a model is kept in pocl's cache folder, under the name of its recipe and a fingerprint of what the recipe says and
of the content of its models and data. It is a run folder as any other: cut off, it goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pocl.embedded import cache_folder
from pocl.run_folder import fingerprint

if TYPE_CHECKING:
    from pocl.recipe import Recipe

PREFIX = "recipe:"
# What a recipe says without an influence on the student that comes out.
_INCIDENTAL = {"name", "output", "evaluation", "hub", "compare"}

# Where models and data lie; what they hold counts by itself.
_PLACES = {"teacher": {"model"}, "student": {"model"}, "data": {"source", "validation", "test"}}


def recipe_of(source: str | None) -> Recipe | None:
    """The recipe that `recipe:NAME` or `recipe:FILE` stands for; None for any other source.

    Raises:
        RecipeError: there is no such recipe, or it cannot be used.
        ValueError: it takes a model from a recipe itself.
    """
    if source is None or not source.startswith(PREFIX):
        return None
    from pocl.recipe import load_recipe

    made = load_recipe(source.removeprefix(PREFIX))
    if any((model or "").startswith(PREFIX) for model in (made.teacher.model, made.student.model)):
        raise ValueError(f"{source}: a recipe that makes a model cannot ask for one that another recipe makes")
    return made


def folder_of(source: str) -> Path | None:
    """Where the student of `recipe:NAME` is kept, made or not; None for any other source."""
    recipe = recipe_of(source)
    if recipe is None:
        return None
    name = Path(source.removeprefix(PREFIX)).stem
    return cache_folder() / "students" / f"{name}-{recipe_mark(recipe)}" / "student"


def recipe_mark(recipe: Recipe, *, judged: bool = False) -> str:
    """Stands for the student that a recipe makes, and with `judged` for how it is evaluated as well.

    Defaults do not count: a key that is added later changes nothing unless it is set. Nor do places: the content of
    models and data counts, wherever they lie.
    """
    from pocl.pipeline.context import source_fingerprint

    values = recipe.model_dump(mode="json", exclude_defaults=True)
    left_out = _INCIDENTAL - ({"evaluation"} if judged else set())
    values = {key: value for key, value in values.items() if key not in left_out}
    for section, keys in _PLACES.items():
        values[section] = {key: value for key, value in values.get(section, {}).items() if key not in keys}
    sources = {recipe.teacher.model: recipe.teacher.revision, recipe.student.model: recipe.student.revision}
    data = (recipe.data.source, recipe.data.validation, recipe.data.test)
    content = [source_fingerprint(source, revision) for source, revision in sources.items() if source]
    content += [source_fingerprint(source) for source in data if source]
    return fingerprint({"recipe": values, "content": content})


def make_models(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Make the models that a recipe takes from other recipes, those that are not there yet.

    Args:
        recipe: whose models are to be there.
        say: told once before a model is made.
    """
    from pocl.pipeline.run import run

    for source in filter(None, (recipe.teacher.model, recipe.student.model)):
        folder, other = folder_of(source), recipe_of(source)
        if folder is None or other is None or (folder / "config.json").is_file():
            continue
        say(f"Making {source}, once, into {folder}")
        run(other.model_copy(update={"output": str(folder.parent)}), until="training", change=True)
