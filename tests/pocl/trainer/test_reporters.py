"""What reporters write lies in the run's folder, and what a tied head lacks in a checkpoint is no matter."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.integrations import TensorBoardCallback

from pocl.trainer import POCLTrainer
from pocl.trainer.callbacks import keep_beside_run

from .conftest import llama


def board(folder: str | None = None) -> Any:
    """The callback without its package."""
    made = object.__new__(TensorBoardCallback)
    made.logging_dir, made.tb_writer, made._SummaryWriter = folder, None, lambda log_dir: log_dir
    return made


def test_tensorboard_writes_into_the_runs_folder_whatever_is_logged_first(tmp_path: Path) -> None:
    first, told = board(), board("/elsewhere")
    keep_beside_run([first, told], str(tmp_path))
    first._init_summary_writer(None)
    assert first.tb_writer == str(tmp_path / "tensorboard")
    assert told.logging_dir == "/elsewhere"


def test_the_trainer_tells_its_callbacks_where(
    student: Any, teacher: Any, config: Callable[..., Any], rows: Any, subsets: Any
) -> None:
    mine = board()
    trainer = POCLTrainer(student, teacher, config(), rows, subsets, callbacks=[mine])
    assert mine.logging_dir == str(Path(trainer.args.output_dir, "tensorboard"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_that_a_checkpoint_lacks_is_not_missed(
    tied: bool, teacher: Any, config: Callable[..., Any], rows: Any, subsets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("transformers.trainer.logger.warning", said.append)
    trainer = POCLTrainer(llama(16, 1, seed=1, tie_word_embeddings=tied), teacher, config(), rows, subsets)
    trainer._issue_warnings_after_load(SimpleNamespace(missing_keys=["lm_head.weight"], unexpected_keys=[]))
    assert bool(said) is not tied
