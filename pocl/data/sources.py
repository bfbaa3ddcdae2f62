"""Where rows come from: the hub, files, folders, `Dataset`s and lists of dicts, all as batches of dicts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pocl.data.files import BATCH, Place, kind_of, read_file
from pocl.data.mapped import MappedPages

READABLE = ".jsonl, .json, .csv, .txt (each also with .gz or .zst), .parquet and .arrow"
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
# The builders of `datasets` for text files, which are read here instead; see `files`.
_BUILDERS = {"datasets.packaged_modules.json.json": "json", "datasets.packaged_modules.csv.csv": "csv"} | {
    "datasets.packaged_modules.text.text": "text"
}


class Rows(Protocol):
    """The rows of a source, as they are; they can be gone through more than once."""

    name: str
    """The source, in errors."""
    filled: bool
    """Whether null may stand for a key that a row does not have, as in the structs of Arrow."""
    unread: Sequence[str]
    """Files of a folder that hold rows of another type, and are not read."""

    def batches(self) -> Iterator[tuple[Place, list[Any]]]:
        """The rows in order, a few at a time, with the place of the first."""
        ...


class ListedRows:
    """Rows in memory."""

    filled = False
    unread: Sequence[str] = ()

    def __init__(self, rows: Iterable[Any]) -> None:
        self.name = type(rows).__name__
        self.rows: Sequence[Any] = rows if isinstance(rows, list | tuple) else list(rows)

    def batches(self) -> Iterator[tuple[Place, list[Any]]]:
        for start in range(0, len(self.rows), BATCH):
            yield Place("row", start + 1), list(map(_plain, self.rows[start : start + BATCH]))


_PLAIN = frozenset((str, int, float, bool, type(None)))


def _plain(value: Any) -> Any:
    """A value with Python's own numbers and lists in place of NumPy's, which `pandas` puts into rows."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return _plain(value.tolist()) if type(value).__module__ == "numpy" else value


class FileRows:
    """Rows of text files."""

    filled = False

    def __init__(self, name: str, files: Sequence[tuple[str, str]], unread: Sequence[str] = ()) -> None:
        """`files` are paths or URLs, each with what `kind_of` says."""
        self.name, self.files, self.unread = name, files, unread

    def batches(self) -> Iterator[tuple[Place, list[Any]]]:
        for path, kind in self.files:
            for place, rows in read_file(path, kind):
                yield place if len(self.files) == 1 else Place(f"{Path(path).name}, {place.unit}", place.number), rows


class TableRows:
    """Rows of a `Dataset` or an `IterableDataset`."""

    filled = True

    def __init__(self, name: str, table: Any, unread: Sequence[str] = ()) -> None:
        self.name, self.table, self.unread = name, table, unread

    def batches(self) -> Iterator[tuple[Place, list[Any]]]:
        table, names = _without_decoding(self.table)
        pages = MappedPages(table.data.table) if hasattr(table, "data") else None
        number = 1
        with naming_damage(self.name):
            for columns in table.iter(BATCH):
                for column, label in names.items():
                    columns[column] = [None if v is None or v < 0 else label[v] for v in columns[column]]
                keys = list(columns)
                rows = [dict(zip(keys, values, strict=True)) for values in zip(*columns.values(), strict=True)]
                yield Place("row", number), rows
                number += len(rows)
                if pages is not None:
                    pages.give_back()


def _without_decoding(table: Any) -> tuple[Any, dict[str, list[str]]]:
    """A table that gives Python values, media as they are stored; and the names in its columns of classes."""
    from datasets import Audio, ClassLabel, Image

    table = table.with_format(None)
    features = table.features or {}
    for column, feature in features.items():
        if isinstance(feature, Audio | Image):
            table = table.cast_column(column, type(feature)(decode=False))
    return table, {column: list(f.names) for column, f in features.items() if isinstance(f, ClassLabel)}


def open_rows(source: Any, split: str, *, trust_remote_code: bool = False, streaming: bool = False) -> Rows:
    """The rows of a source.

    Args:
        source, split, trust_remote_code, streaming: as in `load_examples`.

    Raises:
        ValueError: unknown file type, missing path or split, or a damaged table; text files are read later.
    """
    import datasets

    if isinstance(source, Mapping):
        source = _pick_split(source, split, "the mapping")
    if isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return TableRows(type(source).__name__, source)
    if not isinstance(source, str | os.PathLike):
        if not isinstance(source, Iterable) or hasattr(source, "columns"):
            raise ValueError(
                f"source is a {type(source).__name__}; give a hub id, a file, a folder, a Dataset or a list of dicts "
                "(of a pandas frame: Dataset.from_pandas(frame))"
            )
        return ListedRows(source)
    path, name = Path(source), str(source)
    if path.is_file():
        return _open_file(path, split, streaming)
    if path.is_dir():
        return _open_folder(path, split, streaming)
    if kind_of(name) or path.suffix in _TABLES or path.is_absolute() or name.startswith((".", "~")):
        hint = "; a pattern is not followed, name the folder" if any(mark in name for mark in "*?[") else ""
        raise ValueError(f"source {name!r} does not exist; give a hub id, a file, a folder or a Dataset{hint}")
    extra = {"trust_remote_code": True} if trust_remote_code else {}
    return _from_builder(name, split, streaming, **extra)


