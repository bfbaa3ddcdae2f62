"""Text files as rows: JSON lines, JSON, CSV and plain text, compressed or not, a block at a time.

JSON goes through `json` itself. The columns of an Arrow table have one type each, so its readers turn some values of a
mixed column into others (dates from text, text from numbers, keys filled with null), and rows would say what no file
says.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

BATCH = 1000  # rows that are Python objects at a time
_BLOCK = 1 << 20  # bytes
_SPACE = re.compile(r"[\s,]*")  # between the objects of a JSON file


class Place(NamedTuple):
    """Where rows begin: `number` of the first one, counted in `unit` from 1."""

    unit: str
    number: int


def kind_of(name: str) -> str | None:
    """How a file is read, by its name: `json`, `csv`, `text`, or None where it is not read here."""
    suffixes = Path(name).suffixes[-2:]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes = suffixes[:-1]
    return _KINDS.get(suffixes[-1]) if suffixes else None


def read_file(path: str, kind: str) -> Iterator[tuple[Place, list[dict[str, Any]]]]:
    """The rows of a file, batch after batch, with the place of each batch's first row.

    Args:
        path: a path, or a URL that `fsspec` opens.
        kind: what `kind_of` says.

    Raises:
        ValueError: names file and line, and what to do.
    """
    if "://" not in path and not os.path.getsize(path):
        raise ValueError(f"{path} is empty (0 bytes); write examples into it, or name another source")
    try:
        with _opened(path) as stream:
            yield from _READERS[kind](stream)
    except _DamageError as damage:
        raise ValueError(f"{path} cannot be read: {damage}; {damage.advice}") from damage.__cause__
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {_compression_damage(error)}") from error
    except OSError as error:
        if error.errno is None and kind_of(path) and Path(path).suffix in _COMPRESSED:
            raise ValueError(f"{path} cannot be read: {_compression_damage(error)}") from error
        raise


class _DamageError(ValueError):
    """What is wrong in a file that is being read."""

    def __init__(self, what: str, advice: str = "mend the file, or get it again") -> None:
        super().__init__(what)
        self.advice = advice


def _compression_damage(error: Exception) -> str:
    return f"its compressed data is damaged or cut off ({error}); get the file again"


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed."""
    with (
        _remote(path) if "://" in path else Path(path).open("rb") as raw,
        _COMPRESSED.get(Path(path).suffix, lambda stream: stream)(raw) as stream,
    ):
        yield stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, _BLOCK)


def _remote(url: str) -> AbstractContextManager[IO[bytes]]:
    import fsspec

    opened: AbstractContextManager[IO[bytes]] = fsspec.open(url, "rb")
    return opened


def _zstd(stream: Any) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(stream, "zstd")


_COMPRESSED: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".zst": _zstd,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}


# ------------------------------------------------------------------------------------------------------------- encoding


def _start(stream: Any) -> bytes:
    """The first bytes of a stream without the mark that some editors set; refuses what is not UTF-8 by its look."""
    start = bytes(stream.peek(4)[:4])
    if start.startswith(b"\xef\xbb\xbf"):
        stream.read(3)
        start = bytes(stream.peek(4)[:4])
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise _DamageError("it is UTF-16 or UTF-32, not UTF-8", "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW")
    return start


