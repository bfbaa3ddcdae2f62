"""From an example to a row of token ids: the template's own text, cut to length, with labels on the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pocl.data.conversation import Conversation, conversation_of, is_answer
from pocl.data.labels import LABELS, Rendered, check_written, drops_thought, find_answers, token_spans
from pocl.data.report import DataReport
from pocl.data.special import SPECIAL_TOKENS, SpecialText
from pocl.data.templates import ChatTemplate, plain_prompt, resolve_template
from pocl.data.templates import special_tokens as special_words
from pocl.data.tokens import Tokens

IGNORE_INDEX = -100
_LONGEST_OPENING = 64  # characters; a longer one holds words of the data, and is not the same again
_OPENINGS = 64
_NEAR = 16  # tokens


@dataclass(frozen=True)
class _Encoded:
    """An example as tokens, before it is cut."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """The tokens with labels, [start, stop); the last one ends the row."""
    start: int
    """Where the last answer begins."""


class Encoder:
    """Turns examples into token rows (see `tokenize` for the arguments) and counts what it had to do.

    Attributes:
        counts: by the names of `DataReport`'s fields; those of several encoders may be added up.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        max_length: int,
        max_prompt_length: int,
        *,
        labels: str = "last",
        template_kwargs: Mapping[str, Any] | None = None,
        special_tokens: str = "text",
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer has no EOS token, so a response could not end; set tokenizer.eos_token, or `eos_token` in "
                "tokenizer_config.json of the student's folder"
            )
        if max_length < 4 or max_prompt_length < 1:
            raise ValueError(
                "max_length must be at least 4 and max_prompt_length at least 1, "
                f"got {max_length} and {max_prompt_length}"
            )
        for name, value, allowed in (("labels", labels, LABELS), ("special_tokens", special_tokens, SPECIAL_TOKENS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        self.tokenizer, self.template = tokenizer, resolve_template(template, tokenizer)
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.labels, self.special_tokens = labels, special_tokens
        self.template_kwargs = dict(template_kwargs or {})
        self.counts = {f.name: 0 for f in fields(DataReport) if f.name not in ("num_examples", "num_samples")}
        self._tokens = Tokens(tokenizer)
        self._chat = ChatTemplate(tokenizer, self.template_kwargs) if self.template == "chat" else None
        written = self._chat.scaffold.tokens if self._chat else frozenset()
        self._special = SpecialText(tokenizer, special_words(tokenizer) | written)
        self._openings: dict[str, list[int]] = {}

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of an example (`id`, `prompt`, `response`, ...), None if its prompt or response has no text."""
        return self.encode_batch([example])[0]

    def encode_batch(self, examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
        """The rows of examples, in their order; None for one whose prompt or response has no text.

        A few hundred at a time are fastest: they share the calls of the template and of the tokenizer.
        """
        kept = [i for i, example in enumerate(examples) if self._has_text(example)]
        chosen = [examples[i] for i in kept]
        encoded = self._encode_plain(chosen) if self._chat is None else self._encode_chat(self._chat, chosen)
        rows: list[dict[str, Any] | None] = [None] * len(examples)
        for i, found in zip(kept, encoded, strict=True):
            rows[i] = self._row(examples[i]["id"], found)
        return rows

    def report(self, num_examples: int, num_samples: int) -> DataReport:
        """The counts so far."""
        return DataReport(num_examples=num_examples, num_samples=num_samples, **self.counts)

    def _has_text(self, example: Mapping[str, Any]) -> bool:
        for column, count in (("response", "empty_responses"), ("prompt", "empty_prompts")):
            if not example[column].strip():
                self.counts[count] += 1
                return False
        return True

    # ----------------------------------------------------------------------------------------------- chat template

    def _encode_chat(self, chat: ChatTemplate, examples: Sequence[Mapping[str, Any]]) -> list[_Encoded]:
        rendered = self._render(chat, examples)
        simple = self.labels == "last" and chat.scaffold.end is not None and self._tokens.is_fast
        quick = [i for i, one in enumerate(rendered) if simple and one.marks is None and not one.hidden]
        found: dict[int, _Encoded] = {}
        for i, ids in zip(quick, self._tokens.ids([rendered[i].text for i in quick]), strict=True):
            if (made := self._last_answer(chat, rendered[i], ids)) is not None:
                found[i] = made
        careful = [i for i, one in enumerate(rendered) if i not in found and not one.hidden]
        hidden = [i for i, one in enumerate(rendered) if one.hidden]
        placed = self._tokens.ids_and_offsets([rendered[i].text for i in careful])
        placed += self._special.encode([rendered[i].text for i in hidden])
        for i, (ids, offsets) in zip([*careful, *hidden], placed, strict=True):
            found[i] = self._answers(chat, rendered[i], ids, offsets)
        return [found[i] for i in range(len(rendered))]

    def _render(self, chat: ChatTemplate, examples: Sequence[Mapping[str, Any]]) -> list[Rendered]:
        """The texts of the conversations, checked against what they should hold."""
        names, talks = [example["id"] for example in examples], [conversation_of(example) for example in examples]
        hidden = {i: talk for i, one in enumerate(examples) if (talk := self._hide(one, talks[i])) is not None}
        as_written = dict(zip(hidden, chat.render([chat.job(names[i], talks[i]) for i in hidden]), strict=True))
        talks = [hidden.get(i, talk) for i, talk in enumerate(talks)]
        marked = {i for i, talk in enumerate(talks) if chat.marks_answers(talk.tools)}
        jobs = {i: chat.job(names[i], talk) for i, talk in enumerate(talks)}
        others = [i for i in jobs if i not in marked]
        texts = dict(zip(others, chat.render([jobs[i] for i in others]), strict=True))
        prompts = chat.render([chat.job(name, t, -1, prompt=True) for name, t in zip(names, talks, strict=True)])
        rendered = []
        for i, talk in enumerate(talks):
            text, marks = chat.render_marked(jobs[i]) if i in marked else (texts[i], None)
            one = Rendered(names[i], talk, text, prompts[i], None if marks is None else tuple(marks), i in hidden)
            if i in hidden and self._special.shown(text) != as_written[i]:
                raise ValueError(
                    f"sample {names[i]} writes special tokens in its text, and the chat template reads them; pass "
                    'special_tokens="tokens" (data.special_tokens) to let them be tokens, or leave the sample out'
                )
            check_written(chat, one)
            self.counts["dropped_thoughts"] += drops_thought(one)
            self.counts["unwritten_tools"] += bool(talk.tools) and "tools" not in chat.source(talk.tools)
            rendered.append(one)
        return rendered

    def _hide(self, example: Mapping[str, Any], talk: Conversation) -> Conversation | None:
        """The conversation with its special tokens hidden; None if it has none, or they are wanted."""
        raw = [example["conversation"]] if example.get("conversation") else [example["prompt"], example["response"]]
        if self.special_tokens == "tokens" or not any(map(self._special.suspects, raw)):
            return None
        hidden = self._special.hide(talk)
        self.counts["special_as_text"] += hidden is not None
        return hidden

    def _last_answer(self, chat: ChatTemplate, rendered: Rendered, ids: list[int]) -> _Encoded | None:
        """The answer of the last turn, by the tokens before and behind it; None where that takes a closer look."""
        opener, end, text, prompt = chat.scaffold.opener, chat.scaffold.end, rendered.text, rendered.prompt
        if opener is None or end is None or not text.startswith(prompt) or text.find(opener, len(prompt)) >= 0:
            return None
        opening = self._opening(prompt[prompt.rfind(opener) :] if opener in prompt else "")
        if not opening or opening[0] not in ids or chat.added[end] not in ids:
            return None
        backwards = ids[::-1]
        start = len(ids) - 1 - backwards.index(opening[0])
        stop = len(ids) - backwards.index(chat.added[end])
        # where a token reaches over the border of prompt and answer, the ids there are others
        if ids[start : start + len(opening)] != opening or stop <= start + len(opening):
            return None
        start += len(opening)
        return _Encoded(ids[:stop], [(start, stop)], start)

    def _opening(self, text: str) -> list[int]:
        """The ids of the end of a prompt, which are the same in most; none if it is not worth keeping."""
        if text not in self._openings:
            if not 0 < len(text) <= _LONGEST_OPENING or len(self._openings) >= _OPENINGS:
                return []
            self._openings[text] = self._tokens.ids([text])[0]
        return self._openings[text]

    def _answers(
        self, chat: ChatTemplate, rendered: Rendered, ids: list[int], offsets: list[tuple[int, int]] | None
    ) -> _Encoded:
        """Every labelled answer, by its place in the text."""
        answers = find_answers(chat, rendered, self.labels)
        whole = (answers.start, answers.spans[-1][1])
        if offsets is None:
            border = {p: self._tokens_before(rendered, p, ids) for span in [*answers.spans, whole] for p in span}
            spans, start = [(border[first], border[stop]) for first, stop in answers.spans], border[answers.start]
        else:
            spans, start = token_spans(offsets, answers.spans), token_spans(offsets, [whole])[0][0]
        ids = ids[: spans[-1][1]]
        if not answers.closed:
            self.counts["added_ends"] += 1
            ids, spans = [*ids, self.tokenizer.eos_token_id], [*spans[:-1], (spans[-1][0], spans[-1][1] + 1)]
        return _Encoded(ids, spans, start)

    def _tokens_before(self, rendered: Rendered, place: int, ids: list[int]) -> int:
        """How many tokens end at a character or before it, with a tokenizer that does not say where its tokens are."""
        before = rendered.text[:place]
        own = self._special.encode([before])[0][0] if rendered.hidden else self._tokens.ids([before])[0]
        same = 0
        while same < min(len(own), len(ids)) and own[same] == ids[same]:
            same += 1
        # what follows may have changed the tokens before the border, and yet none reaches over it
        near = range(same + 1, min(same + _NEAR, len(ids)) + 1)
        shown = self._special.shown(before)
        return next((n for n in near if self.tokenizer.decode(ids[:n]) == shown), same)

    # ------------------------------------------------------------------------------------------- the other templates

    def _encode_plain(self, examples: Sequence[Mapping[str, Any]]) -> list[_Encoded]:
        """The prompt's own tokens and those of the answer behind it, closed by EOS."""
        prompts, wholes, answers = [], [], []
        for example in examples:
            talk = conversation_of(example)
            if self.labels == "all" and sum(map(is_answer, talk.turns)) > 1:
                raise ValueError(
                    f"sample {example['id']} has several answers, and template={self.template!r} closes none but the "
                    'last; use labels="last" (data.labels), or a tokenizer with a chat template'
                )
            prompt, answer = plain_prompt(example, talk, self.template), example["response"]
            prompts.append(prompt)
            wholes.append(prompt + answer)
            answers.append(answer)
        of_prompts, of_wholes = self.plain_ids(prompts), self.plain_ids(wholes)
        # Joint encoding keeps sentence-piece spaces right; where a merge crosses the border the two are encoded apart,
        # because at generation time the model sees the prompt's own tokens.
        apart = [
            i
            for i, (prompt, whole) in enumerate(zip(of_prompts, of_wholes, strict=True))
            if whole[: len(prompt)] != prompt or len(whole) == len(prompt)
        ]
        for i, answer in zip(apart, self.plain_ids([answers[i] for i in apart], special=False), strict=True):
            of_wholes[i] = of_prompts[i] + answer
        return [
            _Encoded([*whole, self.tokenizer.eos_token_id], [(len(prompt), len(whole) + 1)], len(prompt))
            for prompt, whole in zip(of_prompts, of_wholes, strict=True)
        ]

    def plain_ids(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """The ids of texts under no template, their end open; `special` adds the BOS if the model has one."""
        found = self._tokens.ids(texts, special=special)
        if self.special_tokens == "text":
            suspects = {
                i: self._special.hide_text(text) for i, text in enumerate(texts) if self._special.suspects(text)
            }
            hidden = [i for i, text in suspects.items() if text != texts[i]]
            made = self._special.encode([suspects[i] for i in hidden], special=special)
            for i, (ids, _) in zip(hidden, made, strict=True):
                found[i] = ids
        eos = self.tokenizer.eos_token_id
        for ids in found:
            # Some tokenizers close every text with EOS; a prompt must stay open.
            while special and len(ids) > 1 and ids[-1] == eos:
                ids.pop()
        return found

    # -------------------------------------------------------------------------------------------------------- rows

    def _row(self, sample_id: Any, encoded: _Encoded) -> dict[str, Any]:
        ids, spans, start = self._cut(encoded)
        labels = [IGNORE_INDEX] * len(ids)
        for first, stop in spans:
            labels[first:stop] = ids[first:stop]
        learnt = sum(stop - first for first, stop in spans)
        self.counts["response_tokens"] += learnt
        self.counts["prompt_tokens"] += len(ids) - learnt
        return {"sample_id": sample_id, "input_ids": ids, "labels": labels, "prompt_length": start}

    def _cut(self, encoded: _Encoded) -> tuple[list[int], list[tuple[int, int]], int]:
        """Ids, labelled tokens and start of the last answer, cut to the limits."""
        ids, spans = encoded.ids, encoded.spans
        prompt = spans[0][0]
        room = min(self.max_prompt_length, max(1, self.max_length // 4, self.max_length - (len(ids) - prompt)))
        off = max(0, prompt - room)
        self.counts["cut_prompts"] += off > 0
        ids, spans = ids[off:], [(first - off, stop - off) for first, stop in spans]
        if len(ids) > self.max_length:
            ids = ids[: self.max_length]
            spans = [(first, min(stop, len(ids))) for first, stop in spans if first < len(ids)]
            self.counts["cut_responses"] += 1
        start = max(0, encoded.start - off)
        return ids, spans, start if start < len(ids) else spans[-1][0]
