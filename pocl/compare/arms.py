"""The arms of a comparison: what each changes in the recipe, at equal numbers of optimizer steps."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocl.pipeline.curricula import batch_size_of, plain_settings
from pocl.recipe import Recipe, RecipeError, build_recipe

PLAIN = "plain"
ARMS = {
    PLAIN: "plain distillation: all samples in one stage, lowest temperature, the mean kd_ratio of the curriculum",
    "pocl": "the recipe as it is: easy samples first, temperature and kd_ratio rising",
    "order": "order alone: easy samples first, temperature and kd_ratio as plain",
    "temperature": "temperature alone: all samples in every stage, temperature rising, kd_ratio as plain",
    "ratio": "ratio alone: all samples in every stage, kd_ratio rising, temperature as plain",
    "rising": "temperature and ratio: all samples in every stage, both rising",
    "restarts": "stages alone: all samples in every stage, temperature and kd_ratio as plain",
    "reversed": "as pocl, but hard samples first",
    "shuffled": "as pocl, but samples dealt to the stages at random",
    "one_pass": "as pocl, but each stage leaves the easier samples behind",
    "reranked": "as pocl, but difficulty is measured again before every stage",
}
"""The arms that can be named, each in a line."""
FROM = "from"
"""In an arm of one's own: the named arm that it starts from, `pocl` when left out."""


@dataclass(frozen=True)
class Arm:
    """One way to train, to be compared."""

    name: str
    explanation: str
    recipe: Recipe
    level: str = ""
    """The value of `compare.across` that it has, as text; arms are compared within a level."""

    @property
    def key(self) -> str:
        """Stands for the arm in file names."""
        return f"{self.name}@{self.level}" if self.level else self.name


def stage_steps(recipe: Recipe, num_samples: int) -> list[int]:
    """Optimizer steps of each stage of a recipe's curriculum, for parts of equal size."""
    section = recipe.curriculum
    if section.max_steps:
        steps = section.max_steps
        return list(steps if len(steps) > 1 else steps * section.num_stages)
    epochs = section.epochs if len(section.epochs) > 1 else section.epochs * section.num_stages
    part, batch = num_samples // section.num_stages, batch_size_of(recipe)
    sizes = [part * (i + 1) for i in range(section.num_stages - 1)] + [num_samples]
    return [e * math.ceil(size / batch) for e, size in zip(epochs, sizes, strict=True)]


def build_arms(recipe: Recipe, num_samples: int, names: Sequence[str] | None = None) -> list[Arm]:
    """The arms that a recipe's section `compare` asks for, the one to compare with first in every level.

    Args:
        recipe: what all arms start from.
        num_samples: samples that the stages train on.
        names: in place of `compare.arms`.

    Raises:
        RecipeError: no such arm, an arm twice, an override that is no setting, or two arms that train alike.
    """
    if recipe.curriculum.kind != "baby_step":
        raise RecipeError(
            f"curriculum.kind = {recipe.curriculum.kind!r}: a recipe to compare is one of kind baby_step; its arms are "
            "what is compared with it"
        )
    section = recipe.compare
    wanted = [(name, None) for name in names] if names is not None else list(_wanted(section.arms))
    given = [name for name, _ in wanted]
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise RecipeError(f"the arm {twice[0]!r} is named twice; two arms have two names")
    if len(given) < 2:
        raise RecipeError(f"a comparison needs two arms at least, got {', '.join(given) or 'none'}")
    wanted.sort(key=lambda pair: pair[0] != PLAIN)  # the others keep their order
    levels: list[dict[str, Any]] = [{}]
    if section.across:
        ((key, values),) = section.across.items()
        levels = [{key: value} for value in values]
    arms = [_arm(recipe, name, own, level, num_samples) for level in levels for name, own in wanted]
    seen: dict[str, Arm] = {}
    for arm in arms:
        text = json.dumps(arm.recipe.model_dump(mode="json"), sort_keys=True)
        if text in seen:
            raise RecipeError(f"the arms {seen[text].key!r} and {arm.key!r} train alike; leave one out")
        seen[text] = arm
    return arms


