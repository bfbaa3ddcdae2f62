"""Breaks the kernels in many ways, one at a time, and shows that the tests notice each.

Every mutation replaces one piece of text in a copy of the kernels and runs the tests that ought to fail, in a process
of its own. A mutation is *caught* if a test fails, *survives* if all pass, and is *stale* if its text is gone or the
broken kernel does not even compile. Run as ``make mutations`` or::

    python -m benchmarks.mutations [-j JOBS] [-k WORD] [--save]

Exits with 1 unless every mutation is caught. Takes about three seconds of one core for each. How the kernels are
broken is in ``mutations_cpu.py`` and ``mutations_triton.py``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

from benchmarks.measure import save_results
from benchmarks.mutations_cpu import MUTATIONS
from benchmarks.mutations_sparse import MUTATIONS as SPARSE
from benchmarks.mutations_triton import MUTATIONS as TRITON
from benchmarks.mutations_triton import Mutation

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "kernels/pocl_kernels"
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["torch", "torch._dynamo", "torch.testing", "torch.distributed", "torch.multiprocessing", "triton",
             "triton.language", "triton.runtime.interpreter", "hypothesis.strategies", "pytest"]  # fmt: skip


def copy_tree(target: Path) -> None:
    """The kernels and their tests, without the parts that no mutation touches."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "kernels", target / "kernels", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "kernels", target / "tests" / "kernels", ignore=ignore)
    shutil.copy(ROOT / "tests" / "conftest.py", target / "tests")
    shutil.copy(ROOT / "pyproject.toml", target)
    # Most of the time would go into optimising kernels that run for milliseconds.
    compiler = target / KERNELS / "cpu" / "compiler.py"
    compiler.write_text(compiler.read_text().replace('"-O3"', '"-O0"'))


class Run(NamedTuple):
    """What pytest said."""

    code: int
    output: str


def run_tests(tree: Path, tests: str, cache: Path) -> Run:
    """pytest on a copied tree; ``tests`` is ``file`` or ``file:expression``.

    In a process forked from one that has imported torch and triton already, which take longer than most tests.
    """
    with tempfile.NamedTemporaryFile("r", prefix="pocl-mutation-output-") as output:
        process = CONTEXT.Process(target=_pytest, args=(str(tree), tests, str(cache), output.name))
        process.start()
        process.join(600)
        if process.is_alive():
            process.kill()
            process.join()
        return Run(process.exitcode or 0, output.read())


def _pytest(tree: str, tests: str, cache: str, output: str) -> NoReturn:
    # Both the oracle of the copy and its kernels must be the ones that are tested, not the installed ones.
    here = [tree, f"{tree}/kernels"]
    ours = {str(ROOT), str(ROOT / "kernels"), ""}
    sys.path[:] = [*here, *(x for x in sys.path if x not in ours)]
    assert "pocl_kernels" not in sys.modules
    os.environ |= {"PYTHONPATH": os.pathsep.join(here), "POCL_CACHE": cache, "OMP_NUM_THREADS": "1"}
    os.environ.pop("POCL_TEST_ENGINES", None)
    os.chdir(tree)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    file, _, expression = tests.partition(":")
    folder, _, name = file.rpartition("/")
    command = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported already
    command += [f"tests/kernels/{folder}/test_{name}.py", *(["-k", expression] if expression else [])]
    import pytest

    code = int(pytest.main(command))
    sys.stdout.flush()
    os._exit(code)


def judge(mutation: Mutation, cache: Path) -> tuple[str, str]:
    """("caught" | "survived" | "stale", the test that failed or what is wrong)."""
    with tempfile.TemporaryDirectory(prefix="pocl-mutation-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        file = tree / KERNELS / mutation.file
        text = file.read_text()
        if mutation.old not in text:
            return "stale", f"{mutation.old!r} is not in {mutation.file}"
        file.write_text(text.replace(mutation.old, mutation.new))
        result = run_tests(tree, mutation.tests, cache)
    output = result.output
    if "did not compile" in output:
        return "stale", "the broken kernel does not compile"
    if result.code == 0:
        return "survived", mutation.tests
    failed = next((line for line in output.splitlines() if line.startswith("FAILED ")), "")
    if result.code != 1 or not failed:
        return "stale", f"pytest exited with {result.code}: {output.strip().splitlines()[-1][:120]}"
    return "caught", failed.split("::")[-1].split(" - ")[0]


def sound(cache: Path) -> Iterator[str]:
    """The selections that fail, or select nothing, on the unbroken kernels."""
    with tempfile.TemporaryDirectory(prefix="pocl-mutation-") as folder:
        copy_tree(Path(folder))
        for tests in sorted({m.tests for m in (*MUTATIONS, *SPARSE, *TRITON)}):
            result = run_tests(Path(folder), tests, cache)
            if result.code:
                yield f"{tests}: {(result.output.strip().splitlines() or ['nothing said'])[-1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-j", "--jobs", type=int, default=1, help="mutations at a time (default 1)")
    parser.add_argument("--save", action="store_true", help="file the verdicts under benchmarks/results")
    parser.add_argument("-k", "--keyword", default="", help="only mutations whose description or file contains this")
    options = parser.parse_args()
    chosen = [m for m in (*MUTATIONS, *SPARSE, *TRITON) if options.keyword in m.what or options.keyword in m.file]
    started = time.monotonic()
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    CONTEXT.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="pocl-mutation-cache-") as folder:
        cache = Path(folder)
        broken = [] if options.keyword else list(sound(cache))
        if broken:
            print("These tests fail on the kernels as they are:", *broken, sep="\n  ")
            return 1
        counts: dict[str, int] = {}
        verdicts: dict[str, list[str]] = {}
        with ThreadPoolExecutor(options.jobs) as pool:
            for mutation, (verdict, detail) in zip(chosen, pool.map(lambda m: judge(m, cache), chosen), strict=True):
                counts[verdict] = counts.get(verdict, 0) + 1
                verdicts[f"{mutation.file}: {mutation.what}"] = [verdict, detail]
                if options.save:  # as it goes: an hour's work must not be lost
                    save_results("mutations", {"verdicts": verdicts})
                print(f"{verdict:9}{mutation.file:25}{mutation.what:52}{detail}", flush=True)
    print(
        ", ".join(f"{n} {verdict}" for verdict, n in counts.items()),
        f"of {len(chosen)} in {time.monotonic() - started:.0f} s",
    )
    return int(counts.get("caught", 0) != len(chosen))


if __name__ == "__main__":
    sys.exit(main())