def _open_file(path: Path, split: str, streaming: bool) -> Rows:
    kind = kind_of(path.name)
    if kind is None and path.suffix not in _TABLES:
        raise ValueError(f"source {str(path)!r} has type {path.suffix!r}; readable types: {READABLE}")
    if split != "train":  # the one split of a file, and its name in `datasets`
        raise ValueError(f"split {split!r} is not in {path}; it has train")
    if kind is not None:
        return FileRows(str(path), [(str(path), kind)])
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty (0 bytes); write examples into it, or name another source")
    return TableRows(
        str(path), _load(str(path), split, _TABLES[path.suffix], data_files=str(path), streaming=streaming)
    )


def _open_folder(path: Path, split: str, streaming: bool) -> Rows:
    import datasets

    if not ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return _from_builder(str(path), split, streaming)
    stored = datasets.load_from_disk(str(path))  # memory-mapped
    found = stored if isinstance(stored, datasets.Dataset) else _pick_split(stored, split, str(path))
    return TableRows(str(path), found)


def _from_builder(name: str, split: str, streaming: bool, **extra: Any) -> Rows:
    """A folder or a hub data set: its text files are read here, all else by `datasets`."""
    import datasets
    from datasets import DownloadManager

    with naming_damage(name):
        builder = datasets.load_dataset_builder(name, **extra)
    kind, config = _BUILDERS.get(type(builder).__module__), builder.config
    # what the card of a hub data set may ask of the loaders, and the readers here do not know
    special = [getattr(config, option, None) for option in ("field", "features", "encoding_errors", "column_names")]
    plain = getattr(config, "encoding", None) in (None, "utf-8") and getattr(config, "sep", ",") == ","
    unread = _unread(name, config.data_files)
    if kind is None or any(value is not None for value in special) or not plain or not config.data_files:
        return TableRows(name, _load(name, split, name, streaming=streaming, **extra), unread)
    files = list(_pick_split({str(key): value for key, value in config.data_files.items()}, split, name))
    remote = any("://" in file for file in files)
    paths = DownloadManager(dataset_name=name).download(files) if remote and not streaming else files
    return FileRows(name, [(path, kind_of(file) or kind) for path, file in zip(paths, files, strict=True)], unread)


def _unread(name: str, taken: Mapping[Any, Sequence[str]] | None) -> list[str]:
    """Files of a folder that could be read, and that `datasets`, which reads one type, passes over."""
    if not taken or not Path(name).is_dir():
        return []
    known = {str(Path(file).resolve()) for files in taken.values() for file in files}
    found = (path for path in sorted(Path(name).rglob("*")) if kind_of(path.name) or path.suffix in _TABLES)
    return [str(path.relative_to(name)) for path in found if str(path.resolve()) not in known]


def _load(name: str, split: str, *words: str, **options: Any) -> Any:
    """`datasets.load_dataset`, for the file, the folder or the hub id `name`."""
    import datasets

    with naming_damage(name):
        if not Path(name).exists():  # of the hub the one split is fetched
            return datasets.load_dataset(*words, split=split, **options)
        splits = datasets.load_dataset(*words, **options)
    return _pick_split(splits, split, name)


def _pick_split(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in splits:
        if name == "the mapping" and not any(values and isinstance(values[0], dict) for values in splits.values()):
            raise ValueError("source is a dict of columns; give a list of dicts, or Dataset.from_dict(source)")
        raise ValueError(f"split {split!r} is not in {name}; it has {', '.join(sorted(map(str, splits)))}")
    return splits[split]


@contextlib.contextmanager
def naming_damage(name: str) -> Iterator[None]:
    """What loaders raise for a damaged table becomes a `ValueError` with the file."""
    import pyarrow as pa
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except FileNotFoundError as error:
        if not Path(name).is_dir():
            raise
        raise ValueError(f"{name} holds no file that can be read; readable types: {READABLE}") from error
    except (DatasetGenerationError, StopIteration, pa.ArrowException, ValueError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if isinstance(cause, OSError) and cause.errno is not None:  # no room for the cache of `datasets`, say
            raise cause from None
        if not Path(name).exists():  # there is no file to blame
            raise
        why = str(cause).strip().rstrip(".") or "it holds no rows"
        raise ValueError(f"{name} cannot be read: {why}") from error
