"""`pocl status` says how long a run will still take, the steps not begun too."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pocl.pipeline.foresight import ESTIMATE, seconds_left
from pocl.run_folder import MANIFEST
from pocl.run_lock import only_user

from ..conftest import pocl

STEPS = ["models", "training", "evaluation", "report"]


def left(folder: Path, records: dict[str, Any], **options: Any) -> Any:
    told = {"training": 100.0, "evaluation": 50.0, "report": 2.0}
    (folder / ESTIMATE).write_text(json.dumps({"seconds": told}))
    options = {"progress": {}, "running": True} | options
    return seconds_left(folder, STEPS, {"models": {"state": "finished", "seconds": 3.0}} | records, **options)


def test_what_is_not_begun_takes_its_estimate(tmp_path: Path) -> None:
    assert left(tmp_path, {}) == (152.0, {"training": 100.0, "evaluation": 50.0, "report": 2.0})
    assert seconds_left(tmp_path / "none", STEPS, {}, {}, running=True) is None


def test_estimates_are_corrected_by_what_was_measured(tmp_path: Path) -> None:
    done = {"training": {"state": "finished", "seconds": 150.0}}
    assert left(tmp_path, done)[0] == pytest.approx(1.5 * 52)
    done["training"]["seconds"] = 1e6  # a machine that slept says nothing of the rest
    assert left(tmp_path, done)[0] == 5 * 52


def test_a_step_at_work_has_less_and_less_before_it(tmp_path: Path) -> None:
    def running(seconds: float, **progress: float) -> float:
        record = {"state": "started", "seconds": seconds - 10, "started_at": time.time() - 10}
        return float(left(tmp_path, {"training": record}, progress=progress)[0])

    assert running(30) == pytest.approx(70 + 52, abs=1)
    assert running(5000) == pytest.approx(10 + 52, abs=1)
    assert running(80, training=0.4) == pytest.approx(120 + 2 * 52, abs=1)  # twice as slow as was estimated


def test_the_clock_of_a_stopped_run_stands(tmp_path: Path) -> None:
    record = {"state": "started", "seconds": 30.0, "started_at": time.time() - 1e5}
    assert left(tmp_path, {"training": record}, running=False)[0] == 70 + 52


def test_status_tells_it_of_the_whole_run(copied_run: Path) -> None:
    manifest = json.loads((copied_run / MANIFEST).read_text())
    assert set(json.loads((copied_run / ESTIMATE).read_text())["seconds"]) == set(manifest["steps"]) - {
        "models",
        "data",
    }
    found = json.loads(pocl("status", copied_run, "--json").stdout)
    assert found["seconds_left"] == 0
    assert "left" not in pocl("status", copied_run).stdout
    for name in ("evaluation", "report"):
        del manifest["steps"][name]
    manifest["steps"]["training"] |= {"state": "started", "started_at": time.time()}
    (copied_run / MANIFEST).write_text(json.dumps(manifest))
    with only_user(copied_run):
        found = json.loads(pocl("status", copied_run, "--json").stdout)
        text = pocl("status", copied_run).stdout
    waiting = {step["name"]: step["seconds_left"] for step in found["steps"] if step["state"] != "finished"}
    assert set(waiting) == {"training", "evaluation", "report"}
    assert found["seconds_left"] == pytest.approx(sum(waiting.values()), abs=2)
    assert found["seconds_left"] > 0
    assert "left in all" in text
    (copied_run / ESTIMATE).unlink()
    assert json.loads(pocl("status", copied_run, "--json").stdout)["seconds_left"] is None
