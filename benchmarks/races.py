"""Further processes start in the folder of a running recipe, at random moments: each is refused, the run undisturbed.

    python -m benchmarks.races recipe.yaml --starts 20

The recipe runs once alone, then once while others start in its folder, whatever the command: the same, another one,
one with --change. A moment is drawn over the whole run, so some fall into training, some into a save. Exit code 1 if a
start was not refused, or if the students differ in one bit. Processes are forked: a start takes no time to import.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

WORDS = (
    ("distill",),
    ("distill", "--change", "--seed", "12345"),
    ("rank",),
    ("rank", "--change", "--seed", "12345"),
    ("cache-teacher",),
)


@dataclass(frozen=True)
class Race:
    """What came of it: exit code and last words of each start, and what the student of each run weighs in bits."""

    starts: list[tuple[str, int, str]]
    alone: str
    raced: str

    @property
    def refused(self) -> int:
        return sum(code == 2 and "in use by process" in said for _, code, said in self.starts)

    @property
    def undisturbed(self) -> bool:
        return self.alone == self.raced


def race(recipe: Path, folder: Path, starts: int, seed: int = 0, alone: Path | None = None) -> Race:
    """Run a recipe in `folder` with `starts` others that begin while it runs.

    Args:
        recipe: what runs; the others ask for the same, or for more.
        folder: where it runs, and where the others' words are kept.
        starts: how many others begin.
        seed: of moments and commands.
        alone: a finished run of the recipe, which nobody disturbed; made when left out.
    """
    import pocl.pipeline.benchmarking
    import pocl.pipeline.run
    import pocl.report
    import pocl.trainer  # noqa: F401  what a forked process then has

    generator = random.Random(seed)
    if alone is None:
        alone = folder / "alone"
        _start(["distill", str(recipe), "--output", str(alone)], folder / "alone.log").join()
    steps = json.loads((alone / "manifest.json").read_text(encoding="utf-8"))["steps"]
    duration = sum(step["seconds"] for step in steps.values())
    run = _start(["distill", str(recipe), "--output", str(folder / "raced")], folder / "raced.log")
    while not (folder / "raced" / ".lock").exists() and run.is_alive():
        time.sleep(0.01)
    began, others = time.monotonic(), []
    for number, moment in enumerate(sorted(generator.uniform(0, 0.6 * duration) for _ in range(starts))):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        if not run.is_alive():
            break
        words, log = generator.choice(WORDS), folder / f"start-{number}.log"
        process = _start([words[0], str(recipe), *words[1:], "--output", str(folder / "raced")], log)
        others.append((" ".join(words), process, log))
    found = []
    for said, process, log in others:
        process.join()
        found.append((said, process.exitcode or 0, " ".join(log.read_text(encoding="utf-8").split())[-300:]))
    run.join()
    return Race(found, _bits(alone), _bits(folder / "raced"))


def _start(words: list[str], log: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_work, args=(words, log))
    process.start()
    return process


def _work(words: list[str], log: Path) -> None:
    from pocl.cli import app

    code = 0
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            app(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    os._exit(code)


def _bits(folder: Path) -> str:
    file = folder / "student" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else f"no student in {folder}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = race(options.recipe, Path(folder), options.starts, options.seed)
    for (words, code, said), number in Counter(found.starts).items():
        print(f"{number} x pocl {words}: exit code {code}, ...{said[-160:]}")
    print(f"{found.refused} of {options.starts} starts refused; the run's student ", end="")
    print("is the same to the bit" if found.undisturbed else f"DIFFERS: {found.alone[:80]} and {found.raced[:80]}")
    sys.exit(0 if found.refused == options.starts and found.undisturbed else 1)


if __name__ == "__main__":
    main()
