"""Columns that are not read, and what to do instead, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocl.data.turns import RowError, are_turns

ARGUMENTS = "chat_template_kwargs"
_MEDIA = "holds what is no text, and models of text alone are distilled here; drop the column if the texts do without"
_JOIN = "would change the prompt, and no form says how; write it into the prompt, or drop the column"
GRADED = "says which answers are good; keep the rows whose answer is to be learned, and drop the column"
# Columns that would change what a row says, and that its form does not read; an empty one does not matter.
REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("context", "history"), _JOIN),
    "documents": f"would change the prompt; hand it to the template inside `{ARGUMENTS}`",
    "kto_tag": GRADED,
    "corrected": "holds a second answer beside the first; name the answer to be learned `output`, and drop the other",
}
REFUSED_BESIDE_TEXTS = dict.fromkeys(("instruction", "input", "choices", "options", "article", "passage"), _JOIN)
NEEDED = (
    "`messages` or `conversations` (turns), `prompt` and `completion`, `instruction`, `input` and `output`, or `text` "
    "(a corpus)"
)
# What the columns of data that has another use say: (columns, why not, and what to do).
_NOT_ROWS = (
    (("input_ids",), "holds token ids, which need no reading: hand the rows to POCLTrainer or to `score`"),
    (
        ("chosen", "rejected"),
        "are two answers to compare, and one answer is learned from here: rename `chosen` to `completion` (`messages` "
        "where it holds the whole conversation; with `instruction`: `output`) to learn from the preferred one",
    ),
    (
        ("completions", "labels"),
        "are single steps with a grade each: join the steps of a row into `completion` to learn from them",
    ),
    (("segments",), "are pieces of text with labels of their own: write them as `prompt` and `completion`"),
)
_RENAMES = {"question": "prompt", "query": "prompt", "INSTRUCTION": "instruction", "message_1": "prompt"} | {
    "article": "prompt",
    "answer": "completion",
    "generation": "completion",
    "RESPONSE": "output",
    "message_2": "completion",
    "summary": "completion",
    "solution": "completion",
    "output": "completion",
}


def refuse_other_uses(columns: list[str]) -> None:
    """Refuses columns of data that is made for something else.

    Raises:
        RowError: says what they are and what to do.
    """
    for names, why in _NOT_ROWS:
        if all(name in columns for name in names):
            raise RowError(f"{' and '.join(f'`{name}`' for name in names)} {why}")


def needed(row: Mapping[str, Any]) -> str:
    """What is needed instead of a row's columns, with the new names where they can be guessed."""
    if lists := [name for name, value in row.items() if _holds_rows(value)]:
        return f"needed are {NEEDED}. The rows seem to lie inside `{lists[0]}`: write that list alone into the file"
    if any(name in row for name in ("prompt", "instruction")) and not any(name in _RENAMES for name in row):
        return f"needed are {NEEDED}. Prompts alone teach nothing here: write answers, the teacher's say, beside them"
    if len(row) == 1 and any(mark in next(iter(row)) for mark in ";\t|"):
        return f"needed are {NEEDED}, with commas between the columns of a CSV file"
    found = {name: _RENAMES[name] for name in row if name in _RENAMES}
    renames = " and ".join(f"`{old}` to `{new}`" for old, new in found.items())
    if len(found) == 2 and len(set(found.values())) == 2:
        return f"needed are {NEEDED}. Rename {renames}"
    return f"needed are {NEEDED}. Rename the columns that hold the prompt and the response"


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], dict) and not are_turns(value)
