"""Reading a recipe: YAML file, command-line overrides, and errors that say what to write instead."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pocl.recipe.arguments import place_of_argument
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
    path, overrides = _recipe_first(path, overrides)
    file = recipe_file(path)
    try:
        values = yaml.load(_text_of(file), _Loader)
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-45
        tabs = "; YAML takes no tabs: indent with spaces" if "\\t" in str(error) else ""
        raise RecipeError(f"{file}: not valid YAML: {error}{tabs}") from None
    if not isinstance(values, dict):
        got = "nothing: it is empty" if values is None else type(values).__name__
        raise RecipeError(f"{file}: expected `key: value` lines, got {got}; a recipe names at least a student")
    if (file.parent / MANIFEST).is_file():  # the recipe that a run keeps says nothing of the folder it lies in
        values.setdefault("output", str(file.parent))
    return build_recipe(values, overrides, origin=str(file))


def _recipe_first(path: str | Path, overrides: Sequence[str]) -> tuple[str | Path, list[str]]:
    """The recipe's name, and the settings, where some were written before it: `--seed 3 recipe.yaml`."""
    words = [str(path), *overrides]
    if not words[0].startswith("--"):
        return path, words[1:]
    at = 0
    while at < len(words) and words[at].startswith("--"):
        _full_key(words[at][2:].partition("=")[0].replace("-", "_"))  # an unknown one is told first
        at += 1 if "=" in words[at] else 2
    if at >= len(words):
        raise RecipeError("no recipe is named; write it first: RECIPE --key value")
    return words[at], [*words[:at], *words[at + 1 :]]


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
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
        raise RecipeError(
            f"{file}: not UTF-8 text (byte {error.start + 1}); convert it: iconv -f {kind} -t UTF-8 {file} > new.yaml"
        ) from None


