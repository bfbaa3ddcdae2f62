"""How a conversation becomes text: the tokenizer's chat template, the paper's Alpaca text, or the bare texts.

A chat template is asked through `apply_chat_template`, and what it writes is never mended. What it does not tell, such
as the token that closes a turn, is read off the text that it makes of a small conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from pocl.data.conversation import Conversation, conversation_of

TEMPLATES = ("auto", "chat", "alpaca", "plain")

# The text of the paper's experiments: Stanford Alpaca's, as used by MiniLLM (arXiv 2306.08543) and its successors.
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_ALPACA_SYSTEM_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

# What `apply_chat_template` takes for itself.
_RESERVED = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "sanitize_control_tokens",
    }
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def resolve_template(template: str, tokenizer: Any) -> str:
    """`auto` is `chat` where the tokenizer has a chat template, else `alpaca`; others are checked and returned."""
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "auto":
        return "chat" if has_chat else "alpaca"
    if template == "chat" and not has_chat:
        raise ValueError('template="chat" needs a tokenizer with a chat template; use "alpaca" or "plain"')
    return template


def check_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuses arguments that are not the template's but `apply_chat_template`'s own.

    Raises:
        ValueError: names them.
    """
    if taken := sorted(_RESERVED & set(kwargs)):
        raise ValueError(
            f"template_kwargs holds {', '.join(taken)}, which the library sets itself; it is for variables of the chat "
            "template, such as enable_thinking"
        )


# ------------------------------------------------------------------------------------------------------- without a chat


def plain_prompt(example: Mapping[str, Any], talk: Conversation, template: str) -> str:
    """What stands before the answer under `alpaca` or `plain`.

    One question is the text of the paper's experiments. In a conversation a system turn takes the place of Alpaca's own
    opening, and each further question gets sections of its own; `plain` puts a blank line between the turns.

    Raises:
        ValueError: tools, tool calls or roles that these texts have no form for; names the sample.
    """
    turns = talk.turns[:-1]
    odd = sorted({f"role {turn['role']}" for turn in turns} - {"role system", "role user", "role assistant"})
    odd += ["tools"] if talk.tools else []
    odd += ["tool calls"] if any(turn.get("tool_calls") for turn in talk.turns) else []
    if odd:
        raise ValueError(
            f"sample {example['id']} has {', '.join(odd)}, which template={template!r} cannot write; use a tokenizer "
            "whose chat template can, or leave the sample out"
        )
    if template == "plain":
        return "\n\n".join(text for turn in turns if (text := turn.get("content") or ""))
    instruction, given = example.get("instruction"), example.get("input") or ""
    opening = _ALPACA_SYSTEM_WITH_INPUT if given else _ALPACA_SYSTEM
    parts: list[str] = []
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    for i, turn in enumerate(turns):
        text = turn.get("content") or ""
        if turn["role"] == "system":
            opening = text if not parts else opening
            parts += [text] if parts else []
        elif turn["role"] == "assistant":
            parts.append(f"### Response:\n{text}")
        elif i == last and instruction:
            parts.append(f"### Instruction:\n{instruction}" + (f"\n\n### Input:\n{given}" if given else ""))
        else:
            parts.append(f"### Instruction:\n{text}")
    return "\n\n".join([opening, *parts, "### Response:\n"])


# -------------------------------------------------------------------------------------------------------- chat template


class Job(NamedTuple):
    """One text to render."""

    sample_id: Any
    turns: Sequence[Mapping[str, Any]]
    tools: list[Any] | None
    kwargs: Mapping[str, Any]
    prompt: bool
    """Open the assistant's turn at the end (the generation prompt)."""


