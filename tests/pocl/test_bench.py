"""`pocl bench`: from a checkout and from an installed package, as tables and as JSON."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pocl import bench

from .conftest import pocl

BENCHMARK = """
import argparse
from benchmarks.measure_of_the_test import save_results
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    print("a table")
    if options.save:
        save_results("toy", {f"size {options.size}": {"seconds": 1.5}})
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with benchmarks of its own; returns where the user stands."""
    import sys

    folder = tmp_path / "site-packages" / "pocl" / "shipped" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "bench_toy.py").write_text(BENCHMARK)
    (folder / "bench_silent.py").write_text("__name__ == '__main__' and print('a table')")
    (folder / "bench_poor.py").write_text("import a_package_that_nobody_has\nassert __name__ == '__main__'")
    (folder / "bench_judged.py").write_text("from tests.kernels import cases\nassert __name__ == '__main__'")
    (folder / "bench_of_pytest.py").write_text("def test_speed(): pass")
    shutil.copy(Path(bench.__file__).parents[1] / "benchmarks" / "measure.py", folder / "measure_of_the_test.py")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(bench, "__file__", str(folder.parents[1] / "bench.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setenv("PYTHONPATH", "")
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "here"


def test_an_installed_package_lists_and_runs_its_benchmarks(installed: Path) -> None:
    listed = pocl("bench")
    assert listed.exit_code == 0
    assert "poor, silent, toy" in listed.output
    result = pocl("bench", "toy", "--size", "3", "--save")
    assert result.exit_code == 0, result.output
    assert result.output == "a table\n"
    (file,) = installed.rglob("*.json")
    assert "benchmark-results" in file.parts


@pytest.mark.parametrize("words", [["--json", "--size", "3"], ["--size", "3", "--json", "--save"]])
def test_json_holds_what_would_be_filed_and_files_nothing(installed: Path, words: list[str]) -> None:
    result = pocl("bench", "toy", *words)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["size 3"]["values"] == {"seconds": 1.5}
    assert {"machine", "versions"} < set(found["size 3"])
    assert "a table" in result.stderr
    assert not list(installed.iterdir())


def test_what_a_benchmark_cannot_do_is_told_in_words(installed: Path) -> None:
    for words, message in (
        (["silent", "--json"], "silent files no results, so it has no --json; those that do are toy"),
        (["poor"], "needs a_package_that_nobody_has, which is not installed: pip install 'pocl[bench]'"),
        (
            ["judged"],
            "judged needs a checkout of pocl, whose tests or history it uses; an installed package has poor, ",
        ),
        (["of_pytest"], "there is no benchmark 'of_pytest'; there are poor, silent, toy"),
        (["none"], "there is no benchmark 'none'; there are poor, silent, toy"),
    ):
        result = pocl("bench", *words)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.split())


def test_the_checkout_has_its_own_benchmarks() -> None:
    assert {"loss", "training", "exactness"} <= set(bench.subjects())
