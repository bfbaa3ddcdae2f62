"""What was written can be read by those whom the umask lets in, whichever library wrote it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pocl.modes import follow_umask
from pocl.run_folder import write_text


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_tree_follows_the_umask_and_nothing_else_changes(umask: int, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir(mode=0o700)
    save_file({"x": torch.ones(3)}, folder / "model.safetensors")
    (folder / "run.sh").write_text("true")
    (folder / "run.sh").chmod(0o700)
    (tmp_path / "private").write_text("secret")
    (tmp_path / "private").chmod(0o600)
    (folder / "link").symlink_to(tmp_path / "private")
    follow_umask(folder)
    assert mode(folder / "model.safetensors") == 0o666 & ~umask
    assert mode(folder / "run.sh") == 0o700 | (0o666 & ~umask)
    assert mode(folder) == 0o700 | (0o777 & ~umask)
    assert mode(tmp_path / "private") == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["link", "model.safetensors", "run.sh"]


def test_files_that_are_replaced_follow_the_umask(umask: int, tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "{}")
    assert mode(tmp_path / "a.json") == 0o666 & ~umask
    follow_umask(tmp_path / "not" / "there")


def test_a_finished_run_holds_no_private_file(finished: Path) -> None:
    def readable(path: Path) -> bool:
        return mode(path) & 0o044 == (0o666 & ~umask_now()) & 0o044

    private = [str(path) for path in (finished / "run").rglob("*") if path.is_file() and not readable(path)]
    assert private == []


def umask_now() -> int:
    value = os.umask(0o022)
    os.umask(value)
    return value


def test_a_student_of_the_trainer_alone_can_be_read(tmp_path: Path, tiny_model_folder: Path) -> None:
    from types import SimpleNamespace

    from pocl.models import load_causal_lm
    from pocl.trainer.weights import save_weights

    accelerator = SimpleNamespace(unwrap_model=lambda model: model, is_main_process=True)
    trainer: Any = SimpleNamespace(
        accelerator=accelerator,
        model=load_causal_lm(tiny_model_folder),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        processing_class=None,
    )
    save_weights(trainer, tmp_path / "student")
    assert mode(tmp_path / "student" / "model.safetensors") == 0o666 & ~umask_now()
