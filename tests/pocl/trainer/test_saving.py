"""Checkpoints between epochs: by steps, by time, equal over processes, and a kill costs no more than the interval."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pocl.curriculum import Curriculum
from pocl.interval import Interval
from pocl.trainer import POCLTrainer
from pocl.trainer.saving import SaveEvery

from .conftest import llama


def saves(interval: Interval, seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], int]:
    """After which steps a checkpoint is asked for when step i takes seconds[i]; how often processes asked the first."""
    clock, looks = [0.0], [0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    callback = SaveEvery(interval, torch.device("cpu"))
    agreed = callback._agreed

    def counted(value: float) -> float:
        looks[0] += 1
        return agreed(value)

    monkeypatch.setattr(callback, "_agreed", counted)
    state: Any = SimpleNamespace(global_step=0)
    callback.on_train_begin(None, state, None)  # type: ignore[arg-type]
    found = []
    for taken in seconds:
        clock[0] += taken
        state.global_step += 1
        control: Any = SimpleNamespace(should_save=False)
        callback.on_step_end(None, state, control)  # type: ignore[arg-type]
        if control.should_save:
            found.append(state.global_step)
            callback.on_save(None, state, control)  # type: ignore[arg-type]
    return found, looks[0]


def test_steps_are_counted_over_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert saves(Interval(steps=4), [1.0] * 10, monkeypatch)[0] == [4, 8]


def test_time_is_kept_at_an_even_pace_with_few_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    found, looks = saves(Interval(seconds=100), [1.0] * 1000, monkeypatch)
    assert [b - a for a, b in zip([0, *found], found, strict=False)] == [100] * 10
    assert looks < 150


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_steps_that_become_slower_or_faster_are_noticed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [1.0] * 90 + [factor] * 1000
    found, _ = saves(Interval(seconds=100), seconds, monkeypatch)
    times = [sum(seconds[:step]) for step in found]
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert max(gaps) <= 100 + 10 * max(1.0, factor)
    assert min(gaps) >= 100


def test_steps_longer_than_the_interval_are_each_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert saves(Interval(seconds=10), [60.0] * 5, monkeypatch)[0] == [1, 2, 3, 4, 5]


def test_a_long_epoch_that_dies_goes_on_from_the_last_interval_to_the_same_weights(
    config: Callable[..., Any], rows: list[dict[str, Any]], teacher: Any, tmp_path: Path
) -> None:
    def trainer(folder: str) -> POCLTrainer:
        args = config(output_dir=str(tmp_path / folder), save_strategy="epoch", save_every=2)
        return POCLTrainer(llama(16, 1, seed=1), teacher, args, rows, curriculum=Curriculum.constant(epochs=1))

    undisturbed = trainer("undisturbed")
    undisturbed.train()
    dying = trainer("dying")
    step = dying.training_step

    def dies(*args: Any, **kwargs: Any) -> Any:
        if dying.state.global_step == 5:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    dying.training_step = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        dying.train()
    again = trainer("dying")
    trained: list[int] = []
    step_again = again.training_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        trained.append(again.state.global_step)
        return step_again(*args, **kwargs)

    again.training_step = counted  # type: ignore[method-assign]
    again.train()
    assert trained == [4, 5]
    ours, theirs = again.model.state_dict(), undisturbed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_interval_that_is_none_is_refused(config: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="save_every must be a number of steps"):
        config(save_every="often")


@pytest.mark.parametrize(("launched", "fields"), [("bf16", {}), ("fp16", {}), ("fp16", {"bf16": True})])
def test_a_launcher_of_another_precision_is_refused(
    launched: str, fields: dict[str, bool], config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=f"launched with mixed_precision {launched}"):
        config(**fields)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    config()
