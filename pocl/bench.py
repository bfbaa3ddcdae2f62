"""`pocl bench`: the benchmarks of a checkout, or those that an installed package carries in `shipped/`."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = "POCL_RESULTS"  # in the environment: the folder in which benchmarks file their results


def subjects() -> dict[str, Path]:
    """What can be measured from here, and the file that measures it."""
    return {name: file for name, file in _programs().items() if not (_is_installed() and _wants_checkout(file))}


def run_benchmark(subject: str, words: Sequence[str], *, as_json: bool = False) -> Any:
    """Measure a subject.

    Args:
        subject: one of `subjects()`.
        words: options of the benchmark.
        as_json: return what it would file, and print its tables on the standard error stream.

    Returns:
        With `as_json`: for everything that was measured its `machine`, `versions` and `values`; else None.

    Raises:
        ValueError: there is no such subject, or it files nothing that `as_json` could return.
        ModuleNotFoundError: a package that the benchmarks need is missing.
    """
    files = subjects()
    if subject in _programs().keys() - files.keys():
        raise ValueError(
            f"the benchmark {subject} needs a checkout of pocl, whose tests or history it uses; an installed package "
            f"has {', '.join(files)}"
        )
    if subject not in files:
        raise ValueError(f"there is no benchmark {subject!r}; there are {', '.join(files)}")
    if as_json and not _files_results(files[subject]):
        those = ", ".join(name for name, file in files.items() if _files_results(file))
        raise ValueError(f"the benchmark {subject} files no results, so it has no --json; those that do are {those}")
    root = str(_root())
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])  # its children
    sys.argv = [f"pocl bench {subject}", *words, *(["--save"] if as_json and "--save" not in words else [])]
    with _filing(as_json) as filed:
        try:
            runpy.run_module(f"benchmarks.{files[subject].stem}", run_name="__main__")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the benchmark {subject} needs {error.name}, which is not installed: pip install 'pocl[bench]'"
            ) from None
    return filed if as_json else None


def _programs() -> dict[str, Path]:
    files = {file.stem.removeprefix("bench_"): file for file in sorted(_root().glob("benchmarks/bench_*.py"))}
    return {name: file for name, file in files.items() if "__main__" in file.read_text(encoding="utf-8")}


def _root() -> Path:
    return Path(__file__).parent / "shipped" if _is_installed() else Path(__file__).parents[1]


def _is_installed() -> bool:
    return (Path(__file__).parent / "shipped").is_dir()


def _wants_checkout(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return "from tests." in text or '"git"' in text


def _files_results(file: Path) -> bool:
    return "save_results" in file.read_text(encoding="utf-8")


@contextlib.contextmanager
def _filing(aside: bool) -> Iterator[dict[str, Any]]:
    """What is filed meanwhile, in place of the benchmarks' own folder; nothing of it where it is not set aside."""
    filed: dict[str, Any] = {}
    if not aside:
        yield filed
        return
    before = os.environ.get(RESULTS)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        os.environ[RESULTS] = folder
        try:
            yield filed
        finally:
            os.environ.pop(RESULTS)
            os.environ.update({RESULTS: before} if before else {})
        for file in sorted(Path(folder).rglob("*.json")):
            filed |= json.loads(file.read_text(encoding="utf-8"))
