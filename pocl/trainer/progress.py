"""What a staged run leaves on disk to go on from, and what it takes back after an interruption.

    output_dir/
        run.json                what the run is; another run may not go on in this folder
        log.jsonl               one line a log event, global steps
        stage-0/checkpoint-40/  as transformers writes them
        stage-0/student/        the weights the next stage starts from
        stage-0/finished.json   written last: the stage is done

A checkpoint counts only if it is whole: transformers writes `trainer_state.json` after everything else, so a checkpoint
whose state file cannot be read, or whose weights or states are missing or cut off, was being written, or removed, when
the run died.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl.trainer.identity import differences

_ANOTHER = "choose another folder, or start anew in this one with train(resume_from_checkpoint=False)"


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there in full or not at all, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True)
class FinishedStage:
    """Record of a finished stage: its optimizer steps, the best metric and the checkpoint its weights are from."""

    steps: int
    best_metric: float | None
    checkpoint: str | None


class RunProgress:
    """Reads and writes the files above.

    Args:
        output_dir: folder of the run.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.root = Path(output_dir)
        self.log_path = self.root / "log.jsonl"

    def stage_dir(self, index: int) -> Path:
        return self.root / f"stage-{index}"

    def student_dir(self, index: int) -> Path:
        """Weights that the next stage starts from."""
        return self.stage_dir(index) / "student"

    def finished(self, index: int) -> FinishedStage | None:
        """The record of a stage, None while it is not finished."""
        path = self.stage_dir(index) / "finished.json"
        return FinishedStage(**json.loads(path.read_text("utf-8"))) if path.exists() else None

    def mark_finished(self, index: int, record: FinishedStage) -> None:
        write_atomically(self.stage_dir(index) / "finished.json", json.dumps(vars(record)))

    def identity(self) -> dict[str, Any] | None:
        """What run this folder holds, None if none."""
        path = self.root / "run.json"
        try:
            return json.loads(path.read_text("utf-8")) if path.exists() else None
        except ValueError:
            raise ValueError(f"{path} cannot be read; {_ANOTHER}") from None

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Note what run this folder holds, or check that it is the same one.

        Args:
            identity: plain values (see `identity.run_identity`).

        Raises:
            ValueError: the folder holds another run; says what differs.
        """
        found = self.identity()
        if found is None:
            write_atomically(self.root / "run.json", json.dumps(identity, indent=1))
        elif unknown := sorted(identity.keys() - found.keys()):
            raise ValueError(
                f"output_dir {self.root} holds a run of another release of pocl, which did not note "
                f"{', '.join(unknown)}; {_ANOTHER}"
            )
        elif differing := differences(found, identity):
            shown = [*differing[:6], *([f"{len(differing) - 6} more"] if len(differing) > 6 else [])]
            raise ValueError(f"output_dir {self.root} holds another run ({'; '.join(shown)}); {_ANOTHER}")

    def forget(self) -> None:
        """Remove what an earlier run left, and nothing else."""
        for path in self.root.glob("stage-*"):
            shutil.rmtree(path)
        for name in ("run.json", "log.jsonl"):
            (self.root / name).unlink(missing_ok=True)

    def newest_checkpoint(self, index: int) -> Path | None:
        """The newest whole checkpoint of a stage."""
        found = sorted(self.stage_dir(index).glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        return next((path for path in reversed(found) if is_whole(path)), None)

    def clean(self, index: int) -> None:
        """Remove the half-written checkpoints of a stage."""
        for path in self.stage_dir(index).glob("checkpoint-*"):
            if not is_whole(path):
                shutil.rmtree(path)

    def keep_only(self, index: int, checkpoint: str | None) -> None:
        """Remove the checkpoints of a finished stage except one."""
        for path in self.stage_dir(index).glob("checkpoint-*"):
            if path.name != checkpoint:
                shutil.rmtree(path)

    def append_log(self, line: Mapping[str, Any]) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """All whole lines of the log."""
        if not self.log_path.exists():
            return []
        lines = self.log_path.read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines if _step(line) != float("inf")]

    def cut_log(self, step: int) -> None:
        """Drop log lines after a global step: training goes on from there and writes them again."""
        if self.log_path.exists():
            lines = [line for line in self.log_path.read_text("utf-8").splitlines(keepends=True) if _step(line) <= step]
            write_atomically(self.log_path, "".join(lines))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and not begun to be removed."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        weights = list(checkpoint.glob("*.safetensors"))
        sharded = any(path.is_dir() for path in checkpoint.iterdir())  # as FSDP and DeepSpeed write
        states = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
        return (
            bool(weights or sharded)
            and all(_safetensors_is_whole(path) for path in weights)
            and all(zipfile.is_zipfile(path) for path in states)
        )
    except (OSError, ValueError):
        return False


def _safetensors_is_whole(path: Path) -> bool:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > path.stat().st_size:
            return False
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return path.stat().st_size == 8 + length + max(ends, default=0)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # the line that was being written when the run died
