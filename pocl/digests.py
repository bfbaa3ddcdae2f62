"""Digests of large files, remembered on disk, so that a run's weights are read through once and not at every launch.

A remembered digest is believed as long as device, inode, size and both time stamps of the file are as they were: any
write, and any file put in its place, changes one of them, `mtime` set back by hand or not, for nobody can set `ctime`
back. A file that was written less than `_TICK` seconds before it was read is not remembered: another write could leave
the same time stamps, as in git's index. What is not noticed are bits that rot on the disk, and a change on a file
system that keeps no `ctime`; `POCL_REREAD=1` makes every launch read every byte.

One small file for each digest, below `digests` in the cache folder, written whole or not at all, whoever else does so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from pocl.embedded import cache_folder
from pocl.run_folder import write_text

REREAD = "POCL_REREAD"
_LARGE = 4 << 20  # bytes; less is read as quickly as a note about it
_TICK = 2.5  # seconds; the coarsest time stamps in use, FAT's, count in steps of 2
_READERS = 4  # files read at a time


def content_fingerprint(path: Path) -> str:
    """16 hex digits that stand for a file, or for the files below a folder, independent of place and time stamps.

    Every byte counts: weights that were merged or trained on keep their size and both ends. Only a model's card does
    not: it may be written again, and the model is the same.
    """
    digest = hashlib.blake2b()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        files = [file for file in files if file != path / "README.md"]
    for file, content in zip(files, file_digests(files), strict=True):
        digest.update(f"{file.relative_to(path)}:{file.stat().st_size}:{content}:".encode())
    return digest.hexdigest()[:16]


def file_digests(files: Sequence[Path]) -> list[str]:
    """BLAKE2b of the content of each file, in hexadecimal digits; large ones are read once and then remembered.

    Raises:
        OSError: a file cannot be read.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(_digest, files))


def _digest(file: Path) -> str:
    path = os.path.realpath(file)
    return _known(path, _state(path))


@cache
def _known(path: str, state: tuple[int, ...]) -> str:
    """Of a file in a state that `_state` told."""
    if state[2] < _LARGE:
        return _read(path)
    note = _note_of(path)
    if not _wants_to_reread() and (digest := _recall(note, path, state)):
        return digest
    started = time.time()
    digest = _read(path)
    settled = max(state[3:]) / 1e9 < started - _TICK
    if settled and _state(path) == state:
        with contextlib.suppress(OSError):  # a cache folder that cannot be written: read again next time
            write_text(note, json.dumps({"path": path, "state": state, "digest": digest}) + "\n")
    return digest


def _wants_to_reread() -> bool:
    return os.environ.get(REREAD, "") not in ("", "0")


def _state(path: str) -> tuple[int, ...]:
    """Device, inode, size and times of the last change of content and of anything."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _note_of(path: str) -> Path:
    return cache_folder() / "digests" / f"{hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()}.json"


def _recall(note: Path, path: str, state: tuple[int, ...]) -> str | None:
    """The digest in a note, None if there is none of this file in this state."""
    try:
        said = json.loads(note.read_text(encoding="utf-8"))
        return str(said["digest"]) if said["path"] == path and said["state"] == list(state) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
