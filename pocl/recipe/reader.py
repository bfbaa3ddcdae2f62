"""Reading a recipe: YAML file, command-line overrides, and errors that say what to write instead."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from pocl.recipe.sections import SHORTHAND, Recipe
from pocl.run_folder import MANIFEST, RECIPE


class RecipeError(ValueError):
    """A recipe that cannot be used; the message lists every problem with what is allowed."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply command-line overrides.

    Args:
        path: YAML file, or the name of a shipped recipe such as `quickstart`.
        overrides: words like `["--seed", "3", "--training.batch_size=8"]`; values are read as YAML. A key without its
            section is accepted where only one section has it.

    Raises:
        RecipeError: no such file, no mapping in it, unknown keys, values out of bounds; all problems in one message.
    """
    file = recipe_file(path)
    try:
        values = yaml.load(_text_of(file), _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: expected `key: value` lines, got {type(values).__name__}")
    if (file.parent / MANIFEST).is_file():  # the recipe that a run keeps says nothing of the folder it lies in
        values.setdefault("output", str(file.parent))
    return build_recipe(values, overrides, origin=str(file))


class _Loader(yaml.SafeLoader):
    """YAML, but a key that stands twice is an error: the first value would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            line = key_node.start_mark.line + 1
            if key is not None and key != "<<" and key in seen:
                raise yaml.YAMLError(f"{key!r} stands twice, in lines {seen[key]} and {line}; keep one")
            seen[key] = line
        return super().construct_mapping(node, deep)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{file}: not UTF-8 text (byte {error.start + 1}); convert it: iconv -f LATIN1 -t UTF-8 {file} > new.yaml"
        ) from None


def build_recipe(values: Mapping[str, Any], overrides: Sequence[str] = (), *, origin: str = "recipe") -> Recipe:
    """A recipe from nested values and command-line overrides (see `load_recipe`); `origin` names it in errors."""
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key, value in parse_overrides(overrides).items():
        section, _, leaf = key.rpartition(".")
        if not section:
            merged[leaf] = value
            continue
        current = merged.get(section)
        if isinstance(current, str) and section in SHORTHAND:
            current = {SHORTHAND[section]: current}
        merged[section] = {**(current or {}), leaf: value}
        if section == "student" and value is not None and leaf in (sources := ("model", "cut", "drop")):
            merged[section] |= {other: None for other in sources if other != leaf}  # they exclude each other
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors()]
        raise RecipeError("\n".join([f"{origin}: {len(problems)} problem(s)", *(f"  {p}" for p in problems)])) from None


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["--training.batch_size", "8"]` or `["--training.batch_size=8"]` -> `{"training.batch_size": 8}`.

    Raises:
        RecipeError: a word that is no option, an option without a value, an unknown or ambiguous key.
    """
    found: dict[str, Any] = {}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise RecipeError(f"unexpected argument {word!r}: settings are given as --key value or --section.key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not remaining:
                raise RecipeError(f"--{key} has no value: write --{key} VALUE")
            text = remaining.pop(0)
        found[_full_key(key.replace("-", "_"))] = yaml.safe_load(text)
    return found


def recipe_file(path: str | Path) -> Path:
    """The file at `path`, the one that a run folder at `path` keeps, or the shipped recipe of that name.

    Raises:
        RecipeError: there is none; the message lists the shipped names.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given
    if (given / RECIPE).is_file() and (given / MANIFEST).is_file():
        return given / RECIPE
    shipped = {file.stem: file for folder in _shipped_folders() for file in sorted(folder.glob("*.yaml"))}
    if str(path) in shipped:
        return shipped[str(path)]
    raise RecipeError(f"no recipe at {given}; shipped recipes are: {', '.join(sorted(shipped)) or 'none'}")


def _shipped_folders() -> list[Path]:
    here = Path(__file__).parent.parent  # in an installed package they lie beside this file, in a checkout one level up
    return [folder for folder in (here / "recipes", here.parent / "recipes") if folder.is_dir()]


def known_keys() -> list[str]:
    """Every settable key, dotted: `seed`, `teacher.model`, ..."""
    keys: list[str] = []
    for name, section in _sections().items():
        keys += [f"{name}.{leaf}" for leaf in section.model_fields] if section else [name]
    return keys


def _sections() -> dict[str, type[BaseModel] | None]:
    """Top-level keys with the model of their section, None for plain values."""
    found: dict[str, type[BaseModel] | None] = {}
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        found[name] = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return found


def _full_key(key: str) -> str:
    known = known_keys()
    if key in known:
        return key
    sections = _sections()
    if key in SHORTHAND:
        return f"{key}.{SHORTHAND[key]}"
    if sections.get(key):
        raise RecipeError(
            f"--{key} is a section; set one of its keys: {', '.join(k for k in known if k.startswith(key))}"
        )
    matches = [name for name in known if name.endswith(f".{key}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise RecipeError(f"--{key} is ambiguous: write one of {', '.join('--' + name for name in matches)}")
    raise RecipeError(f"unknown key {key}{_suggestion(key)}")


def _suggestion(key: str) -> str:
    """`; did you mean ...?`, by the dotted name first and by the last part of it else."""
    known = known_keys()
    by_leaf = {name.rpartition(".")[2]: name for name in known} | {name: name for name in _sections()}
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    nearest = nearest or [
        by_leaf[n] for n in difflib.get_close_matches(key.rpartition(".")[2], by_leaf, n=1, cutoff=0.5)
    ]
    return f"; did you mean {nearest[0]}?" if nearest else "; `pocl distill --help` lists where keys are described"


def _problem(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key{_suggestion(where)}"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if detail["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if detail["type"] == "missing":
        return f"{where}: required"
    return f"{where}: {message}, got {detail['input']!r}"


def describe_keys() -> list[tuple[str, str, str]]:
    """(key, default, what it does) of every setting, for `pocl recipe --keys`-style listings and the documentation."""
    rows: list[tuple[str, str, str]] = []
    for name, section in _sections().items():
        fields = section.model_fields if section else {name: Recipe.model_fields[name]}
        for leaf, field in fields.items():
            default = "required" if field.is_required() else field.default
            key = f"{name}.{leaf}" if section else name
            meaning = " ".join((field.description or "").split())
            rows.append((key, str(default), _choices(field.annotation) + meaning))
    return rows


def _choices(kind: Any) -> str:
    """`one of a, b. ` for a Literal, else nothing."""
    options = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = typing.get_args(kind)
        options = tuple(o for part in parts if typing.get_origin(part) is Literal for o in typing.get_args(part))
        if options and bool in parts:
            options = ("true", "false", *options)
    return f"One of {', '.join(map(str, options))}. " if options else ""
