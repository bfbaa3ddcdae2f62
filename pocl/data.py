"""Prompt/response data: reading it, putting it through a template, cutting it to length, batching it.

Three row formats are understood: `instruction, input, output` (Alpaca, Dolly), `prompt, completion` and `messages`.
Whatever came in, `load_examples` gives columns `id`, `prompt`, `response` (and the parts a template needs), and
`tokenize` gives `sample_id`, `input_ids`, `labels`, `prompt_length`. Only response tokens carry labels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset

IGNORE_INDEX = -100
TEMPLATES = ("auto", "chat", "alpaca", "plain")
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

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


# ---------------------------------------------------------------------------------------------------------- reading


def load_examples(
    source: Any,
    *,
    split: str = "train",
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> Dataset:
    """Reads prompt/response examples.

    Args:
        source: a hub id, a file (.jsonl, .json, .parquet, .csv), a folder of such files or one written by
            `Dataset.save_to_disk`, a `Dataset`, or a sequence of dicts.
        split: the split to take where the source has several; a single file has only `train`.
        limit: at most this many examples, from the start.
        trust_remote_code: refused by the hub loader of today; passed on only when true.

    Returns:
        A `Dataset` with `id` (int64, the position in the source), `prompt`, `response`, and, where the source has
        them, `instruction` and `input`, or `messages` (the turns before the response).

    Raises:
        ValueError: unknown format or file type, missing path, empty data, `limit < 1`.
    """
    from datasets import Dataset, Features, Value

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out to take every example")
    raw = _read(source, split, trust_remote_code)
    if len(raw) == 0:
        raise ValueError(f"no examples in {_name(source)} (split {split!r}); it must hold at least one")
    if limit is not None:
        raw = raw.select(range(min(limit, len(raw))))
    convert = _converter(raw.column_names, _name(source))
    turns = [{"role": Value("string"), "content": Value("string")}]
    features = {"id": Value("int64")} | {c: turns if c == "messages" else Value("string") for c in convert(raw[0])}
    rows = raw.map(
        lambda row, index: {"id": index, **convert(row)},
        with_indices=True,
        remove_columns=raw.column_names,
        features=Features(features),
        desc="reading examples",
        # Without a given fingerprint datasets would pickle the converter; without a cache no stale file can come back.
        new_fingerprint=f"{raw._fingerprint}-pocl-examples",
        load_from_cache_file=False,
    )
    assert isinstance(rows, Dataset)
    return rows


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else type(source).__name__


def _read(source: Any, split: str, trust_remote_code: bool) -> Dataset:
    import datasets

    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, datasets.DatasetDict):
        return _pick_split(source, split, "DatasetDict")
    if not isinstance(source, str | os.PathLike):
        return datasets.Dataset.from_list(list(source))
    path = Path(source)
    if path.is_file():
        if path.suffix not in _LOADERS:
            raise ValueError(f"source {str(path)!r} has type {path.suffix!r}; readable types: {', '.join(_LOADERS)}")
        return _pick_split(datasets.load_dataset(_LOADERS[path.suffix], data_files=str(path)), split, str(path))
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            stored = datasets.load_from_disk(str(path))
            return stored if isinstance(stored, datasets.Dataset) else _pick_split(stored, split, str(path))
        return _pick_split(datasets.load_dataset(str(path)), split, str(path))
    if path.suffix in _LOADERS or path.is_absolute() or str(source).startswith("."):
        raise ValueError(f"source {str(source)!r} does not exist; give a hub id, a file, a folder or a Dataset")
    extra = {"trust_remote_code": True} if trust_remote_code else {}
    return datasets.load_dataset(str(source), split=split, **extra)


def _pick_split(splits: Mapping[str, Dataset], split: str, name: str) -> Dataset:
    if split not in splits:
        raise ValueError(f"split {split!r} is not in {name}; it has {', '.join(sorted(splits))}")
    return splits[split]


def _converter(columns: Sequence[str], name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function that turns one raw row into the common columns; decided once, from the column names."""
    have = set(columns)
    if "messages" in have:
        return _from_messages
    if {"instruction", "output"} <= have or {"instruction", "response"} <= have:
        answer = "output" if "output" in have else "response"
        context = next((c for c in ("input", "context") if c in have), None)
        return lambda row: _from_instruction(row["instruction"], row[context] if context else "", row[answer])
    for answer in ("completion", "response"):
        if {"prompt", answer} <= have:
            return lambda row: _from_pair(row["prompt"], row[answer])
    raise ValueError(
        f"{name} has columns {', '.join(sorted(have))}; needed are `instruction, input, output`, "
        "`prompt, completion` or `messages`. Rename the columns that hold the prompt and the response"
    )


