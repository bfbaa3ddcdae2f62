"""A recipe killed (-9) in every phase and started again by the same command ends in the same bits."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pocl.cli import app

pytestmark = pytest.mark.slow


def dies_at(owner: Any, name: str, number: int = 1, when: Callable[..., bool] = lambda *args: True) -> None:
    """Make a function kill the process after its n-th call of those that count."""
    function, left = getattr(owner, name), [number]

    def dying(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        left[0] -= when(*args)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def while_caching() -> None:
    from pocl.teacher.store import Store

    dies_at(Store, "_save", when=lambda store, path, *_: path.name.startswith("shard"))  # its checksum is not there yet


def while_warming_up() -> None:
    from pocl.trainer import POCLTrainer

    dies_at(POCLTrainer, "training_step", 7)


def while_ranking() -> None:
    from pocl.difficulty.store import ShardStore

    dies_at(ShardStore, "save")


def in_stage(index: int, step: int) -> Callable[[], None]:
    def arrange() -> None:
        from pocl.trainer import POCLTrainer

        dies_at(POCLTrainer, "training_step", step, lambda trainer, *_: trainer.stage.index == index)

    return arrange


def while_saving_a_checkpoint() -> None:
    from pocl.trainer import POCLTrainer

    dies_at(POCLTrainer, "_save_rng_state", when=lambda trainer, *_: trainer.stage.index == 1)


def while_saving_the_student() -> None:
    from pocl.trainer import weights

    dies_at(weights, "save_weights", when=lambda trainer, folder: folder.name == ".student-writing")


def before_the_step_is_noted() -> None:
    from pocl.run_folder import RunFolder

    RunFolder.finish = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]


KILLS: tuple[Callable[[], None], ...] = (
    while_caching,
    while_warming_up,
    while_ranking,
    in_stage(0, 8),
    in_stage(1, 3),
    while_saving_a_checkpoint,
    in_stage(1, 8),
    while_saving_the_student,
    before_the_step_is_noted,
)


@pytest.fixture
def recipe(
    tmp_path: Path, tiny_teacher_folder: Path, make_tiny_folder: Callable[..., Path], tiny_pairs: list[dict[str, str]]
) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs))
    values = {
        "teacher": str(tiny_teacher_folder),
        "student": str(make_tiny_folder(seed=4, attention_dropout=0.2)),  # whose random numbers must be taken up again
        "data": {
            "source": str(tmp_path / "pairs.jsonl"),
            "num_validation": 4,
            "num_test": 0,
            "template": "plain",
            "max_length": 64,
            "max_prompt_length": 32,
        },
        "warmup": {"epochs": 2},
        "ranking": {"max_new_tokens": 4},
        "curriculum": {"num_stages": 2, "epochs": 3, "learning_rate": 1e-2},
        "on_policy": {"share": 0.3, "max_new_tokens": 4, "replay": 20},
        "training": {"batch_size": 8},
        "teacher_cache": {"mode": "cached"},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def distill(recipe: Path, output: Path) -> bytes:
    """The weights of the student that the command makes."""
    result = CliRunner().invoke(app, ["distill", str(recipe), "--output", str(output)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return (output / "student" / "model.safetensors").read_bytes()


def test_killed_in_every_phase_it_ends_in_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    whole = distill(recipe, tmp_path / "whole")
    for arrange in KILLS:

        def child(arrange: Callable[[], None] = arrange) -> None:
            arrange()
            distill(recipe, tmp_path / "cut")

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(120)
        process.kill()
        assert process.exitcode == -signal.SIGKILL, arrange
    assert distill(recipe, tmp_path / "cut") == whole