@dataclass(frozen=True)
class Scaffold:
    """What a template writes around the texts of a conversation."""

    end: str | None
    """The token that closes an assistant's turn; None where the template closes none."""
    closing: str
    """All that follows an answer at the end of a conversation, without white space at its end."""
    opener: str | None
    """The last token of the generation prompt that stands alone, whatever is around it; None where it has none."""
    openers: tuple[str, ...]
    """Tokens that begin a turn."""
    tokens: frozenset[str]
    """The added tokens that the template itself writes."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a tokenizer with one.
        kwargs: further variables of the template, for all conversations.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.kwargs = tokenizer, dict(kwargs or {})
        check_template_kwargs(self.kwargs)
        self.added = added_tokens(tokenizer)

    def source(self, tools: list[Any] | None) -> str:
        """The template's own text (a tokenizer may have another one for conversations with tools)."""
        return str(self.tokenizer.get_chat_template(None, tools))

    def marks_answers(self, tools: list[Any] | None) -> bool:
        """Whether the template marks what is generated (`{% generation %}`)."""
        return bool(_GENERATION.search(self.source(tools)))

    def job(self, sample_id: Any, talk: Conversation, num_turns: int | None = None, *, prompt: bool = False) -> Job:
        """The rendering of a conversation, or of its first turns."""
        return Job(sample_id, talk.turns[:num_turns], talk.tools, {**self.kwargs, **talk.template_kwargs}, prompt)

    def render(self, jobs: Sequence[Job]) -> list[str]:
        """The text of every job, as `apply_chat_template` gives it; jobs of one kind in one call.

        Raises:
            ValueError: the template refuses a conversation; names the sample, the template's reason and what to do.
        """
        texts = [""] * len(jobs)
        for numbers in _of_one_kind(jobs):
            first = jobs[numbers[0]]
            options = {"tools": first.tools, "add_generation_prompt": first.prompt, **first.kwargs}
            try:
                made = self.tokenizer.apply_chat_template(
                    [list(jobs[i].turns) for i in numbers], tokenize=False, **options
                )
            except Exception as error:
                if len(numbers) == 1:
                    raise self._refusal(first, error) from error
                made = [text for i in numbers for text in self.render([jobs[i]])]  # to name the sample
            for i, text in zip(numbers, made, strict=True):
                texts[i] = text
        return texts

    def render_marked(self, job: Job) -> tuple[str, list[tuple[int, int]]]:
        """The text of a job and the parts of it [start, stop) that the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [{key: value for key, value in turn.items() if value is not None} for turn in job.turns]
        try:
            texts, marks = render_jinja_template(
                conversations=[turns],
                tools=job.tools,
                chat_template=self.source(job.tools),
                return_assistant_tokens_mask=True,
                add_generation_prompt=job.prompt,
                **{**self.tokenizer.special_tokens_map, **job.kwargs},
            )
        except Exception as error:
            raise self._refusal(job, error) from error
        return texts[0], [(start, stop) for start, stop in marks[0] if stop > start]

    def _refusal(self, job: Job, error: Exception) -> ValueError:
        """What to say of a conversation that the template does not render."""
        reason = str(error).strip() or type(error).__name__
        said = type(error).__name__ == "TemplateError"  # `raise_exception` in the template
        roles = [str(turn["role"]) for turn in job.turns]
        other = ', or use template "alpaca" or "plain"'
        if any(turn.get("tool_calls") for turn in job.turns):
            other, advice = "", "change its tool calls to what the template allows, or leave the sample out"
            if "tool_calls" not in self.source(job.tools):
                advice = "the template writes no tool calls: use a model whose template does, or leave the sample out"
        elif "system" in reason.lower() and "system" in roles:
            advice = "put the text of its system turn into the first user turn, or leave the sample out"
        elif "alternat" in reason.lower():
            advice = "join neighbouring turns of one role, or leave the sample out"
        else:
            advice = "change the sample to what the template allows, or leave it out"
        return ValueError(
            f"the chat template {'refuses' if said else 'cannot render'} sample {job.sample_id} "
            f"(roles {', '.join(roles)}): {reason if said else f'{type(error).__name__}: {reason}'}; {advice}{other}"
        )

    @cached_property
    def scaffold(self) -> Scaffold:
        """What the template writes around a small conversation."""
        question, answer = "what is asked", "what is said"
        user, said = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        system = {"role": "system", "content": "what holds"}
        for before in ([user], [system, user]):
            whole = self._try([*before, said], prompt=False)
            prompt = self._try(before, prompt=True)
            if whole is not None and prompt is not None and answer in whole:
                break
        else:
            return Scaffold(None, "", None, (), frozenset())
        tail = whole[whole.rindex(answer) + len(answer) :]
        end = next((token.group() for token in self._tokens_in(tail)), None)
        opening = [token.group() for token in self._tokens_in(prompt[prompt.rfind(question) :])]
        longer = self._try([*before, said, user, said], prompt=False) or ""
        after = longer[longer.find(answer) + len(answer) : longer.rfind(question)]
        begins = [[token.group() for token in self._tokens_in(after)], opening]
        openers = tuple({found[0] for words in begins if (found := [word for word in words if word != end])})
        texts = [whole, prompt, longer, self._try([system, user, said], prompt=False) or ""]
        tokens = frozenset(token.group() for text in texts for token in self._tokens_in(text))
        return Scaffold(end, tail.rstrip(), opening[-1] if opening else None, openers, tokens)

    def _tokens_in(self, text: str) -> Iterator[re.Match[str]]:
        return self._pattern.finditer(text)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return any_of(self.added)

    def _try(self, turns: list[dict[str, Any]], *, prompt: bool) -> str | None:
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=prompt, **self.kwargs
            )
        except Exception:  # a template may refuse whatever it likes
            return None
        return str(text)


def _of_one_kind(jobs: Sequence[Job]) -> list[list[int]]:
    """Numbers of the jobs that share tools, arguments and the generation prompt."""
    kinds: dict[Any, list[int]] = {}
    for i, job in enumerate(jobs):
        plain = job.tools is None and not job.kwargs
        key = job.prompt if plain else (job.prompt, json.dumps([job.tools, dict(job.kwargs)], default=repr))
        kinds.setdefault(key, []).append(i)
    return list(kinds.values())


# ------------------------------------------------------------------------------------------------------- added tokens


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that are matched as a whole in any text, special or not, but for those of white space alone."""
    found = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {token.content: int(index) for index, token in found.items() if token.content.strip()}