def _from_instruction(instruction: str | None, context: str | None, answer: str | None) -> dict[str, Any]:
    instruction, context = instruction or "", context or ""
    prompt = f"{instruction}\n\n{context}" if context else instruction
    return {"prompt": prompt, "response": answer or "", "instruction": instruction, "input": context}


def _from_pair(prompt: Any, answer: Any) -> dict[str, Any]:
    if isinstance(prompt, list):  # conversational form: both sides are lists of turns
        return _from_messages({"messages": [*prompt, *(answer or [])]})
    return {"prompt": prompt or "", "response": answer or ""}


def _from_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """The last assistant turn is the response, all turns before it are the prompt."""
    turns = [{"role": str(t["role"]), "content": str(t["content"] or "")} for t in row["messages"] or []]
    last = max((i for i, t in enumerate(turns) if t["role"] == "assistant"), default=len(turns))
    response = turns[last]["content"] if last < len(turns) else ""
    turns = turns[:last]
    return {"prompt": "\n\n".join(t["content"] for t in turns), "response": response, "messages": turns}


# ------------------------------------------------------------------------------------------------------- tokenising


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
        turns = example.get("messages") or [{"role": "user", "content": example["prompt"]}]
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
    from datasets import Dataset, Features, Sequence, Value

    template = resolve_template(template, tokenizer)
    _check_tokenize(examples, tokenizer, max_length, max_prompt_length)
    encode = _Encoder(tokenizer, template, max_length, max_prompt_length)
    features = Features(
        {
            "sample_id": Value("int64"),
            "input_ids": Sequence(Value("int32")),
            "labels": Sequence(Value("int32")),
            "prompt_length": Value("int32"),
        }
    )

    def rows() -> Iterable[dict[str, Any]]:
        from tqdm.auto import tqdm

        for example in tqdm(examples, desc="tokenising", unit=" samples", disable=not progress):
            row = encode(example)
            if row is not None:
                yield row

    kept = list(rows())
    report = encode.report(len(examples), len(kept))
    if not kept:
        raise ValueError(f"no sample is left after tokenisation: {report}")
    return Dataset.from_list(kept, features=features), report


def _check_tokenize(examples: Dataset, tokenizer: Any, max_length: int, max_prompt_length: int) -> None:
    missing = [c for c in ("id", "prompt", "response") if c not in examples.column_names]
    if missing:
        raise ValueError(
            f"examples lack the columns {', '.join(missing)} (they have {', '.join(examples.column_names)}); "
            "read them with load_examples"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no EOS token, so a response could not end; set tokenizer.eos_token")
    if max_length < 4 or max_prompt_length < 1:
        raise ValueError(
            f"max_length must be at least 4 and max_prompt_length at least 1, got {max_length} and {max_prompt_length}"
        )


class _Encoder:
    """Encodes one example at a time and counts what it had to do."""

    def __init__(self, tokenizer: Any, template: str, max_length: int, max_prompt_length: int) -> None:
        self.tokenizer, self.template = tokenizer, template
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
        return DataReport(num_examples=num_examples, num_samples=num_samples, **self.counts)


# --------------------------------------------------------------------------------------------------------- batching


@dataclass(frozen=True)
class Collator:
    """Stacks token rows into right-padded tensors.

    Returns `input_ids` [B, L] int64, `attention_mask` [B, L] int64, `labels` [B, L] int64 (padding is -100) and
    `sample_id` [B] int64, with L the longest row, rounded up to `pad_to_multiple_of`.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("rows is empty; a batch needs at least one row")
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            input_ids[i, :n] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            attention_mask[i, :n] = 1
            labels[i, :n] = torch.as_tensor(row["labels"], dtype=torch.int64)
        sample_id = torch.tensor([int(row["sample_id"]) for row in rows], dtype=torch.int64)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "sample_id": sample_id}