def build_recipe(values: Mapping[str, Any], overrides: Sequence[str] = (), *, origin: str = "recipe") -> Recipe:
    """A recipe from nested values and command-line overrides (see `load_recipe`); `origin` names it in errors."""
    merged = {str(key): dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key, value in parse_overrides(overrides).items():
        _set(merged, key.split("."), value)
        section, _, leaf = key.rpartition(".")
        if section == "student" and value is not None and leaf in (sources := ("model", "cut", "drop")):
            for other in sources:  # they exclude each other
                _set(merged, [section, other], value if other == leaf else None)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors()]
        raise RecipeError("\n".join([f"{origin}: {len(problems)} problem(s)", *(f"  {p}" for p in problems)])) from None


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set `values[path[0]][path[1]]...` where all before the last are sections; what is none is told later."""
    name, *rest = path
    if not rest:
        values[name] = value
        return
    current = values.get(name)
    if isinstance(current, str) and name in SHORTHAND:
        current = {SHORTHAND[name]: current}
    if isinstance(current, Mapping | None):
        values[name] = dict(current or {})
        _set(values[name], rest, value)


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
        name = _full_key(key.replace("-", "_"))
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise RecipeError(f"--{key} has no value: write --{key} VALUE")
            text = remaining.pop(0)
        try:
            found[name] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(
                f"--{key}: {text!r} is no value: {getattr(error, 'problem', error)}; a list is written '[1, 2]'"
            ) from None
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
    what = f"{given} is a folder, and not that of a run" if given.is_dir() else f"no recipe at {given}"
    nearest = difflib.get_close_matches(str(path), shipped, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise RecipeError(f"{what}{hint}; shipped recipes are: {', '.join(sorted(shipped)) or 'none'}")


def _shipped_folders() -> list[Path]:
    here = Path(__file__).parent.parent  # in an installed package they lie beside this file, in a checkout one level up
    return [folder for folder in (here / "recipes", here.parent / "recipes") if folder.is_dir()]


def known_keys() -> list[str]:
    """Every settable key, dotted: `seed`, `teacher.model`, `student.lora`, `student.lora.r`, ..."""
    return [key for key, _ in _fields()]


def _fields(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every settable key with its field. A section within a section may be left out, and so is a key, too."""
    for name, field in model.model_fields.items():
        section = _section_of(field)
        if section is None or prefix:
            yield f"{prefix}{name}", field
        if section is not None:
            yield from _fields(section, f"{prefix}{name}.")


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, or may hold; None for a plain value."""
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    kinds = kinds if type(None) in kinds or len(kinds) == 1 else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _sections() -> dict[str, type[BaseModel] | None]:
    """Top-level keys with the model of their section, None for plain values."""
    return {name: _section_of(field) for name, field in Recipe.model_fields.items()}


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


# Options of the commands themselves; a test holds the list against the commands.
COMMAND_OPTIONS = ("--arms", "--change", "--data", "--dry-run", "--help", "--jobs", "--json", "--models", "--name",
                   "--plot", "--seeds", "--split")  # fmt: skip


def _suggestion(key: str) -> str:
    """`; did you mean ...?`, or where to look."""
    known, section, leaf = known_keys(), *key.rpartition(".")[::2]
    sections = _sections()
    if section in ("", "training") and (place := place_of_argument(leaf)):
        return f"; of TrainingArguments a recipe takes it elsewhere: {place}"
    if not section:
        if (option := f"--{key.replace('_', '-')}") in COMMAND_OPTIONS:
            return f"; this command has no {option}, others have"
        if nearest := difflib.get_close_matches(option, COMMAND_OPTIONS, n=1, cutoff=0.8):
            return f"; did you mean {nearest[0]}?"
        if nearest := difflib.get_close_matches(key, sections, n=1, cutoff=0.75):
            return f"; did you mean {nearest[0]}?"
    elif section not in sections and (nearest := difflib.get_close_matches(section, sections, n=1, cutoff=0.75)):
        return f"; did you mean {_nearest(f'{nearest[0]}.{leaf}', known) or nearest[0]}?"
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    meant = (leaf in by_leaf and by_leaf[leaf]) or _nearest(key, known) or by_leaf.get(_nearest(leaf, by_leaf, 0.6))
    if meant:
        return f"; did you mean {meant}?"
    owner = sections.get(section)
    there = [name for name in known if name.startswith(f"{section}.")] if owner else list(sections)
    return f"; known are {', '.join(there)} (`pocl keys` explains them)"


def _nearest(name: str, names: Iterable[str], cutoff: float = 0.75) -> str:
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), "")


def _problem(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key{_suggestion(where)}"
    there = [name.removeprefix(f"{where}.") for name in known_keys() if name.startswith(f"{where}.")]
    if detail["type"] == "model_type" and there:
        return (
            f"{where}: is a section, got {detail['input']!r}; write `{where}:` and below it any of {', '.join(there)}"
        )
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if detail["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if detail["type"] == "missing":
        example = "; name a model, or write `student: {cut: 6}` for six layers of the teacher"
        return f"{where}: required{example if where == 'student' else ''}"
    return f"{where}: {message}, got {detail['input']!r}"


def describe_keys(part: str = "") -> list[tuple[str, str, str]]:
    """(key, default, what it does) of every setting, or of those of a section, or of one key.

    Raises:
        RecipeError: there is no such section or key.
    """
    rows: list[tuple[str, str, str]] = []
    for key, field in _fields():
        default = "required" if field.is_required() else field.default
        meaning = " ".join((field.description or "").split())
        rows.append((key, str(default), _choices(field.annotation) + meaning))
    if not part:
        return rows
    chosen = [row for row in rows if row[0] == part or row[0].startswith(f"{part}.")]
    chosen = chosen or [row for row in rows if row[0].endswith(f".{part}")]
    if not chosen:
        raise RecipeError(f"there is no section and no key {part}{_suggestion(part)}")
    return chosen


def _choices(kind: Any) -> str:
    """`one of a, b. ` for a Literal, else nothing."""
    options = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = typing.get_args(kind)
        options = tuple(o for part in parts if typing.get_origin(part) is Literal for o in typing.get_args(part))
        if options and bool in parts:
            options = ("true", "false", *options)
    return f"One of {', '.join(map(str, options))}. " if options else ""
