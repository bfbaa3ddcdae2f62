"""One conversation: the turns as a chat template takes them, the tools, and the template's other arguments.

Every row of an examples table is one (`conversation_of`), whatever form its source had. A table keeps it as JSON text,
because the structs of Arrow give each turn and each tool call the keys of all others, filled with null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """What a chat template renders; the last turn is the reference answer."""

    turns: tuple[dict[str, Any], ...]
    """`role`, `content` (a string; None beside tool calls where the source has no text) and, where the source has
    them, `tool_calls`, `tool_call_id`, `name`, `reasoning_content` and whatever else a turn held. A key that is null
    in the source is left out. The last turn's role is `assistant`."""
    tools: list[Any] | None = None
    """What the model may call, as a template's `tools` takes it; an empty list is kept."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the template that the row itself asks for (`enable_thinking` and the like)."""

    def to_json(self) -> str:
        """The conversation as JSON text; `from_json` gives an equal one back."""
        whole: dict[str, Any] = {"turns": self.turns}
        if self.tools is not None:
            whole["tools"] = self.tools
        if self.template_kwargs:
            whole["template_kwargs"] = self.template_kwargs
        return json.dumps(whole, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """The conversation that `to_json` wrote."""
        whole = json.loads(text)
        return cls(tuple(whole["turns"]), whole.get("tools"), whole.get("template_kwargs", {}))


def conversation_of(example: Mapping[str, Any]) -> Conversation:
    """The conversation of a row that `load_examples` gave.

    A row without a `conversation` of its own is one question (`prompt`) and one answer (`response`).
    """
    if text := example.get("conversation"):
        return Conversation.from_json(text)
    return Conversation(
        ({"role": "user", "content": example["prompt"]}, {"role": "assistant", "content": example["response"]})
    )


def is_answer(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is an answer to learn from: the assistant's, and not marked as one to pass over.

    The mark is `weight: 0` (OpenAI) or `train: false` (axolotl).
    """
    return bool(turn["role"] == "assistant" and turn.get("weight") != 0 and turn.get("train") is not False)


def text_of_turn(turn: Mapping[str, Any]) -> str:
    """What a turn says, as plain text: its content, and its tool calls as one line of JSON each."""
    lines = [str(turn["content"])] if turn.get("content") else []
    lines += [json.dumps(call, ensure_ascii=False) for call in turn.get("tool_calls") or []]
    return "\n".join(lines)
