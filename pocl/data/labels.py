"""Where in the rendered text of a conversation the answers are: what the model is to say, and learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pocl.data.conversation import Conversation, is_answer
from pocl.data.templates import ChatTemplate

LABELS = ("last", "all")
_OTHER = "\ue000 other words \ue000"  # in place of a turn's content, to see what the template makes of it


@dataclass(frozen=True)
class Rendered:
    """A conversation and its text. Special tokens in the data are hidden in both (see `special`)."""

    sample_id: Any
    talk: Conversation
    text: str
    """The whole conversation."""
    prompt: str
    """The turns before the last one, and the opening of the answer."""
    marks: tuple[tuple[int, int], ...] | None = None
    """What the template marks as generated; None with a template that marks nothing."""
    hidden: bool = False
    """Whether the data held special tokens."""


@dataclass(frozen=True)
class Answers:
    """The parts of a text that carry labels, in characters [start, stop), in order and apart from each other."""

    spans: tuple[tuple[int, int], ...]
    start: int
    """Where the last turn's answer begins: before it is what the model sees when it answers."""
    closed: bool
    """Whether the last span ends with a token that ends an answer."""


def find_answers(chat: ChatTemplate, rendered: Rendered, labels: str) -> Answers:
    """Finds the last assistant turn, or all that are to be learnt, each with the token that closes it.

    A turn begins where the generation prompt of the conversation so far ends. Where the template writes the turn in
    another way than its generation prompt promises (it drops a thought that the prompt opens, say), the turn is what
    changes in the text when the turn says something else.

    Raises:
        ValueError: the template leaves a part of the conversation out; names the sample.
    """
    last = len(rendered.talk.turns) - 1
    if rendered.marks is not None:
        return _marked_answers(chat, rendered, labels)
    wanted = [i for i, turn in enumerate(rendered.talk.turns) if is_answer(turn) or i == last]
    wanted = wanted if labels == "all" else [last]
    jobs = [chat.job(rendered.sample_id, rendered.talk, i, prompt=True) for i in wanted if 0 < i < last]
    prompts = iter(chat.render(jobs))
    spans: list[tuple[int, int]] = []
    closed = False
    for i in wanted:
        prompt = rendered.prompt if i == last else next(prompts) if i else ""
        start = _start(chat, rendered, i, prompt)
        if start is None and i < last:  # nothing is left of it, a thought alone for example
            continue
        if start is None or (spans and start < spans[-1][1]):
            raise ValueError(
                f"sample {rendered.sample_id}: the chat template writes turn {i + 1} of {last + 1} in such a way that "
                'it cannot be found in the text; use data.labels "last", another template, or leave the sample out'
            )
        stop, closed = _stop(chat, rendered, i, start)
        spans.append((start, stop))
    return Answers(tuple(spans), spans[-1][0], closed)


def _start(chat: ChatTemplate, rendered: Rendered, i: int, prompt: str) -> int | None:
    """Where turn `i` begins in the text; None if the text does not depend on what it says."""
    text = rendered.text
    if i and text.startswith(prompt):
        return len(prompt)
    other = _said_otherwise(chat, rendered, i)
    if other == text:
        return None
    changes = _shared(text, other)
    # What the template puts between the opening and the words (an empty thought) is for the model to say as well.
    opener = chat.scaffold.opener
    opening = prompt[prompt.rfind(opener) :] if opener and opener in prompt else ""
    found = text.rfind(opening, 0, changes) if opening else -1
    after = found + len(opening)
    end = chat.scaffold.end
    return after if found >= 0 and not (end and text.find(end, after, changes) >= 0) else changes


def _stop(chat: ChatTemplate, rendered: Rendered, i: int, start: int) -> tuple[int, bool]:
    """Where turn `i` ends, its closing token included, and whether it has one."""
    text, scaffold = rendered.text, chat.scaffold
    last = i == len(rendered.talk.turns) - 1
    if last:
        if scaffold.end is not None and (at := text.rfind(scaffold.end, start)) >= 0:
            return at + len(scaffold.end), True
        stop = start + len(text[start:].rstrip())
        return stop, any(text.endswith(token, start, stop) for token in chat.added)
    bound = min((at for token in scaffold.openers if (at := text.find(token, start)) >= 0), default=len(text))
    if scaffold.end is not None:
        own = str(rendered.talk.turns[i].get("content") or "").count(scaffold.end)  # not hidden, if that is wanted
        at = text.find(scaffold.end, start)
        for _ in range(own):
            at = text.find(scaffold.end, at + 1)
        if at >= 0 and (own or at < bound):
            return at + len(scaffold.end), True
        return start + len(text[start:bound].rstrip()), False
    other = _said_otherwise(chat, rendered, i)
    same = _shared(text[::-1], other[::-1])
    stop = max(start, len(text) - same)
    return stop + len(scaffold.closing) * text.startswith(scaffold.closing, stop), False


