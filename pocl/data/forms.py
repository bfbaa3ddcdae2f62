"""The forms that rows come in, and what each makes of its columns.

A row is read by its own form, the first in `_FORMS` whose columns it fills, whatever the rows around it look like. What
stands beside and would change the prompt is read too, or refused by name; everything else is left out and reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pocl.data.conversation import Conversation, is_answer, text_of_turn
from pocl.data.refusals import ARGUMENTS, GRADED, REFUSED, REFUSED_BESIDE_TEXTS, needed, refuse_other_uses
from pocl.data.turns import RowError, are_turns, content_text, parsed, text_of, tools_of, turns_of

_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_CONTEXT = ("input", "context")
_ANSWERS = ("output", "completion", "response")
_READ_BESIDE = (*_SYSTEM, *_TOOLS, ARGUMENTS)
_RESERVED = (
    "messages",
    "conversation",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
)


class Example(NamedTuple):
    """A row of the examples table, without its id."""

    prompt: str = ""
    response: str = ""
    instruction: str | None = None
    input: str | None = None
    conversation: str | None = None
    text: str | None = None
    """A document of a corpus; None in every other row."""


@dataclass
class ReadReport:
    """What became of the rows of a source and their columns."""

    num_rows: int = 0
    used: dict[str, None] = field(default_factory=dict)
    """Columns that rows were made of, in the order in which they were met."""
    left_out: dict[str, None] = field(default_factory=dict)
    """Columns that no row was made of."""
    unread: list[str] = field(default_factory=list)
    """Files that were not read, for they hold rows of another type."""
    counts: Counter[str] = field(default_factory=Counter)
    """How often something in a row was not taken over, by what it was."""

    def __str__(self) -> str:
        parts = [f"rows made of {', '.join(self.used) or 'no column'}"]
        if left_out := [name for name in self.left_out if name not in self.used]:
            parts.append(f"left out: {', '.join(left_out)}")
        if self.unread:
            parts.append(f"files of another type, not read: {', '.join(self.unread)}")
        return "; ".join([*parts, *(f"{count} {what}" for what, count in self.counts.items())])


class RowReader:
    """Reads one row after the other, each by its own form, and keeps account.

    Args:
        filled: the rows come from Arrow tables, where null may stand for a key that a row does not have.
    """

    def __init__(self, *, filled: bool) -> None:
        self.filled = filled
        self.report = ReadReport()
        self.num_whole = 0
        """Rows that had all columns of a form, filled or not."""
        self.corpus: bool | None = None
        """Whether the rows are texts of a corpus; None as long as all were empty."""
        self._shapes: dict[tuple[str, ...], _Shape] = {}

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """The example in a row.

        Raises:
            RowError: says what about the row cannot be read, and what to do.
        """
        self.report.num_rows += 1
        columns = tuple(row)
        shape = self._shapes.get(columns)
        if shape is None:
            shape = self._shapes[columns] = _Shape.of(columns)
        self.num_whole += shape.form is not None
        example = shape.quick(row) if self.corpus is not True else None
        if example is None:
            return self._read(row, shape.form)
        if shape.form is not None and not shape.met:
            shape.met = True
            self._account(row, shape.form)
        self.corpus = False
        return example

    def _read(self, row: Mapping[str, Any], likely: Form | None) -> Example:
        # an empty list says nothing, except where it is the answer
        columns = [
            name
            for name, value in row.items()
            if value is not None and value != "" and (value != [] or name in _ANSWERS)
        ]
        form = self._form(row, columns, likely)
        if form is None:
            return Example()
        beside = [name for name in columns if name not in form.columns]
        for name in beside:
            self._check(name, row, form)
        self._account(row, form)
        example = form.read(self, row, [name for name in _READ_BESIDE if name in row and name not in form.needs])
        if self.corpus is None:
            self.corpus = example.text is not None
        if self.corpus != (example.text is not None):
            raise RowError("a corpus (`text`) and prompts with answers stand in one source; keep them in two")
        return example

    def _form(self, row: Mapping[str, Any], filled: list[str], likely: Form | None) -> Form | None:
        """The first form that the row fills; else the one it comes closest to; None for a row that holds nothing."""
        for form in _FORMS:
            if all(name in filled for name in form.needs):
                return form
        if not filled:
            return None
        partly = [form for form in _FORMS if any(name in filled for name in form.needs)]
        refuse_other_uses(filled)
        if not partly and "text" in filled:
            return _CORPUS
        if not partly and likely is None:
            raise RowError(f"it has the columns {', '.join(filled)}; {needed(row)}")
        if not partly:  # its form's columns are empty, whatever stands beside
            return None
        return max(partly, key=lambda form: sum((name in row) + (name in filled) for name in form.needs))

    def _check(self, name: str, row: Mapping[str, Any], form: Form) -> None:
        refused = REFUSED if form.holds_turns else REFUSED | REFUSED_BESIDE_TEXTS
        if name in refused and form.needs != ("text",):
            raise RowError(f"`{name}` {refused[name]}")
        if name == "label" and str(row[name]) in ("True", "False", "true", "false"):
            raise RowError(f"`label` {GRADED}")
        if name == "rejected" and not form.holds_turns:
            refuse_other_uses(["chosen", "rejected"])

    def _account(self, row: Mapping[str, Any], form: Form) -> None:
        for name in row:
            used = name in form.columns or name in _READ_BESIDE
            (self.report.used if used else self.report.left_out)[name] = None

    # ---------------------------------------------------------------------------------------------- what forms share

    def example(
        self,
        turns: list[dict[str, Any]],
        row: Mapping[str, Any],
        beside: list[str],
        *,
        plain: Example | None = None,
        wrap: bool = False,
        tools: list[Any] | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> Example:
        """The example of a conversation and what stands beside it.

        Args:
            turns: all turns, the answer among them.
            row: the row, for the columns `beside`: system text, tools and template arguments.
            beside: names of such columns.
            plain: the example where nothing stands beside.
            wrap: as in `tools_of`.
            tools, arguments: what the turns came with.
        """
        arguments = dict(arguments or {})
        for name in beside:
            if name in _SYSTEM:
                turns = _with_system(turns, content_text(row[name], f"`{name}`"), name)
            elif name in _TOOLS:
                found = tools_of(row[name], f"`{name}`", wrap=wrap or name == "functions", filled=self.filled)
                tools = found if found is not None else tools
            else:
                arguments |= _arguments(row[name])
        if "tools" in arguments:
            arguments_tools = tools_of(arguments.pop("tools"), f"`{ARGUMENTS}.tools`", wrap=wrap, filled=self.filled)
            if tools and arguments_tools and tools != arguments_tools:
                raise RowError(f"it has tools in a column and others in `{ARGUMENTS}`; keep one of the two")
            tools = tools if tools is not None else arguments_tools
        last = max((i for i, turn in enumerate(turns) if is_answer(turn)), default=None)
        if last is None:
            self._check_answerless(turns, row)
            prompt = _joined(turns)
            return plain._replace(prompt=prompt, response="") if plain else Example(prompt)
        if rest := len(turns) - last - 1:
            self._check_answerless(turns, row)
            self.report.counts["turns after the last answer left out"] += rest
        turns = turns[: last + 1]
        if len(turns) == 2 and tools is None and not arguments and _says_all(*turns):
            return plain or Example(turns[0]["content"], turns[1]["content"])
        whole = Conversation(tuple(turns), tools, arguments)
        # without `instruction`, so that no text of an Alpaca template goes without the other turns
        return Example(_joined(turns[:-1]), text_of_turn(turns[-1]), conversation=whole.to_json())

    def _check_answerless(self, turns: list[dict[str, Any]], row: Mapping[str, Any]) -> None:
        """Turns that end without an answer: with the answers beside them it is not theirs to be left out."""
        if row.get("chosen") or row.get("rejected"):
            refuse_other_uses(["chosen", "rejected"])
        if turns and not any(turn["role"] == "assistant" for turn in turns):
            roles = dict.fromkeys(turn["role"] for turn in turns)
            if unknown := [role for role in roles if role not in ("system", "developer", "user", "tool")]:
                raise RowError(
                    f"no turn is the assistant's, and {', '.join(map(repr, unknown))} may be it; name it `assistant`"
                )
            self.report.counts["rows without an answer"] += 1


def _joined(turns: list[dict[str, Any]]) -> str:
    return "\n\n".join(filter(None, map(text_of_turn, turns)))


def _says_all(question: dict[str, Any], answer: dict[str, Any]) -> bool:
    """Whether prompt and response alone say what these two turns say."""
    return question["role"] == "user" and question.keys() == answer.keys() == {"role", "content"}


def _with_system(turns: list[dict[str, Any]], text: str, name: str) -> list[dict[str, Any]]:
    if not text:
        return turns
    for turn in turns:
        if turn["role"] == "system" and turn["content"] != text:
            raise RowError(f"it has a system turn and another text in `{name}`; keep one of the two")
        if turn["role"] == "system":
            return turns
    return [{"role": "system", "content": text}, *turns]


def _arguments(value: Any) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    found = parsed(value, f"`{ARGUMENTS}`", "an object") if isinstance(value, str) else value
    if not isinstance(found, Mapping):
        raise RowError(f"`{ARGUMENTS}` must be an object: names and values of the template's arguments")
    if reserved := [name for name in _RESERVED if name in found]:
        raise RowError(f"`{ARGUMENTS}` must not hold {', '.join(reserved)}: the reader decides it")
    return {name: inner for name, inner in found.items() if inner is not None}


# -------------------------------------------------------------------------------------------------------- the forms


@dataclass(frozen=True)
class Form:
    """One form of rows."""

    needs: tuple[str, ...]
    """The columns by which it is known."""
    read: Callable[[RowReader, Mapping[str, Any], list[str]], Example]
    may: tuple[str, ...] = ()
    """Columns that it reads where they are."""
    holds_turns: bool = False
    quick: Callable[[Mapping[str, Any]], Example | None] | None = None
    """Reads plain rows of the form in less time; None for the others."""

    @property
    def columns(self) -> tuple[str, ...]:
        return self.needs + self.may


def _from_turns(name: str) -> Callable[[RowReader, Mapping[str, Any], list[str]], Example]:
    def read(reader: RowReader, row: Mapping[str, Any], beside: list[str]) -> Example:
        value, what = row[name], f"`{name}`"
        whole = parsed(value, what, "a list of turns") if isinstance(value, str) and value else value
        if isinstance(whole, Mapping) and "turns" in whole:  # what an examples table holds
            turns, tools, arguments = whole["turns"], whole.get("tools"), whole.get("template_kwargs")
            return reader.example(turns_of(turns, what, filled=False), row, beside, tools=tools, arguments=arguments)
        turns = turns_of(whole, what, filled=reader.filled and not isinstance(value, str))
        sharegpt = isinstance(whole, list | tuple) and any(turn.get("from") is not None for turn in whole)
        return reader.example(turns, row, beside, wrap=sharegpt)

    return read


def _from_instruction(answer: str) -> Callable[[RowReader, Mapping[str, Any], list[str]], Example]:
    def read(reader: RowReader, row: Mapping[str, Any], beside: list[str]) -> Example:
        instruction = _prompt(row.get("instruction"), "`instruction`")
        found = {name: text for name in _CONTEXT if (text := text_of(row.get(name), f"`{name}`"))}
        if len(found) > 1:
            raise RowError("`input` and `context` both hold text; join them in `input`")
        context = next(iter(found.values()), "")
        prompt = f"{instruction}\n\n{context}" if context else instruction
        answers = _answer(row.get(answer), answer, reader)
        plain = Example(prompt, _joined(answers), instruction, context)
        history = _history(row.get("history"), reader)
        if not history and not beside and len(answers) == 1 and len(answers[0]) == 2:
            return plain
        return reader.example([*history, {"role": "user", "content": prompt}, *answers], row, beside, plain=plain)

    return read


def _from_pair(answer: str) -> Callable[[RowReader, Mapping[str, Any], list[str]], Example]:
    def read(reader: RowReader, row: Mapping[str, Any], beside: list[str]) -> Example:
        prompt, response = row.get("prompt"), row.get(answer)
        if isinstance(prompt, str) and isinstance(response, str) and not beside and prompt[:1] not in "[ \n\t":
            return Example(prompt, response)
        as_text = isinstance(prompt, str)
        prompt = _turns_in_text(prompt)
        if are_turns(prompt) or (isinstance(prompt, Mapping) and are_turns([prompt])):
            turns, response = (
                turns_of(prompt, "`prompt`", filled=reader.filled and not as_text),
                _turns_in_text(response),
            )
            plain = None
        else:
            text = _prompt(prompt, "`prompt`")
            turns, plain = [{"role": "user", "content": text}], Example(text)
        answers = _answer(response, answer, reader)
        if plain is not None:
            plain = plain._replace(response=_joined(answers))
            if not beside and len(answers) == 1 and answers[0].keys() == {"role", "content"}:
                return plain
        return reader.example([*turns, *answers], row, beside, plain=plain)

    return read


def _turns_in_text(value: Any) -> Any:
    """Turns that lie as JSON text where a text could be; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = parsed(value, "", "")
    except RowError:
        return value
    return found if are_turns(found) else value


