"""Reading prompt/response examples from the hub, from files and from memory into one form."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl.data.conversation import Conversation, text_of_turn

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_examples(
    source: Any,
    *,
    split: str = "train",
    limit: int | None = None,
    trust_remote_code: bool = False,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Reads prompt/response examples.

    Args:
        source: a hub id, a file (.jsonl, .json, .parquet, .csv), a folder of such files or one written by
            `Dataset.save_to_disk`, a `Dataset`, or a sequence of dicts.
        split: the split to take where the source has several; a single file has only `train`.
        limit: at most this many examples, from the start.
        trust_remote_code: refused by the hub loader of today; passed on only when true.
        streaming: read as the rows are asked for, for data that neither memory nor disk could hold.

    Returns:
        A `Dataset` (an `IterableDataset` when streaming) with `id` (int64, the position in the source), `prompt`,
        `response`, and, where the source has them, `instruction` and `input`, or `conversation` (the JSON of a
        `pocl.data.Conversation`).

    Raises:
        ValueError: unknown format or file type, missing path, empty or damaged data (says where), `limit < 1`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out to take every example")
    raw = read_rows(source, split, trust_remote_code=trust_remote_code, streaming=streaming)
    return to_examples(raw, source, split=split, limit=limit)


def to_examples(raw: Any, source: Any, *, split: str, limit: int | None = None) -> Dataset | IterableDataset:
    """The examples in rows that `read_rows` gave; `source` and `split` name them in errors. See `load_examples`."""
    from datasets import Dataset, Features, Value

    with _naming_damage(source):  # a stream is read here for the first time
        first = next(iter(raw), None)
    if first is None:
        raise ValueError(f"no examples in {_name(source)} (split {split!r}); it must hold at least one")
    columns = list(first)
    convert = _converter(columns, _name(source))
    features = {"id": Value("int64")} | {column: Value("string") for column in convert(first)}

    def example(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"id": index, **convert(row)}

    options: dict[str, Any] = {"with_indices": True, "remove_columns": columns, "features": Features(features)}
    if not isinstance(raw, Dataset):
        return (raw if limit is None else raw.take(limit)).map(example, **options)
    with _naming_damage(source):
        return (raw if limit is None else raw.select(range(min(limit, len(raw))))).map(
            example,
            desc="reading examples",
            # Without a given fingerprint datasets would pickle the converter; without a cache no stale file comes back.
            new_fingerprint=f"{raw._fingerprint}-pocl-examples",
            load_from_cache_file=False,
            **options,
        )


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else type(source).__name__


def read_rows(source: Any, split: str, *, trust_remote_code: bool = False, streaming: bool = False) -> Any:
    """The rows of a source as they are, as a `Dataset` or an `IterableDataset`; see `load_examples`."""
    import datasets

    if isinstance(source, datasets.IterableDataset):
        return source
    if isinstance(source, datasets.Dataset):
        return source.to_iterable_dataset() if streaming else source
    if not isinstance(source, str | os.PathLike):
        found = _pick_split(source, split, "the mapping") if isinstance(source, Mapping) else _from_rows(source)
        return found.to_iterable_dataset() if streaming else found
    path = Path(source)
    if path.is_file():
        if path.suffix not in _LOADERS:
            raise ValueError(f"source {str(path)!r} has type {path.suffix!r}; readable types: {', '.join(_LOADERS)}")
        loaded = _load(path, _LOADERS[path.suffix], data_files=str(path), streaming=streaming)
        return _pick_split(loaded, split, str(path))
    if path.is_dir():
        return _read_folder(path, split, streaming)
    if path.suffix in _LOADERS or path.is_absolute() or str(source).startswith("."):
        raise ValueError(f"source {str(source)!r} does not exist; give a hub id, a file, a folder or a Dataset")
    extra = {"trust_remote_code": True} if trust_remote_code else {}
    return _load(path, str(source), split=split, streaming=streaming, **extra)


def _load(path: Path, *words: str, **options: Any) -> Any:
    """`datasets.load_dataset`, for the file, the folder or the hub id `path`."""
    import datasets

    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is empty (0 bytes); write examples into it, or name another source")
    with _naming_damage(path):
        return datasets.load_dataset(*words, **options)


@contextlib.contextmanager
def _naming_damage(source: Any) -> Iterator[None]:
    """What loaders raise for a damaged file becomes a `ValueError` with the file and, if it can be told, the line."""
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if isinstance(cause, OSError):  # no room for the cache of `datasets`, say
            raise cause from None
        path = Path(_name(source))
        if isinstance(error, ValueError) and not path.exists():  # there is no file to blame
            raise
        why = _damage(path) or str(cause).strip().rstrip(".") or "it holds no rows"
        why = "it holds no rows" if why.endswith("corresponds to no data!") else why
        raise ValueError(f"{path} cannot be read: {why}; mend the file, or get it again") from error


def _damage(path: Path) -> str:
    """Which line of which file is damaged, as far as that can be told."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        name = f"{file.relative_to(path)}: " if file != path else ""
        if file.suffix in _LOADERS and not file.stat().st_size:
            return f"{name}it is empty (0 bytes)"
        if file.suffix == ".jsonl":  # loaders count from the start of a block, not of the file
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        json.loads(line if line.strip() else b"0")
                    except ValueError as error:
                        why = f"{error.msg}: column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                        return f"{name}line {number} is no JSON, or was cut off ({why})"
    return ""


def _from_rows(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list([dict(row) for row in rows])


def _read_folder(path: Path, split: str, streaming: bool) -> Any:
    import datasets

    if not ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return _pick_split(_load(path, str(path), streaming=streaming), split, str(path))
    stored = datasets.load_from_disk(str(path))  # memory-mapped
    found = stored if isinstance(stored, datasets.Dataset) else _pick_split(stored, split, str(path))
    return found.to_iterable_dataset() if streaming else found


def _pick_split(splits: Mapping[str, Any], split: str, name: str) -> Any:
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
    turns = [_turn(turn) for turn in row["messages"] or []]
    last = max((i for i, t in enumerate(turns) if t["role"] == "assistant"), default=len(turns))
    response = text_of_turn(turns[last]) if last < len(turns) else ""
    prompt = "\n\n".join(filter(None, map(text_of_turn, turns[:last])))
    tools = row.get("tools")
    conversation = Conversation(tuple(turns[: last + 1]), tools).to_json() if response else ""
    return {"prompt": prompt, "response": response, "conversation": conversation}


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn without the keys that are null; its content is text, or None beside tool calls."""
    kept = {key: value for key, value in turn.items() if value is not None}
    content = kept.get("content", None if kept.get("tool_calls") else "")
    return {**kept, "role": str(turn["role"]), "content": content if content is None else str(content)}
