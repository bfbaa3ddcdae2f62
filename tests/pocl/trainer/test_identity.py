"""A folder holds one run: what changes its result is refused and named, what leaves the result alone goes on."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl.curriculum import Curriculum
from pocl.teacher import HiddenStateCache, OnlineTeacher

transformers = pytest.importorskip("transformers")

CURRICULUM = Curriculum.constant(num_subsets=2, max_steps=1)


@pytest.fixture
def run(student: Any, teacher: Any, config: Any, rows: Any, subsets: Any, unseen_rows: Any) -> Callable[..., Any]:
    """Train one step; arguments of the trainer, and settings, in place of the usual ones."""
    from pocl.trainer import POCLTrainer

    start = copy.deepcopy(student)

    def go(**changes: Any) -> Any:
        given = {
            "model": copy.deepcopy(start),
            "teacher": teacher,
            "train_dataset": rows,
            "subsets": [s % 2 for s in subsets],
            "curriculum": CURRICULUM,
            "eval_dataset": unseen_rows,
            "divergence": "fkl",
        }
        given |= {name: changes.pop(name) for name in set(changes) & (given.keys() | {"callbacks"})}
        trainer = POCLTrainer(args=config(**changes), **given)
        trainer.train()
        return trainer

    return go


def with_config(model: Any, **fields: Any) -> Any:
    """The same weights under another configuration."""
    other = type(model)(type(model.config)(**model.config.to_dict() | fields))
    other.load_state_dict(model.state_dict())
    return other


def changed(rows: Any, column: str) -> Any:
    """The rows with one number of the last one another."""
    last = {**rows[-1], column: [*rows[-1][column]]}
    last[column][-1] = 5 if last[column][-1] != 5 else 6
    return [*rows[:-1], last]


CHOOSES = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
OTHERS: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "teacher": (lambda s, t, r: {"teacher": OnlineTeacher(with_config(s, rope_theta=7.0))}, "teacher.*hidden_size: 24"),
    "teacher's configuration": (
        lambda s, t, r: {"teacher": OnlineTeacher(with_config(t.model, rms_norm_eps=0.1))},
        "teacher: other weights or another configuration",
    ),
    "student's configuration": (
        lambda s, t, r: {"model": with_config(s, attention_dropout=0.3)},
        r"student\.config\.attention_dropout: 0\.0 there, 0\.3 now",
    ),
    "frozen layers": (lambda s, t, r: {"model": frozen(s)}, "student.trained_parameters"),
    "one token": (lambda s, t, r: {"train_dataset": changed(r, "input_ids")}, "train_dataset: other texts"),
    "one label": (lambda s, t, r: {"train_dataset": changed(r, "labels")}, "train_dataset: other labels"),
    "order": (lambda s, t, r: {"train_dataset": r[::-1]}, "train_dataset: other sample_ids, or in another order"),
    "a row less": (lambda s, t, r: {"train_dataset": r[:-1], "subsets": [0, 1] * 10 + [0]}, "rows: 22 there, 21 now"),
    "subsets": (lambda s, t, r: {"subsets": [0, 1] * 11}, "subsets: the rows are dealt"),
    "divergence": (lambda s, t, r: {"divergence": "rkl"}, r"divergence.0: 'ForwardKL\(\)' there, 'ReverseKL\(\)' now"),
    "betas": (lambda s, t, r: {"adam_beta2": 0.95}, "adam_beta2: 0.999 there, 0.95 now"),
    "schedule": (lambda s, t, r: {"lr_scheduler_kwargs": {"min_lr": 1e-4}}, "lr_scheduler_kwargs.min_lr: 1e-07 there"),
    "precision": (lambda s, t, r: {"bf16": True}, "bf16: False there, True now"),
    "optimizer": (lambda s, t, r: {"optim": "sgd"}, "optim: 'adamw_torch.*' there, 'sgd' now"),
    "batch": (lambda s, t, r: {"per_device_train_batch_size": 8}, "batch_size: 4 there, 8 now"),
}


def frozen(model: Any) -> Any:
    model = copy.deepcopy(model)
    model.model.layers.requires_grad_(False)
    return model


def test_another_run_is_refused_with_what_differs(run: Any, student: Any, teacher: Any, rows: Any) -> None:
    folder = Path(run().args.output_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for change, message in OTHERS.values():
        with pytest.raises(ValueError, match=rf"holds another run \(.*{message}.*resume_from_checkpoint=False"):
            run(**change(student, teacher, rows))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_evaluations_choose_by_counts_only_where_they_choose(run: Any, unseen_rows: Any, tmp_path: Path) -> None:
    run()
    run(eval_dataset=unseen_rows[:-1], eval_strategy="steps", eval_steps=7)
    chosen = {**CHOOSES, "output_dir": str(tmp_path / "chosen")}
    run(**chosen)
    with pytest.raises(ValueError, match="eval_dataset.*rows: 7 there, 6 now"):
        run(eval_dataset=unseen_rows[:-1], **chosen)
    with pytest.raises(ValueError, match="metric_for_best_model: 'loss' there, 'cross_entropy' now"):
        run(metric_for_best_model="cross_entropy", **chosen)


def test_what_leaves_the_result_alone_goes_on(run: Any, teacher: Any, rows: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    folder = Path(run().args.output_dir)
    marks = {path: path.stat().st_mtime_ns for path in folder.glob("stage-0/**/*")}
    stored = HiddenStateCache.build(tmp_path / "cache", teacher, rows, disable_tqdm=True)
    same = {
        "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "padding": {"packing": False},
        "a table": {"train_dataset": Dataset.from_list(rows)},
        "further columns": {"train_dataset": [{**row, "text": "x"} for row in rows]},
        "a stored teacher": {"teacher": stored},
        "logging": {"logging_steps": 5, "run_name": "x", "save_total_limit": 4},
        "memory": {"activation_checkpointing": True},
    }
    for changes in same.values():
        run(**changes)
    moved = shutil.move(folder, tmp_path / "moved")
    run(output_dir=str(moved))
    assert [(Path(moved) / path.relative_to(folder)).stat().st_mtime_ns for path in marks] == list(marks.values())


def test_a_model_that_a_run_has_left_behind_goes_on_in_its_folder_and_is_another_elsewhere(
    run: Any, student: Any, tmp_path: Path
) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    curriculum = Curriculum.constant(num_subsets=2, epochs=1)
    whole = run(curriculum=curriculum, output_dir=str(tmp_path / "whole"))
    model = copy.deepcopy(student)
    with pytest.raises(KeyboardInterrupt):
        run(model=model, curriculum=curriculum, callbacks=[Stop()])
    trainer = run(model=model, curriculum=curriculum)  # as when a cell of a notebook runs again
    assert trainer.train().global_step == 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    other = run(model=model, curriculum=curriculum, output_dir=str(tmp_path / "other"))
    assert other.progress.identity()["student"] != trainer.progress.identity()["student"]
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="student: other weights at the start"):
        run(model=model, curriculum=curriculum)
    run(model=model, curriculum=curriculum, output_dir=str(tmp_path / "new"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT 0.21 asks by the old name
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_fresh_adapters_are_the_same_whatever_noise_they_start_from_but_not_with_another_scale(
    run: Any, student: Any
) -> None:
    peft = pytest.importorskip("peft")

    def adapted(seed: int, **fields: Any) -> Any:
        torch.manual_seed(seed)
        targets = ["q_proj", "embed_tokens"]
        return peft.get_peft_model(copy.deepcopy(student), peft.LoraConfig(r=2, target_modules=targets, **fields))

    run(model=adapted(0))
    run(model=adapted(1))
    with pytest.raises(ValueError, match=r"student\.adapters\.default\.lora_alpha: 8 there, 32 now"):
        run(model=adapted(0, lora_alpha=32))
    with pytest.raises(ValueError, match="student: other weights"):
        run(model=adapted(0, init_lora_weights=False))


def test_a_note_that_cannot_be_read_or_says_too_little_is_refused(run: Any) -> None:
    note = Path(run().args.output_dir) / "run.json"
    note.write_text('{"seed": 42}')
    with pytest.raises(ValueError, match="another release of pocl, which did not note adam_beta1, "):
        run()
    note.write_text('{"seed"')
    with pytest.raises(ValueError, match=r"run\.json cannot be read; choose another folder"):
        run()