def special_tokens(tokenizer: Any) -> set[str]:
    """Those of them that are special: they never stand for their own letters."""
    found = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {token.content for token in found.values() if token.special and token.content.strip()}


def any_of(words: Sequence[str] | Mapping[str, Any] | set[str] | frozenset[str]) -> re.Pattern[str]:
    """A pattern that finds any of the words, the longest first; none matches nothing."""
    longest = sorted(words, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def answer_ends(tokenizer: Any) -> list[int]:
    """The ids by which a tokenizer ends an answer: its EOS, and what its chat template closes a turn with.

    This is the rule of the whole library; `pocl.generation.end_tokens` adds what a model's generation config names.
    """
    ids = [] if getattr(tokenizer, "eos_token_id", None) is None else [int(tokenizer.eos_token_id)]
    if getattr(tokenizer, "chat_template", None):
        chat = ChatTemplate(tokenizer)
        end = chat.scaffold.end
        ids += [] if end is None else [chat.added[end]]
    return sorted(set(ids))


def render_prompt(
    example: Mapping[str, Any], tokenizer: Any, template: str, template_kwargs: Mapping[str, Any] | None = None
) -> str:
    """The text a model sees before it answers; `template` is resolved (not `auto`)."""
    talk = conversation_of(example)
    if template != "chat":
        return plain_prompt(example, talk, template)
    chat = ChatTemplate(tokenizer, template_kwargs)
    return chat.render([chat.job(example.get("id"), talk, -1, prompt=True)])[0]
