"""From an example to token ids: templates, cutting to length, labels on the response alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from pocl.data.conversation import conversation_of

if TYPE_CHECKING:
    from datasets import Dataset

IGNORE_INDEX = -100
TEMPLATES = ("auto", "chat", "alpaca", "plain")
_CHUNK = 4096  # rows that are Python lists at a time; the rest lies packed in Arrow tables

# The text of the paper's experiments: Stanford Alpaca's, as used by MiniLLM (arXiv 2306.08543) and its successors.
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class DataReport:
    """What `tokenize` did with the examples; every count is in samples unless it says tokens."""

    num_examples: int
    """Examples that came in."""
    num_samples: int
    """Samples that went out."""
    empty_prompts: int
    """Dropped: the prompt had no text."""
    empty_responses: int
    """Dropped: the response had no text."""
    cut_prompts: int
    """Kept, but the prompt lost tokens on its left."""
    cut_responses: int
    """Kept, but the response alone did not fit and lost tokens on its right."""
    prompt_tokens: int
    response_tokens: int

    def __str__(self) -> str:
        parts = [f"{self.num_samples} of {self.num_examples} samples kept"]
        dropped = [(self.empty_prompts, "empty prompt"), (self.empty_responses, "empty response")]
        parts += [f"{count} dropped ({reason})" for count, reason in dropped if count]
        parts += [f"{self.cut_prompts} prompts cut from the left"] if self.cut_prompts else []
        parts += [f"{self.cut_responses} responses cut from the right"] if self.cut_responses else []
        parts += [f"{self.prompt_tokens} prompt tokens, {self.response_tokens} response tokens"]
        return "; ".join(parts)


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


def render_prompt(example: Mapping[str, Any], tokenizer: Any, template: str) -> str:
    """The text a model sees before it answers; `template` is resolved (not `auto`)."""
    if template == "chat":
        turns = list(conversation_of(example).turns[:-1])
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text
    if template == "plain":
        return str(example["prompt"])
    if example.get("input"):
        return _ALPACA_WITH_INPUT.format(instruction=example["instruction"], input=example["input"])
    return _ALPACA.format(instruction=example.get("instruction") or example["prompt"])


def tokenize(
    examples: Dataset,
    tokenizer: Any,
    *,
    template: str = "auto",
    max_length: int = 512,
    max_prompt_length: int = 256,
    progress: bool = True,
) -> tuple[Dataset, DataReport]:
    """Turns examples into token rows whose labels cover the response and the end-of-sequence token.

    A prompt longer than `max_prompt_length` loses tokens on its left. Where prompt and response together exceed
    `max_length` the prompt gives way too, down to a quarter of `max_length`; only then is the response cut on its
    right (and gets no end-of-sequence token, for it does not end there). Limits are the paper's (section 4.1).

    Args:
        examples: what `load_examples` returns (`id`, `prompt`, `response`, ...).
        tokenizer: a Hugging Face tokenizer with an EOS token.
        template: `chat` (the tokenizer's), `alpaca` (the paper's), `plain`, or `auto`.
        max_length: longest row, in tokens.
        max_prompt_length: longest prompt, in tokens.
        progress: show a progress bar.

    Returns:
        The rows, with `sample_id` int64, `input_ids` and `labels` list[int32] (not shifted, -100 on the prompt) and
        `prompt_length` int32; and the counts. Samples without prompt or response text are dropped and counted.

    Raises:
        ValueError: missing column, unknown template, no EOS token, limits too small, or nothing left.
    """
    from datasets import Dataset, Features, Sequence, Value, concatenate_datasets

    check_columns(examples.column_names)
    encode = Encoder(tokenizer, template, max_length, max_prompt_length)
    features = Features(
        {
            "sample_id": Value("int64"),
            "input_ids": Sequence(Value("int32")),
            "labels": Sequence(Value("int32")),
            "prompt_length": Value("int32"),
        }
    )

    def rows() -> Iterator[dict[str, Any]]:
        from tqdm.auto import tqdm

        for example in tqdm(examples, desc="tokenising", unit=" samples", disable=not progress):
            row = encode(example)
            if row is not None:
                yield row

    chunks = [Dataset.from_list(list(chunk), features=features) for chunk in _chunks(rows(), _CHUNK)]
    report = encode.report(len(examples), sum(map(len, chunks)))
    if not chunks:
        raise ValueError(f"no sample is left after tokenisation: {report}")
    return concatenate_datasets(chunks), report


def _chunks(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while chunk := list(islice(rows, size)):
        yield chunk


def check_columns(columns: Sequence[str]) -> None:
    """Refuses a table that `load_examples` has not made.

    Raises:
        ValueError: `id`, `prompt` or `response` is missing.
    """
    missing = [c for c in ("id", "prompt", "response") if c not in columns]
    if missing:
        raise ValueError(
            f"examples lack the columns {', '.join(missing)} (they have {', '.join(columns)}); "
            "read them with load_examples"
        )


class Encoder:
    """Turns one example at a time into a token row (see `tokenize`) and counts what it had to do."""

    def __init__(self, tokenizer: Any, template: str, max_length: int, max_prompt_length: int) -> None:
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
        self.tokenizer, self.template = tokenizer, resolve_template(template, tokenizer)
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.counts = dict.fromkeys(
            (
                "empty_prompts",
                "empty_responses",
                "cut_prompts",
                "cut_responses",
                "prompt_tokens",
                "response_tokens",
            ),
            0,
        )

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of an example (`id`, `prompt`, `response`, ...), None if its prompt or response has no text."""
        if not example["response"].strip():
            self.counts["empty_responses"] += 1
            return None
        if not example["prompt"].strip():
            self.counts["empty_prompts"] += 1
            return None
        prompt, response = self._ids(render_prompt(example, self.tokenizer, self.template), example["response"])
        prompt, response = self._cut(prompt, response)
        self.counts["prompt_tokens"] += len(prompt)
        self.counts["response_tokens"] += len(response)
        return {
            "sample_id": example["id"],
            "input_ids": prompt + response,
            "labels": [IGNORE_INDEX] * len(prompt) + response,
            "prompt_length": len(prompt),
        }

    def _ids(self, prompt_text: str, response_text: str) -> tuple[list[int], list[int]]:
        # A chat template writes its own special tokens; elsewhere the tokenizer adds a BOS if the model has one.
        special = self.template != "chat"
        prompt = self._encode(prompt_text, special)
        full = self._encode(prompt_text + response_text, special)
        # Joint encoding keeps sentence-piece spaces right; where a merge crosses the border the two are encoded apart,
        # because at generation time the model sees the prompt's own tokens.
        whole = full[: len(prompt)] == prompt and len(full) > len(prompt)
        response = full[len(prompt) :] if whole else self._encode(response_text, False)
        return prompt, [*response, self.tokenizer.eos_token_id]

    def _encode(self, text: str, special: bool) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        # Some tokenizers close every text with EOS; a prompt must stay open.
        while special and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return ids

    def _cut(self, prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
        floor = max(1, self.max_length // 4)
        room = min(self.max_prompt_length, max(floor, self.max_length - len(response)))
        if len(prompt) > room:
            prompt = prompt[-room:]
            self.counts["cut_prompts"] += 1
        if len(prompt) + len(response) > self.max_length:
            response = response[: self.max_length - len(prompt)]
            self.counts["cut_responses"] += 1
        return prompt, response

    def report(self, num_examples: int, num_samples: int) -> DataReport:
        """The counts so far."""
        return DataReport(num_examples=num_examples, num_samples=num_samples, **self.counts)