def _wanted(arms: Sequence[str | Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any] | None]]:
    found: list[tuple[str, Mapping[str, Any] | None]] = []
    for arm in arms:
        if isinstance(arm, str):
            found.append((arm, None))
        else:
            found += [(str(name), own or None) for name, own in arm.items()]
    return found


def _arm(recipe: Recipe, name: str, own: Mapping[str, Any] | None, level: Mapping[str, Any], num_samples: int) -> Arm:
    base = str((own or {}).get(FROM, "pocl")) if own is not None else name
    if base not in ARMS:
        near = difflib.get_close_matches(base, ARMS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"named arms are {', '.join(ARMS)}"
        raise RecipeError(
            f"there is no arm {base!r}; {hint} An arm of your own is written `{base}: {{section.key: value}}`, in "
            "compare.arms"
        )
    free = {key: value for key, value in (own or {}).items() if key != FROM}
    changes = {**_changes(base, recipe, num_samples), **level, **free}
    if recipe.compare.equal == "steps" and free:
        changes |= _equal_steps(recipe, base, changes, num_samples)
    values = recipe.model_dump(mode="json") | {"compare": {}}
    values["curriculum"].pop("control")  # the arm plain is one
    words = [f"--{key}={json.dumps(value)}" for key, value in changes.items()]
    try:
        made = build_recipe(values, words, origin=f"arm {name}")
    except RecipeError as error:
        raise RecipeError(f"arm {name}: {error}") from None
    shown = ", ".join(f"{key} = {value}" for key, value in free.items())
    explanation = ARMS[base] if own is None else f"as {base}" + (f", but {shown}" if shown else "")
    return Arm(name, explanation, made, "-".join(map(str, level.values())))


def _changes(name: str, recipe: Recipe, num_samples: int) -> dict[str, Any]:
    """What a named arm changes, as dotted keys."""
    steps = stage_steps(recipe, num_samples)
    plain = plain_settings(recipe, steps)
    flat = {f"curriculum.{key}": plain[key] for key in ("temperature", "kd_ratio")}
    changes: dict[str, Any] = {}
    if recipe.compare.equal == "steps":
        changes |= {"curriculum.max_steps": steps, "curriculum.patience": None}
    if name == PLAIN:
        counted = recipe.curriculum.max_steps or recipe.compare.equal == "steps"
        free = {"patience"} if counted else {"patience", "max_steps"}  # as the recipe has them
        changes |= {f"curriculum.{key}": value for key, value in plain.items() if key not in free}
    elif name in ("order", "restarts"):
        changes |= flat | ({"curriculum.kind": "whole"} if name == "restarts" else {})
    elif name in ("temperature", "ratio", "rising"):
        held = {"temperature": "curriculum.kd_ratio", "ratio": "curriculum.temperature"}.get(name)
        changes |= {"curriculum.kind": "whole"} | ({held: flat[held]} if held else {})
    elif name in ("reversed", "shuffled", "one_pass"):
        changes["curriculum.kind"] = name
    elif name == "reranked":
        changes["ranking.refresh"] = "stage"
    return changes


def _equal_steps(recipe: Recipe, base: str, changes: Mapping[str, Any], num_samples: int) -> dict[str, Any]:
    """The same number of steps in all for an arm with stages of its own, dealt as its own recipe would."""
    stages = int(changes.get("curriculum.num_stages", recipe.curriculum.num_stages))
    if base == PLAIN or stages == recipe.curriculum.num_stages:
        return {}
    total, weight = sum(stage_steps(recipe, num_samples)), stages * (stages + 1) / 2
    ends = [round(total * (i + 1) * (i + 2) / 2 / weight) for i in range(stages)]
    steps = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if min(steps) < 1:
        raise RecipeError(f"{total} optimizer steps cannot fill {stages} stages; use fewer stages or more epochs")
    return {"curriculum.max_steps": steps}
