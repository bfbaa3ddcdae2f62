"""Killed anywhere and started again, a run ends in the weights of the uninterrupted one, bit for bit."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl.curriculum import Curriculum
from pocl.trainer import progress
from pocl.trainer.progress import RunProgress, is_whole

transformers = pytest.importorskip("transformers")

CURRICULA = {
    "fresh": Curriculum.baby_step(2, epochs=2),
    "carried, one schedule": Curriculum.baby_step(2, epochs=2, optimizer="carried", schedule="continuous"),
    "best, to convergence": Curriculum.baby_step(2, epochs=9, patience=2),
}

# One after the other: in stage 0, at its last step before it is saved, at its end, while stage 1 saves, in stage 1.
KILLS = (("on_step_end", 5), ("on_step_end", 4), ("on_train_end", 1), ("on_save", 2), ("on_step_end", 3))


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(transformers.TrainerCallback):
    """Kill the process at the n-th time of an event."""

    def __init__(self, event: str, number: int) -> None:
        self.left = number
        setattr(self, event, self.count)

    def count(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if not self.left:
            die()


@pytest.fixture
def run(
    student: Any, teacher: Any, config: Any, rows: Any, unseen_rows: Any, subsets: Any, tmp_path: Path
) -> Callable[..., torch.Tensor]:
    from pocl.trainer import POCLTrainer

    def train(
        folder: str,
        curriculum: Curriculum,
        callback: Any = None,
        before: Callable[[], None] | None = None,
        **options: Any,
    ) -> Any:
        if before is not None:
            before()
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**student.config.to_dict() | {"attention_dropout": 0.2})
        )
        model.load_state_dict(student.state_dict())
        evaluated = curriculum.patience is not None
        args = config(
            output_dir=str(tmp_path / folder),
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            eval_strategy="steps" if evaluated else "no",
            eval_steps=2,
            load_best_model_at_end=evaluated,
            learning_rate=3e-2,
            **options,
        )
        trainer = POCLTrainer(
            model,
            teacher,
            args,
            rows,
            subsets=[s % 2 for s in subsets],
            curriculum=curriculum,
            eval_dataset=unseen_rows,  # not learned, so the metric turns
            callbacks=[callback] if callback else None,
        )
        trainer.train()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    return train


def in_a_child(function: Callable[..., Any], *args: Any) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("name", CURRICULA)
def test_killed_at_any_step_it_ends_in_the_same_bits(name: str, run: Any, tmp_path: Path) -> None:
    curriculum = CURRICULA[name]
    whole = run("whole", curriculum)
    for event, number in KILLS:
        code = in_a_child(run, "cut", curriculum, DieAt(event, number))
        assert code == -signal.SIGKILL, f"{event} {number}"
    assert torch.equal(run("cut", curriculum), whole)
    if curriculum.patience is not None:
        assert all(RunProgress(tmp_path / "whole").finished(i).steps < planned for i, planned in enumerate((36, 54)))
    logs = [(tmp_path / folder / "log.jsonl").read_text().splitlines() for folder in ("whole", "cut")]
    steps = [[json.loads(line)["step"] for line in log if '"loss"' in line] for log in logs]
    assert steps[0] == steps[1] == sorted(steps[0])


def test_with_weights_alone_a_stage_that_was_cut_off_starts_anew_in_the_same_bits(run: Any) -> None:
    whole = run("whole", CURRICULA["fresh"], save_only_model=True)
    for event, number in KILLS[2:]:

        def cut(event: str = event, number: int = number) -> None:
            run("cut", CURRICULA["fresh"], DieAt(event, number), save_only_model=True)

        assert in_a_child(cut) == -signal.SIGKILL
    assert torch.equal(run("cut", CURRICULA["fresh"], save_only_model=True), whole)


@pytest.mark.parametrize("what", ["save_pretrained", "optimizer", "state", "student", "finished"])
def test_killed_while_writing_it_ends_in_the_same_bits(what: str, run: Any) -> None:
    curriculum = CURRICULA["fresh"]
    whole = run("whole", curriculum)

    def break_writing() -> None:
        if what == "save_pretrained":  # the weights' file is there, but cut off
            save = transformers.PreTrainedModel.save_pretrained

            def half(self: Any, folder: Any, **kwargs: Any) -> None:
                save(self, folder, **kwargs)
                path = Path(folder) / "model.safetensors"
                path.write_bytes(path.read_bytes()[:-100])
                if "checkpoint-4" in str(folder):
                    die()

            transformers.PreTrainedModel.save_pretrained = half
        elif what == "optimizer":
            transformers.Trainer._save_rng_state = die
        elif what == "state":

            def half_state(self: Any, path: str) -> None:
                Path(path).write_text('{"global_step": ')
                die()

            transformers.TrainerState.save_to_json = half_state
        elif what == "student":
            progress.RunProgress.mark_finished = die
        else:
            os.replace = die

    code = in_a_child(run, "cut", curriculum, None, break_writing)
    assert code == -signal.SIGKILL
    assert torch.equal(run("cut", curriculum), whole)


def test_half_written_checkpoints_are_recognised(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = RunProgress(tmp_path)
    for step in (2, 4, 6, 10):
        path = folder.stage_dir(0) / f"checkpoint-{step}"
        path.mkdir(parents=True)
        save_file({"a": torch.arange(9.0)}, path / "model.safetensors")
        (path / "trainer_state.json").write_text("{}")
    assert folder.newest_checkpoint(0) == folder.stage_dir(0) / "checkpoint-10"
    (folder.stage_dir(0) / "checkpoint-10" / "trainer_state.json").unlink()
    weights = folder.stage_dir(0) / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder.stage_dir(0) / "checkpoint-4" / "trainer_state.json").write_text('{"a": 1')
    assert folder.newest_checkpoint(0) == folder.stage_dir(0) / "checkpoint-2"
    weights.write_bytes(b"")
    assert not is_whole(weights.parent)
    weights.unlink()  # as if the run had died while it removed this one
    assert not is_whole(weights.parent)
    whole = folder.stage_dir(0) / "checkpoint-2"
    torch.save({"a": 1}, whole / "optimizer.pt")
    assert is_whole(whole)
    content = (whole / "optimizer.pt").read_bytes()
    (whole / "optimizer.pt").write_bytes(content[:-100])
    assert not is_whole(whole)
    (whole / "optimizer.pt").write_bytes(content)
    folder.clean(0)
    assert [path.name for path in folder.stage_dir(0).iterdir()] == ["checkpoint-2"]


def test_ctrl_c_says_how_to_go_on_and_leaves_a_run_to_go_on_with(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    curriculum = CURRICULA["fresh"]
    with pytest.raises(KeyboardInterrupt):
        run("cut", curriculum, Interrupt())
    assert "interrupted in stage 0 at step 3; the same command goes on" in caplog.text
    assert torch.equal(run("cut", curriculum), run("whole", curriculum))


def test_another_run_in_the_same_folder_is_refused_and_says_what_differs(run: Any, tmp_path: Path) -> None:
    run("here", Curriculum.baby_step(2, epochs=1))
    with pytest.raises(
        ValueError, match=r"another run \(curriculum\.stages\.0\.temperature: 1\.0 there, 3\.0 now.*=False"
    ):
        run("here", Curriculum.baby_step(2, epochs=1, temperature=3.0))