def _text(data: bytes, line: int) -> str:
    """Bytes as text; `line` is the number of their first line."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number = line + data.count(b"\n", 0, error.start)
        raise _DamageError(
            f"line {number} is not UTF-8 (byte 0x{data[error.start]:02x})",
            "if the file is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 FILE > NEW",
        ) from None


# ----------------------------------------------------------------------------------------------------------------- JSON


def _json(stream: Any) -> Iterator[tuple[Place, list[dict[str, Any]]]]:
    """Objects: one a line, or in an array, or one after the other over as many lines as they take."""
    _start(stream)
    line = 1
    while (start := stream.peek(1)[:1]) and start.isspace():
        line += stream.read(1) == b"\n"
    if start in (b"", b"["):
        yield from _objects(stream, line, "element") if start else ()
        return
    first = stream.readline()
    try:
        json.loads(first or b"0")
    except (UnicodeDecodeError, RecursionError):
        pass  # the lines below say it
    except ValueError as error:
        if not _is_open(error, first):
            raise _no_json(error, line) from None
        yield from _objects(stream, line, "object", first, error)
        return
    yield from _lines(stream, line, first)


def _is_open(error: ValueError, line: bytes) -> bool:
    """Whether a line stops where its object goes on, as in a file that is indented."""
    return isinstance(error, json.JSONDecodeError) and error.pos >= len(line.decode(errors="replace").rstrip())


def _lines(stream: Any, line: int, first: bytes) -> Iterator[tuple[Place, list[dict[str, Any]]]]:
    block = [first]
    while block:
        kept = [text for text in block if not text.isspace()]
        rows: Any = None
        with suppress(ValueError, RecursionError):  # one call for many lines is several times as fast as one for each
            rows = json.loads(_text(b"[" + b",".join(kept) + b"]", line))
        numbers = [number for number, text in enumerate(block, start=line) if not text.isspace()]
        if rows is None or len(rows) != len(kept) or not all(type(row) is dict for row in rows):
            rows = [_row(_text(text, number), number) for number, text in zip(numbers, kept, strict=True)]
        size = BATCH if len(kept) == len(block) else 1  # in a batch, line follows on line
        for start in range(0, len(rows), size):
            yield Place("line", numbers[start]), rows[start : start + size]
        line += len(block)
        block = stream.readlines(_BLOCK)


def _row(text: str, line: int) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(error, line) from None
    if not isinstance(row, dict):
        raise _DamageError(f"line {line} is {_json_kind(row)}, not an object", "write one object a line, {...}")
    return row


def _no_json(error: ValueError | RecursionError, line: int) -> _DamageError:
    if isinstance(error, RecursionError):
        return _DamageError(f"line {line} is nested too deeply", "write the inner value as text")
    if "Exceeds the limit" in str(error):
        return _DamageError(f"line {line} holds a number of more digits than Python reads", "write it as text")
    why = f"{error.msg}: column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return _DamageError(f"line {line} is no JSON, or was cut off ({why})")


def _json_kind(value: Any) -> str:
    names = {str: "a string", list: "a list", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _objects(
    stream: Any, line: int, unit: str, first: bytes = b"", why: ValueError | None = None
) -> Iterator[tuple[Place, list[dict[str, Any]]]]:
    """Objects that may span lines: the elements of an array, or a sequence."""
    decoder = json.JSONDecoder()
    source = _Window(stream, line, first)
    if array := not first:
        source.position = 1  # behind the bracket
    number, rows = 1, []
    while True:
        source.skip()
        if source.ended() or (array and source.text[source.position] == "]"):
            break
        try:
            row = source.decode(decoder)
        except (ValueError, RecursionError) as error:
            if why is not None and number == 1:  # the object that the first line begins is never closed
                raise _no_json(why, line) from None
            position = error.pos if isinstance(error, json.JSONDecodeError) else source.position
            raise _no_json(error, source.line_at(position)) from None
        if not isinstance(row, dict):
            raise _DamageError(f"{unit} {number} is {_json_kind(row)}, not an object", "write objects, {...}")
        rows.append(row)
        number += 1
        if len(rows) == BATCH:
            yield Place(unit, number - BATCH), rows
            rows = []
    if rows:
        yield Place(unit, number - len(rows)), rows
    if array:
        if source.ended():
            raise _DamageError(f"the array that begins in line {line} has no end; the file was cut off")
        source.position += 1
        source.skip()
        if not source.ended():
            raise _DamageError(
                f"something stands behind the end of the array, in line {source.line_at(source.position)}"
            )


class _Window:
    """Text of which as much is in memory as the next JSON value needs."""

    def __init__(self, stream: Any, line: int, first: bytes) -> None:
        self._stream, self._rest = stream, first
        self.line, self.text, self.position = line, "", 0
        self._size = _BLOCK
        self._more()

    def _more(self) -> bool:
        """Reads on, and forgets what lies behind; False at the end of the file."""
        self.line += self.text.count("\n", 0, self.position)
        self.text, self.position = self.text[self.position :], 0
        block = self._rest or self._stream.read(self._size)
        self._rest = b""
        while block and block[-1] >= 0x80:  # never cut through a character
            following = self._stream.read(1)
            if not following:
                break
            block += following
        self.text += _text(block, self.line + self.text.count("\n"))
        return bool(block)

    def skip(self) -> None:
        """Goes to the next character that is neither space nor comma."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text) or not self._more():
                return

    def ended(self) -> bool:
        return self.position >= len(self.text)

    def decode(self, decoder: json.JSONDecoder) -> Any:
        """The value at the position, and past it."""
        self._size = _BLOCK
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # Broken in the middle of what is here; only an open string may still go on
                if error.pos < len(self.text) - 8 and not error.msg.startswith("Unterminated string"):
                    raise
                self._size *= 2  # so that a value of many blocks is not tried once for each
                if not self._more():
                    raise
            else:
                if end < len(self.text) or not self._more():
                    self.position = end
                    return value

    def line_at(self, position: int) -> int:
        """The number of the line in the file."""
        return self.line + self.text.count("\n", 0, position)


