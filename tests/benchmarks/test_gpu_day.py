"""The first ten minutes on a GPU, rehearsed: every step finishes, whatever is missing, and the page says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_day


def test_a_step_that_fails_is_reported_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: bool) -> dict[str, object]:
        raise MemoryError("none left")

    def impossible(_: bool) -> dict[str, object]:
        raise gpu_day.SkippedError("no such tool")

    steps = {"correct": lambda _: {"all fine": False}, "loss": broken, "counters": impossible}
    monkeypatch.setattr(gpu_day, "STEPS", steps)
    for name in steps:
        gpu_day.run_step(name, tmp_path, rehearse=False)
    page = gpu_day.page(tmp_path, rehearse=False)
    assert "| loss | failed |" in page
    assert "MemoryError: none left" in page
    assert "| counters | skipped |" in page
    assert "**Correct: NO.**" in page
    assert json.loads((tmp_path / "counters.json").read_text())["reason"] == "no such tool"


def test_the_page_says_what_to_tune_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = {"shape: a auto": 1.2, "shape: b auto": 1.7}
    rows = {name: {"ms": x, "over the floor": x, "all ms": [x]} for name, x in ratios.items()}
    steps = {"correct": lambda _: {"all fine": True}, "loss": lambda _: rows}
    monkeypatch.setattr(gpu_day, "STEPS", steps)
    for name in steps:
        gpu_day.run_step(name, tmp_path, rehearse=False)
    page = gpu_day.page(tmp_path, rehearse=False)
    assert "**Correct: yes.**" in page
    assert "**Tune first:** shape: b auto, 1.70 times" in page


def test_a_rehearsal_takes_a_gpus_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocl_kernels import operators

    monkeypatch.setattr(operators, "is_triton", operators.is_triton)  # to be put back
    asked = {"ways": lambda _: {"triton": operators.is_triton("auto", torch.device("cpu"))}}
    monkeypatch.setattr(gpu_day, "STEPS", asked)
    gpu_day.run_step("ways", tmp_path, rehearse=True)
    assert json.loads((tmp_path / "ways.json").read_text())["values"] == {"triton": True}


def test_what_the_host_benchmark_replaces_is_there() -> None:
    # in a process of its own: importing it switches Triton's interpreter off
    program = "from benchmarks.bench_host import triton_path\nwith triton_path(): pass"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0
