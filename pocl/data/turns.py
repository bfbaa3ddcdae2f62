"""Turns as people write them, turned into turns as a chat template takes them.

Read are `role`/`content` (OpenAI, TRL, axolotl) and `from`/`value` (ShareGPT) in any mixture, content as a list of text
parts, tool calls as objects or as JSON text, and the older `function_call`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Who speaks, in the words of ShareGPT and of LLaMA-Factory. A role that is not here is the template's to know.
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool", "function_response": "tool"}
_TEMPLATE_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")
_WITHOUT_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class RowError(ValueError):
    """What is wrong with one row, in words; whoever knows which row it is says so."""


def text_of(value: Any, what: str) -> str:
    """A value as text: `str()`, JSON for lists and dicts, and nothing for null alone.

    Args:
        value: what a column or a turn holds.
        what: its name in errors.

    Raises:
        RowError: NaN or bytes, which stand for no text.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, float) and math.isnan(value):
        raise RowError(f"{what} is NaN, which is no text; write null where there is no value")
    if isinstance(value, bytes | bytearray):
        raise RowError(f"{what} is bytes, not text; decode it")
    return str(value)


def are_turns(value: Any) -> bool:
    """Whether a value of `prompt` or `completion` is a list of turns (and not text, or a list that is an answer)."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(
            isinstance(turn, Mapping) and ("role" in turn or "from" in turn) and (_content_key(turn) or _speaks(turn))
            for turn in value
        )
    )


def turns_of(value: Any, what: str, *, filled: bool) -> list[dict[str, Any]]:
    """The turns in a column.

    Args:
        value: a list of turns, or its JSON text; null is no turn.
        what: the column's name in errors.
        filled: the row comes from Arrow structs, in which null may stand for a key that the row does not have; inside
            tool calls such keys are left out.

    Raises:
        RowError: something that is no list of turns, a turn without a role or content, an unknown speaker of a
            `from`/`value` turn, a content part that is no text.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value, filled = parsed(value, what, "a list of turns"), False  # whoever wrote the text wrote the nulls
    if isinstance(value, Mapping):
        value = _in_rows(value)
    if not isinstance(value, list | tuple):
        raise RowError(f"{what} is {_kind(value)}; it must be a list of turns, each with `role` and `content`")
    return [
        _plain(turn) or _turn(turn, f"turn {number} of {what}", filled) for number, turn in enumerate(value, start=1)
    ]


def _in_rows(value: Mapping[str, Any]) -> list[Any]:
    """The one turn that a dict is, or, where it is a dict of lists (an older `Sequence` of `datasets`), all of them."""
    lengths = {len(column) if isinstance(column, list | tuple) else -1 for column in value.values()}
    if len(lengths) != 1 or -1 in lengths:
        return [value]
    return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]


def _plain(turn: Any) -> dict[str, Any] | None:
    """The turn, where it is one of the many that hold a known role and a text; None where it takes a second look."""
    if type(turn) is dict and len(turn) == 2:
        role, content = turn.get("role"), turn.get("content")
        if type(content) is str and role in _TEMPLATE_ROLES:
            return {"role": role, "content": content}
        role, content = turn.get("from"), turn.get("value")
        if type(content) is str and (role == "human" or role == "gpt"):
            return {"role": _ROLES[role], "content": content}
    return None


def _turn(turn: Any, what: str, filled: bool) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RowError(f"{what} is {_kind(turn)}; it must be an object with `role` and `content`")
    kept = {key: value for key, value in turn.items() if value is not None}
    who = "role" if "role" in kept else "from"
    if who not in kept:
        raise RowError(f"{what} has no `role` (its keys: {_names(turn)}); name who speaks")
    role, content_key = str(kept[who]), _content_key(turn)
    if not content_key and not _speaks(kept):
        raise RowError(f"{what} has no `content` (its keys: {_names(turn)}); name its text so")
    if who == "from" and role not in (*_TEMPLATE_ROLES, *_ROLES, "function_call"):
        known = ", ".join(("human", "gpt", "system", "function_call", "observation", "tool"))
        raise RowError(f"{what} is from {role!r}; read are {known}. Rename the speaker")
    made: dict[str, Any] = {"role": _ROLES.get(role, role)}
    given = kept.pop("tool_calls", None)
    calls = _calls(given, f"the `tool_calls` of {what}")
    if filled and not isinstance(given, str):
        calls = without_null(calls)
    if (older := kept.pop("function_call", None)) is not None:
        older = without_null(older) if filled else older
        calls += _functions(older, f"the `function_call` of {what}")
    content = kept.get(content_key)
    if role == "function_call":
        made["role"], calls, content = "assistant", _functions(content, f"the function call in {what}"), None
    text = content_text(content, f"the content of {what}")
    made["content"] = None if content is None and calls else text
    if calls:
        made["tool_calls"] = calls
    _check_marks(kept, made["role"], what)
    for key, value in kept.items():
        if key not in (who, content_key):
            made[key] = without_null(value) if filled else value
    return made


