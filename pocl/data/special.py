"""Text that stays text: what a user wrote never becomes a special token, though a tokenizer matches them anywhere.

An answer that quotes `<|im_end|>` would end there, and a question could open turns of its own. So before a template is
rendered, such words in the data are hidden behind private characters, as many as the word is long: positions stay. What
the rendered text then has of special tokens is the template's own. A copy of the tokenizer in which the special tokens
go by private names encodes it: the template's become tokens, the user's are letters like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from pocl.data.conversation import Conversation
from pocl.data.templates import any_of
from pocl.data.tokens import Offsets

SPECIAL_TOKENS = ("text", "tokens")
# An assistant's thoughts are written as text in every data set of reasoning models, and mean the tokens.
THOUGHTS = frozenset({"<think>", "</think>"})
_CANNOT = (
    "the tokenizer cannot tell the text {!r} from the token; pass special_tokens='tokens' (data.special_tokens) to let "
    "such text be the token, or take the samples out"
)
_NAMES, _HIDDEN = 0xF0000, 0x100000  # Unicode's two supplementary private planes


class SpecialText:
    """The words that are special tokens, and how to keep them apart from text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        words: the tokens in question, as text.
    """

    def __init__(self, tokenizer: Any, words: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        self.words = sorted(words)[: 0x10000 - 2]
        self._number = {word: i for i, word in enumerate(self.words)}
        self._find = any_of(self._number)
        self._find_but_thoughts = any_of(set(self.words) - THOUGHTS)
        # Looking for the first letters is a hundred times faster than looking for the words, and finds nothing in most
        # texts. A conversation is looked through as JSON, where some words look different.
        self._starts = sorted({word[:2] for word in self.words} | {json.dumps(word)[1:3] for word in self.words})

    # ---------------------------------------------------------------------------------------------------- hiding

    def suspects(self, text: str) -> bool:
        """Whether a text may hold one of the words; often wrong, never when it says no."""
        return any(start in text for start in self._starts)

    def hide(self, talk: Conversation) -> Conversation | None:
        """The conversation with the words hidden, None if it has none. An assistant may write its thoughts."""
        turns = tuple(
            {
                key: value if key == "role" else self._hidden(value, thoughts=turn["role"] == "assistant")
                for key, value in turn.items()
            }
            for turn in talk.turns
        )
        hidden = Conversation(turns, self._hidden(talk.tools), self._hidden(talk.template_kwargs))
        return None if hidden == talk else hidden

    def hide_text(self, text: str, *, thoughts: bool = False) -> str:
        """A text with the words hidden; `thoughts` leaves those of an assistant's thoughts."""
        find = self._find_but_thoughts if thoughts else self._find
        return find.sub(lambda word: self._run(_HIDDEN, word.group()), text)

    def _hidden(self, value: Any, *, thoughts: bool = False) -> Any:
        if isinstance(value, str):
            return self.hide_text(value, thoughts=thoughts)
        if isinstance(value, Mapping):
            return {self._hidden(k, thoughts=thoughts): self._hidden(v, thoughts=thoughts) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._hidden(item, thoughts=thoughts) for item in value]
        return value

    def _run(self, plane: int, word: str) -> str:
        return chr(plane + self._number[word]) * len(word)

    @cached_property
    def _runs(self) -> dict[str, str]:
        return {self._run(_HIDDEN, word): word for word in self.words}

    @cached_property
    def _find_runs(self) -> Any:
        return any_of(self._runs)

    def shown(self, text: str) -> str:
        """A text with hidden words in which they are words again."""
        return str(self._find_runs.sub(lambda run: self._runs[run.group()], text))

    # -------------------------------------------------------------------------------------------------- encoding

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[tuple[list[int], Offsets | None]]:
        """The ids of texts whose hidden words are text and whose other special tokens are tokens.

        Args:
            texts: with hidden words.
            special: let the tokenizer add its tokens at both ends.

        Returns:
            The ids of each text, and the characters [start, stop) of each id; None with a tokenizer that is not fast.
        """
        if not texts:
            return []
        if self._renamed is None:
            return [(self._encode_pieces(text, special), None) for text in texts]
        named = [self._find.sub(lambda word: self._run(_NAMES, word.group()), text) for text in texts]
        found = self._renamed.encode_batch([self.shown(text) for text in named], add_special_tokens=special)
        return [(list(one.ids), list(one.offsets)) for one in found]

    def _encode_pieces(self, text: str, special: bool) -> list[int]:
        """The ids of a text whose special tokens are encoded by themselves, and what is between them as text."""
        ids: list[int] = []
        start = 0
        for word in [*self._find.finditer(text), None]:
            piece = self.shown(text[start : len(text) if word is None else word.start()])
            if piece or (special and not start):
                options = {"add_special_tokens": special and not start, "split_special_tokens": True}
                found = self.tokenizer(piece, **options)["input_ids"]
                self._check_text(piece, found)
                ids += found
            if word is not None:
                ids.append(self._id(word.group()))
                start = word.end()
        return ids

    def _check_text(self, text: str, ids: list[int]) -> None:
        """Refuses a tokenizer that knows no way to encode the word of a special token as text."""
        if made := [word for word in self.words if word in text and self._id(word) in ids]:
            raise ValueError(_CANNOT.format(made[0]))

    def _id(self, word: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(word))

    @cached_property
    def _renamed(self) -> Any:
        """The tokenizer's engine, with the special tokens under private names; None if it has no engine of its own."""
        from tokenizers import Tokenizer

        engine = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(engine, Tokenizer):
            return None
        content = json.loads(engine.to_str())
        content["truncation"] = content["padding"] = None
        names = {word: self._run(_NAMES, word) for word in self.words}
        for token in content["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = content["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(word, word): index for word, index in vocabulary.items()}
            if model.get("unk_token") in names:
                model["unk_token"] = names[model["unk_token"]]
        elif isinstance(vocabulary, list):
            model["vocab"] = [[names.get(word, word), score] for word, score in vocabulary]
        try:
            made = Tokenizer.from_str(json.dumps(content))
        except Exception:  # a special token that is made of others as well: the pieces between the tokens remain
            return None
        wrong = [word for word, name in names.items() if made.token_to_id(name) != engine.token_to_id(word)]
        if wrong:
            raise ValueError(_CANNOT.format(wrong[0]))
        return made