def _prompt(value: Any, what: str) -> str:
    """The text of a prompt; a list is none, but the columns of several rows, perhaps."""
    if isinstance(value, list | tuple):
        raise RowError(f"{what} is a list, and not of turns; write one prompt a row, as text or as turns")
    return text_of(value, what)


def _answer(value: Any, name: str, reader: RowReader) -> list[dict[str, Any]]:
    """The turns of an answer: text, or turns themselves."""
    if are_turns(value) or (isinstance(value, Mapping) and are_turns([value])):
        return turns_of(value, f"`{name}`", filled=reader.filled)
    return [{"role": "assistant", "content": text_of(value, f"`{name}`")}]


def _history(value: Any, reader: RowReader) -> list[dict[str, Any]]:
    """The earlier turns of an Alpaca row: pairs of instruction and answer, or turns."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = parsed(value, "`history`", "a list of pairs")
    if are_turns(value):
        return turns_of(value, "`history`", filled=reader.filled)
    turns = []
    for pair in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("`history` must be a list of pairs, each an instruction and its answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": text_of(text, "`history`")})
    return turns


def _from_text(reader: RowReader, row: Mapping[str, Any], beside: list[str]) -> Example:
    return Example(text=text_of(row.get("text"), "`text`"))


def _two_texts(first: str, answer: str) -> Callable[[Mapping[str, Any]], Example | None]:
    """Reads the rows that nearly all data sets consist of: a question and an answer, each a text that is there."""

    def read(row: Mapping[str, Any]) -> Example | None:
        question, response = row[first], row[answer]
        if type(question) is not str or type(response) is not str or not question or not response:
            return None
        if first == "prompt":
            return None if question[0] in "[ \n\t" else Example(question, response)
        context = row.get("input") or ""
        if not context:
            context = row.get("context") or ""
        elif row.get("context"):
            return None
        if type(context) is not str:
            return None
        return Example(f"{question}\n\n{context}" if context else question, response, question, context)

    return read


@dataclass
class _Shape:
    """What the names of a row's columns alone say."""

    form: Form | None
    """The form that the row has if it fills the form's columns; None where it lacks a column of each."""
    matters: tuple[str, ...] = ()
    """Columns beside that make the row something else unless they are empty."""
    met: bool = False

    @classmethod
    def of(cls, columns: tuple[str, ...]) -> _Shape:
        forms = (*_FORMS, _CORPUS)
        form = next((form for form in forms if all(name in columns for name in form.needs)), None)
        if form is None or form.quick is None:
            return cls(form)
        plain = (*form.needs, *_CONTEXT) if form.needs[0] == "instruction" else form.needs
        special = {*REFUSED, *REFUSED_BESIDE_TEXTS, *_READ_BESIDE, "history", "label", "rejected"}.difference(plain)
        return cls(form, tuple(name for name in columns if name in special))

    def quick(self, row: Mapping[str, Any]) -> Example | None:
        """The example, where the row is plainly of the form; None where it takes a second look."""
        if self.form is None or self.form.quick is None:
            return None
        for name in self.matters:
            if row[name] is not None and row[name] != "":
                return None
        return self.form.quick(row)


_FORMS = (
    *(Form((name,), _from_turns(name), holds_turns=True) for name in ("messages", "conversations", "conversation")),
    *(
        Form(
            ("instruction", answer),
            _from_instruction(answer),
            (*_CONTEXT, "history"),
            quick=_two_texts("instruction", answer),
        )
        for answer in ("output", "response")
    ),
    *(
        Form(("prompt", answer), _from_pair(answer), quick=_two_texts("prompt", answer))
        for answer in ("completion", "response")
    ),
)
_CORPUS = Form(("text",), _from_text)