def _check_marks(turn: Mapping[str, Any], role: str, what: str) -> None:
    """Refuses marks of what to learn that nothing here follows."""
    if turn.get("train") is True and role != "assistant":
        raise RowError(f"{what} is marked `train: true`, but its role is {role!r}; only answers are learned")
    if any(turn.get(key) for key in ("train_detail", "training_detail")):
        raise RowError(f"{what} marks parts of itself to learn; a turn is learned whole, or not (`train: false`)")


def _content_key(turn: Mapping[str, Any]) -> str:
    """Where a turn's text lies, also if it is null there."""
    found = [key for key in ("content", "value") if key in turn]
    return next((key for key in found if turn[key] is not None), found[0] if found else "")


def _speaks(turn: Mapping[str, Any]) -> bool:
    """Whether a turn may go without content."""
    return any(turn.get(key) is not None for key in _WITHOUT_CONTENT)


def content_text(value: Any, what: str) -> str:
    """The text of a turn's content: a text, a list of text parts, or anything that `text_of` writes.

    Raises:
        RowError: a part that is no text.
    """
    if isinstance(value, Mapping) and "type" in value and value.get("text") is not None:
        value = [value]
    if isinstance(value, list | tuple) and (not value or any(map(_is_part, value))):
        # Templates that take parts write one after the other, with nothing between.
        return "".join(_part(part, what) for part in value)
    return text_of(value, what)


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and ("type" in value or "text" in value)


def _part(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    if not _is_part(part):
        raise RowError(f"{what} has {_kind(part)} among its parts; a part is an object with `type` and `text`")
    kind = part.get("type") or "text"
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise RowError(f"{what} has a part of type {kind!r}; only text can be read (`type` text, with `text`)")
    return str(part["text"])


def _calls(value: Any, what: str) -> list[Any]:
    """The `tool_calls` of a turn, as they are."""
    if isinstance(value, str):
        value = parsed(value, what, "a list of calls") if value else None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value or [], list | tuple) or not all(isinstance(call, Mapping) for call in value or []):
        raise RowError(f"{what} are {_kind(value)}; they must be a list of objects")
    return list(value or [])


def _functions(value: Any, what: str) -> list[dict[str, Any]]:
    """Calls from the bare `name` and `arguments` that ShareGPT and the older form of OpenAI give."""
    calls = _calls(value, what)
    for call in calls:
        if "name" not in call:
            raise RowError(f"{what} has no `name` (its keys: {_names(call)})")
    return [{"type": "function", "function": dict(call)} for call in calls]


def tools_of(value: Any, what: str, *, wrap: bool, filled: bool) -> list[Any] | None:
    """What a column says of the tools; None for null and empty text.

    Args:
        value: a list of schemas, each an object or its JSON text, or the JSON text of the list.
        what: the column's name in errors.
        wrap: put a bare function schema (`name`, `parameters`) into the envelope that templates look into.
        filled: as in `turns_of`.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value, filled = parsed(value, what, "a list of tools"), False
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RowError(f"{what} is {_kind(value)}; it must be a list of JSON schemas")
    made = []
    for tool in value:
        as_text = isinstance(tool, str)
        tool = parsed(tool, what, "a tool") if as_text else tool
        if not isinstance(tool, Mapping):
            raise RowError(f"{what} holds {_kind(tool)}; a tool is a JSON schema, an object")
        tool = without_null(tool) if filled and not as_text else dict(tool)
        bare = wrap and "name" in tool and "function" not in tool
        made.append({"type": "function", "function": tool} if bare else tool)
    return made


def parsed(text: str, what: str, wanted: str) -> Any:
    """The value of a column that is JSON text."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError(f"{what} is text, and not the JSON of {wanted} ({error})") from None


def without_null(value: Any) -> Any:
    """A value without the keys that are null, however deep: what Arrow fills structs with."""
    if isinstance(value, Mapping):
        return {key: without_null(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [without_null(inner) for inner in value]
    return value


def _kind(value: Any) -> str:
    names = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _names(keys: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(map(str, keys)) or "none"