def _marked_answers(chat: ChatTemplate, rendered: Rendered, labels: str) -> Answers:
    """The answers that the template marks; the token that closes a turn is taken in where it follows."""
    text, end = rendered.text, chat.scaffold.end
    begin = _start(chat, rendered, len(rendered.talk.turns) - 1, rendered.prompt)
    spans = []
    for start, stop in rendered.marks or ():
        closes = end is not None and text.startswith(end, stop)
        spans.append((start, stop + len(end or "") * closes))
    of_last = [span for span in spans if begin is not None and span[1] > begin]
    if not of_last:
        raise ValueError(
            f"sample {rendered.sample_id}: the chat template marks nothing of the last turn as generated; mend its "
            "{% generation %} blocks, or take them out of the template"
        )
    chosen = of_last
    if labels == "all":
        passed = _passed_over(chat, rendered)
        chosen = [span for span in spans if not any(first < span[1] and span[0] < stop for first, stop in passed)]
    start, stop = chosen[-1]
    return Answers(
        tuple(chosen), min(begin or 0, of_last[0][0]), any(text.endswith(token, start, stop) for token in chat.added)
    )


def _passed_over(chat: ChatTemplate, rendered: Rendered) -> list[tuple[int, int]]:
    """The answers that are not to be learnt."""
    turns = rendered.talk.turns
    passed = [i for i, turn in enumerate(turns[:-1]) if turn["role"] == "assistant" and not is_answer(turn)]
    prompts = chat.render([chat.job(rendered.sample_id, rendered.talk, i, prompt=True) for i in passed if i])
    starts = {i: _start(chat, rendered, i, prompts[-1 - n] if i else "") for n, i in enumerate(reversed(passed))}
    return [(start, _stop(chat, rendered, i, start)[0]) for i, start in starts.items() if start is not None]


def _shared(one: str, other: str) -> int:
    """How many characters at their start two texts share."""
    both = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))


def _said_otherwise(chat: ChatTemplate, rendered: Rendered, i: int) -> str:
    """The text if turn `i` said something else."""
    turns = list(rendered.talk.turns)
    turns[i] = {**turns[i], "content": _OTHER}
    for name in ("tool_calls", "reasoning_content", "thinking"):
        turns[i].pop(name, None)
    talk = replace(rendered.talk, turns=tuple(turns))
    return chat.render([chat.job(rendered.sample_id, talk)])[0]


def check_written(chat: ChatTemplate, rendered: Rendered) -> None:
    """Refuses a conversation that the template writes in part only.

    Raises:
        ValueError: a turn or tool calls are not in the text; names the sample.
    """
    turns, text = rendered.talk.turns, rendered.text
    for i, turn in enumerate(turns):
        said = str(turn.get("content") or "").rpartition("</think>")[2].strip()
        if said and said not in text and _leaves_out(chat, rendered, i):
            raise ValueError(
                f"sample {rendered.sample_id}: the chat template leaves out turn {i + 1} of {len(turns)} (role "
                f"{turn['role']}), so the model would not see it; use another template, or leave the sample out"
            )
    names: dict[str, int] = {}
    for turn in turns:
        for call in turn.get("tool_calls") or []:
            name = _name_of(call)
            names[name] = names.get(name, 0) + 1
    if names and ("tool_calls" not in chat.source(rendered.talk.tools) or _too_few(names, text)):
        raise ValueError(
            f"sample {rendered.sample_id}: the chat template leaves out tool calls ({', '.join(names)}); use a model "
            "whose template writes them, or leave the sample out"
        )


def _leaves_out(chat: ChatTemplate, rendered: Rendered, i: int) -> bool:
    try:
        return _said_otherwise(chat, rendered, i) == rendered.text
    except ValueError:  # the template reads the content, and does not like the other one
        return False


def _too_few(names: Mapping[str, int], text: str) -> bool:
    return any(text.count(name) < count for name, count in names.items())


def _name_of(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""


def drops_thought(rendered: Rendered) -> bool:
    """Whether the answer was thought about, and the thought is not in the text."""
    turn = rendered.talk.turns[-1]
    before, closes, _ = str(turn.get("content") or "").rpartition("</think>")
    thought = before.rpartition("<think>")[2] if closes else turn.get("reasoning_content") or turn.get("thinking") or ""
    words = str(thought).strip()
    return bool(words) and words not in rendered.text


def token_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Tokens [first, stop) for characters [start, stop): every token with a character in it, once."""
    found: list[tuple[int, int]] = []
    i = 0
    for start, stop in spans:
        while i < len(offsets) and offsets[i][1] <= start:
            i += 1
        first = i
        while i < len(offsets) and offsets[i][0] < stop:
            i += 1
        found.append((first, i))
    return found
