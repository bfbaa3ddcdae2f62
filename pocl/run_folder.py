"""The folder of a run: which steps are finished, with which settings, and whether their outputs still stand.

Every step has a fingerprint: a hash of its settings and of the fingerprints of the steps it builds on. `manifest.json`
keeps it with the outputs' sizes, so a step is skipped exactly when the same work has been done already, and a step that
was cut off is told from one whose settings have changed: the first resumes, the second starts anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pocl.modes import follow_umask
from pocl.run_lock import LOCK

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"


class RunFolderError(ValueError):
    """The folder cannot be used for this recipe; the message says what differs and what to do."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` to be filled; it takes the place of `path` when the block ends, and is gone on an error.

    So a reader sees the old or the new content, never half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        follow_umask(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


_DIGEST = re.compile(r"\b[0-9a-f]{16,}\b")  # which says nothing to people


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fingerprint(value: Any) -> str:
    """16 hex digits that stand for a JSON-like value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `section.key: old in the folder, new now` for every setting in which two recipes differ."""
    lines: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += differences(before, now, f"{prefix}{key}.")
        elif before != now and all(isinstance(mark, str) and _DIGEST.search(mark) for mark in (before, now)):
            lines.append(f"{prefix}{key}: what lies there has changed since the folder was made")
        elif before != now:
            lines.append(f"{prefix}{key}: {in_short(before)} in the folder, {in_short(now)} now")
    return lines


def in_short(value: Any) -> str:
    """A setting as a person would write it: `0.9` for 0.8999999999999999, and a file's digest as what it stands for."""
    if isinstance(value, float):
        return repr(value) if len(repr(value)) <= 10 else f"{value:.9g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_short, value))}]"
    return "a file" if isinstance(value, str) and _DIGEST.fullmatch(value) else repr(value)


class RunFolder:
    """Reads and writes the manifest of one run.

    Args:
        path: the folder; made by the first write.
        change: accept a folder whose recipe or inputs differ; the steps that are affected will be done again.
    """

    def __init__(self, path: str | Path, *, change: bool = False) -> None:
        self.path = Path(path)
        self.change = change
        self._manifest: dict[str, Any] = {"steps": {}}
        file = self.path / MANIFEST
        if file.is_file():
            try:
                self._manifest = json.loads(file.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise RunFolderError(f"{file} is not readable ({error}); remove it to start this run anew") from None

    def claim(self, recipe: Mapping[str, Any]) -> None:
        """Make the folder that of a resolved recipe, given as plain values.

        Raises:
            RunFolderError: the folder holds files of something else, or of a recipe that differs and `change` is not
                set.
        """
        recipe = self.check(recipe)
        write_text(self.path / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120))

    def check(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """What `claim` would write, if it would not refuse the folder; writes nothing."""
        file = self.path / RECIPE
        recipe = {key: value for key, value in recipe.items() if key != "output"}
        if file.is_file():
            stored = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            lines = differences(stored, recipe)
            whole = set(recipe) <= set(stored) and "output" not in stored  # as `claim` writes it
            if lines and not whole and not (self.path / MANIFEST).is_file():  # --change would write over it
                raise RunFolderError(
                    f"{file} is another recipe, and no run has begun there: it may be a file of yours. Choose another "
                    "folder with --output, or move it away."
                )
            if not self.change:
                self._refuse(f"{self.path} belongs to another recipe", lines)
        elif self.path.is_dir() and any(not file.name.startswith(LOCK) for file in self.path.iterdir()):
            raise RunFolderError(
                f"{self.path} is not empty and holds no {RECIPE}: it is not the folder of a run. "
                "Choose another with --output."
            )
        return recipe

    def record(self, step: str) -> dict[str, Any]:
        """What the manifest says about a step; empty if nothing."""
        return dict(self._manifest["steps"].get(step, {}))

    def is_finished(self, step: str, mark: str) -> bool:
        """Whether the step was finished with this fingerprint and none of its files is missing or cut short."""
        record = self.record(step)
        if record.get("state") != "finished" or record.get("fingerprint") != mark:
            return False
        sizes = record["files"]
        return all((self.path / name).is_file() and (self.path / name).stat().st_size == sizes[name] for name in sizes)

    def start(
        self, step: str, mark: str, settings: Mapping[str, Any], outputs: Sequence[str], renews: Sequence[str] = ()
    ) -> bool:
        """Note that a step begins; leftovers of the same work are kept, those of other work removed.

        Files of other steps that it `renews` are kept in any case, and no longer counted as theirs.

        Returns:
            True if there are leftovers to resume from.

        Raises:
            RunFolderError: the step was finished with other settings or inputs, and `change` is not set.
        """
        record = self.record(step)
        if record.get("state") == "finished" and record["fingerprint"] != mark and not self.change:
            lines = differences(record["settings"], settings)
            self._refuse(f"{self.path} holds the step {step!r} of other inputs", lines or ["an earlier step's outcome"])
        resumes = record.get("fingerprint") == mark
        if not resumes:
            for name in outputs:
                _remove(self.path / name)
        kept = record.get("seconds", 0.0) if resumes else 0.0
        record = {"state": "started", "fingerprint": mark, "settings": dict(settings), "seconds": kept}
        self._disown(renews)
        self._save(step, record | {"started_at": time.time()})
        return resumes and any((self.path / name).exists() for name in outputs)

    def adopt(self, step: str, record: Mapping[str, Any]) -> None:
        """Take over the record of a step that another folder finished, and whose files are linked from there."""
        self._save(step, dict(record))

    def pause(self, step: str, *, seconds: float) -> None:
        """Note how long a step ran before it was cut off."""
        record = self.record(step)
        self._save(step, record | {"seconds": round(record["seconds"] + seconds, 1)})

    def finish(self, step: str, outputs: Sequence[str], *, seconds: float, summary: Mapping[str, Any]) -> None:
        """Note that a step is done, with its files' sizes and a summary for later steps and the report."""
        record = self.record(step)
        for output in outputs:
            follow_umask(self.path / output)
        record |= {
            "state": "finished",
            "finished_at": time.strftime("%Y-%m-%d %H:%M:%S"),
            "seconds": round(record["seconds"] + seconds, 1),
            "peak_memory_mb": peak_memory_mb(),
            "files": self._files(outputs),
            "summary": dict(summary),
        }
        self._save(step, record)

    @contextlib.contextmanager
    def refreshing(self, step: str, outputs: Sequence[str], renews: Sequence[str] = ()) -> Iterator[None]:
        """Note the files of a finished step anew when the block has written them again (a report).

        What it `renews` is another step's no more before the block begins, so that a kill undoes no step.
        """
        record = self.record(step)
        if record.get("state") == "finished":
            self._disown(renews)
            self._save(step, record)
        yield
        if record.get("state") == "finished":
            there = [name for name in renews if (self.path / name).is_file()]  # a student may have been moved away
            self._save(step, record | {"files": self._files([*outputs, *there])})

    def _disown(self, names: Sequence[str]) -> None:
        """Let files belong to no step; the next one that is noted may be their owner."""
        for record in self._manifest["steps"].values():
            for name in names:
                record.get("files", {}).pop(name, None)

    def _files(self, outputs: Sequence[str]) -> dict[str, int]:
        return {name: size for output in outputs for name, size in self._sizes(output)}

    def _sizes(self, output: str) -> list[tuple[str, int]]:
        path = self.path / output
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        return [(str(file.relative_to(self.path)), file.stat().st_size) for file in files]

    def _refuse(self, what: str, lines: Sequence[str]) -> None:
        if lines:
            listing = "\n  ".join(lines)
            raise RunFolderError(
                f"{what}:\n  {listing}\n"
                "Choose another folder with --output, or add --change to keep what still fits and redo the rest."
            )

    def _save(self, step: str, record: dict[str, Any]) -> None:
        self._manifest["steps"][step] = record
        write_text(self.path / MANIFEST, json.dumps(self._manifest, indent=2, ensure_ascii=False) + "\n")


def peak_memory_mb() -> int | None:
    """Largest memory of this process so far, in MB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