# --------------------------------------------------------------------------------------------------------- CSV and text


def _csv(stream: Any) -> Iterator[tuple[Place, list[dict[str, Any]]]]:
    """Rows of a CSV file; every value is the text that stands there."""
    _start(stream)
    csv.field_size_limit(sys.maxsize)  # the limit is the process's; the usual one is below a long answer
    lines = _decoded_lines(stream)
    reader = csv.reader(lines, strict=True)
    rows: list[dict[str, Any]] = []
    header: list[str] = []
    line = number = 1
    try:
        for values in reader:
            if not values:
                pass
            elif not header:
                header = values
                if double := [name for name in header if header.count(name) > 1]:
                    raise _DamageError(
                        f"the header names {double[0]!r} more than once", "give each column a name of its own"
                    )
            elif len(values) != len(header):
                raise _DamageError(f"line {line} has {len(values)} values, and the header names {len(header)} columns")
            else:
                rows.append(dict(zip(header, values, strict=True)))
                if len(rows) == BATCH:
                    yield Place("row", number), rows
                    number, rows = number + BATCH, []
            line = reader.line_num + 1
    except csv.Error as error:
        raise _DamageError(f"line {line} is no CSV, or a quotation mark is missing ({error})") from None
    if rows:
        yield Place("row", number), rows


def _decoded_lines(stream: Any) -> Iterator[str]:
    line = 1
    while block := stream.readlines(_BLOCK):
        yield from io.StringIO(_text(b"".join(block), line), newline="")
        line += len(block)


def _plain(stream: Any) -> Iterator[tuple[Place, list[dict[str, Any]]]]:
    """A document a line; empty lines are none."""
    _start(stream)
    lines = ((number, text.rstrip("\r\n")) for number, text in enumerate(_newline_lines(stream), start=1))
    documents = ((number, text) for number, text in lines if text.strip())
    while batch := list(itertools.islice(documents, BATCH)):
        yield Place("line", batch[0][0]), [{"text": text} for _, text in batch]


def _newline_lines(stream: Any) -> Iterator[str]:
    line = 1
    while block := stream.readlines(_BLOCK):
        for number, data in enumerate(block, start=line):
            yield _text(data, number)
        line += len(block)


_READERS: dict[str, Callable[[Any], Iterator[tuple[Place, list[dict[str, Any]]]]]] = {
    "json": _json,
    "csv": _csv,
    "text": _plain,
}
_KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
