"""What is said before the steps of a recipe begin."""

from typing import Any

import pytest

from pocl.pipeline.engine import run_steps


def test_several_processes_are_sent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    unused: Any = None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"one process, and 2 were started.*POCLTrainer"):
        run_steps([], unused, unused, unused)
    monkeypatch.setenv("WORLD_SIZE", "1")
    run_steps([], unused, unused, unused)
