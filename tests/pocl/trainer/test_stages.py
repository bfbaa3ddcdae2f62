"""What happens between stages: convergence, best weights, optimizer, learning rate; and what is refused beforehand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl.curriculum import Curriculum, Stage
from pocl.teacher import HiddenStateCache, OnlineTeacher

from .conftest import llama

transformers = pytest.importorskip("transformers")


@pytest.fixture
def trainer_of(student: Any, teacher: Any, config: Any, rows: Any, subsets: Any) -> Callable[..., Any]:
    from pocl.trainer import POCLTrainer

    def make(
        curriculum: Curriculum | None = None, *, trained_by: Any = teacher, model: Any = student, **kwargs: Any
    ) -> Any:
        names = set(kwargs) & {
            "callbacks",
            "divergence",
            "compute_generation_metrics",
            "eval_dataset",
            "subsets",
            "compute_metrics",
        }
        given = {name: kwargs.pop(name) for name in names}
        data = kwargs.pop("data", rows)
        given.setdefault("subsets", [s % 2 for s in subsets])
        return POCLTrainer(model, trained_by, config(**kwargs), data, curriculum=curriculum, **given)

    return make


def lines(trainer: Any, key: str = "loss") -> list[dict[str, Any]]:
    log = (Path(trainer.args.output_dir) / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, log) if key in line]


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}


def scripted(values: list[float]) -> Callable[[Any], dict[str, float]]:
    remaining = iter(values)
    return lambda model: {"rouge_l": next(remaining)}


def test_a_stage_ends_after_patience_evaluations_without_improvement(trainer_of, rows) -> None:
    scores = [0.1, 0.3, 0.2, 0.3, 0.2, math.nan, 0.1]
    trainer = trainer_of(
        Curriculum.baby_step(2, epochs=9, patience=2),
        eval_dataset=rows[:3],
        compute_generation_metrics=scripted(scores),
        metric_for_best_model="rouge_l",
        **EVALUATED,
    )
    output = trainer.train()
    assert [line["stage"] for line in lines(trainer)] == [0, 0, 0, 0, 1, 1, 1]
    assert output.global_step == 7
    records = [json.loads((trainer.progress.stage_dir(i) / "finished.json").read_text()) for i in (0, 1)]
    assert [record["best_metric"] for record in records] == [0.3, 0.2]


@pytest.mark.parametrize("start", ["best", "last"])
def test_a_stage_starts_from_the_best_or_the_last_weights(start: str, trainer_of, rows) -> None:
    seen: dict[str, Any] = {}

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            seen.setdefault(f"after {state.global_step}", state_of(model))

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            seen["begin"] = state_of(model)

    curriculum = Curriculum((Stage(0, (0,), max_steps=4), Stage(1, (0, 1), max_steps=1)), start=start)
    trainer = trainer_of(
        curriculum,
        eval_dataset=rows[:3],
        compute_generation_metrics=scripted([0.1, 0.5, 0.2, 0.3, 0.0]),
        callbacks=[Watch()],
        metric_for_best_model="rouge_l",
        **EVALUATED,
    )
    trainer.train()
    assert equal(seen["begin"], seen["after 2" if start == "best" else "after 4"])
    assert not equal(seen["after 2"], seen["after 4"])
    trainer.create_model_card()
    assert f"each stage starts from the {start} weights" in (Path(trainer.args.output_dir) / "README.md").read_text()


def test_metrics_that_should_fall_are_not_taken_for_rising_ones(config) -> None:
    assert config(metric_for_best_model="cross_entropy", **EVALUATED).greater_is_better is False
    assert config(metric_for_best_model="eval_divergence", **EVALUATED).greater_is_better is False
    assert config(metric_for_best_model="rouge_l", **EVALUATED).greater_is_better is True


def test_the_learning_rate_restarts_or_spans_all_stages(trainer_of, tmp_path) -> None:
    def rates(folder: str, **kwargs: Any) -> list[float]:
        trainer = trainer_of(Curriculum.baby_step(2, epochs=2, **kwargs), output_dir=str(tmp_path / folder))
        trainer.train()
        return [line["learning_rate"] for line in lines(trainer)]

    def cosine(step: int, total: int) -> float:
        return 1e-7 + (1e-2 - 1e-7) * 0.5 * (1 + math.cos(math.pi * step / total))

    first = [cosine(step, 8) for step in range(8)]
    assert rates("restart") == pytest.approx(first + [cosine(step, 12) for step in range(12)])
    assert rates("continuous", schedule="continuous") == pytest.approx([cosine(step, 20) for step in range(20)])
    for optimizer in ("fresh", "carried"):
        own = rates(optimizer, learning_rate=[1e-3, 1e-4], optimizer=optimizer)
        assert own[0] == pytest.approx(1e-3)
        assert own[8] == pytest.approx(1e-4)


@pytest.mark.parametrize("optimizer", ["fresh", "carried"])
def test_the_optimizer_starts_anew_or_is_carried(optimizer: str, trainer_of) -> None:
    steps: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
            steps.append(float(next(iter(optimizer.state_dict()["state"].values()))["step"]))

    trainer_of(Curriculum.baby_step(2, epochs=1, optimizer=optimizer), callbacks=[Watch()]).train()
    assert steps == ([1, 2, 3, 4, 1, 2, 3, 4, 5, 6] if optimizer == "fresh" else list(range(1, 11)))


def test_skew_of_a_stage_reaches_the_divergence(trainer_of) -> None:
    trainer = trainer_of(Curriculum.baby_step(2, skew=[0.1, 0.12]), divergence="skew_rkl")
    assert [divergence.skew for divergence in trainer.divergences] == [0.1, 0.12]
    with pytest.raises(ValueError, match="skew of stage 0 is set, but ForwardKL"):
        trainer_of(Curriculum.baby_step(2, skew=0.1))


def test_training_on_labels_alone_needs_no_teacher(trainer_of) -> None:
    trainer = trainer_of(Curriculum.baby_step(2, kd_ratio=0.0, epochs=2), trained_by=None)
    trainer.train()
    losses = [line["loss"] for line in lines(trainer)]
    assert losses[-1] < losses[0]
    assert "divergence" not in lines(trainer)[0]
    with pytest.raises(ValueError, match="teacher is None"):
        trainer_of(Curriculum.baby_step(2), trained_by=None)


def test_cached_and_online_training_have_the_same_losses(trainer_of, student, teacher, rows, tmp_path) -> None:
    cache = HiddenStateCache.build(tmp_path / "cache", teacher, rows, disable_tqdm=True)
    start = state_of(student)
    losses = {}
    for name, trained_by in (("online", teacher), ("cached", cache)):
        student.load_state_dict(start)
        trainer = trainer_of(
            Curriculum.baby_step(2, epochs=1),
            trained_by=trained_by,
            output_dir=str(tmp_path / name),
            eval_dataset=rows[:5],
            eval_strategy="steps",
            eval_steps=3,
        )
        trainer.train()
        losses[name] = [line["loss"] for line in lines(trainer)] + [
            line["eval_loss"] for line in lines(trainer, "eval_loss")
        ]
    assert losses["cached"] == pytest.approx(losses["online"], rel=1e-6, abs=1e-6)


def test_loader_workers_read_the_cache(trainer_of, teacher, rows, tmp_path) -> None:
    cache = HiddenStateCache.build(tmp_path / "cache", teacher, rows, disable_tqdm=True)
    trainer = trainer_of(Curriculum.baby_step(2, epochs=1), trained_by=cache, dataloader_num_workers=1)
    batch = next(iter(trainer.get_train_dataloader()))
    torch.testing.assert_close(batch["teacher_hidden"], teacher.hidden_states(batch), rtol=1e-5, atol=1e-5)


def test_reporters_see_one_run_with_global_steps(trainer_of) -> None:
    reported: list[tuple[int, int]] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                reported.append((state.global_step, logs["stage"]))

    trainer = trainer_of(Curriculum.baby_step(2, epochs=1), callbacks=[Reporter()])
    trainer.train()
    assert reported == [(step, 0 if step <= 4 else 1) for step in range(1, 11)]
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == list(range(1, 11))


def test_the_model_card_tells_loss_stages_and_figures(trainer_of) -> None:
    trainer = trainer_of(Curriculum.baby_step(2, epochs=1), divergence="skew_rkl")
    trainer.train()
    trainer.create_model_card(model_name="student")
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "SkewReverseKL(skew=0.1)" in card
    assert "0-1       22       1      6            2         1" in card
    assert "each stage starts from the last weights" in card  # there were no evaluations to choose the best by
    assert "| 1 | 10 |" in card


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands for the hub: a list of what was uploaded, with the files that `ignore_patterns` leaves of the folder."""
    from concurrent.futures import Future

    import huggingface_hub

    uploads: list[dict[str, Any]] = []

    def create_repo(self: Any, repo_id: str, **kwargs: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id.split('/')[-1]}")

    def upload_folder(self: Any, *, folder_path: str, **kwargs: Any) -> Any:
        files = [str(path.relative_to(folder_path)) for path in sorted(Path(folder_path).rglob("*")) if path.is_file()]
        kept = huggingface_hub.utils.filter_repo_objects(files, ignore_patterns=kwargs.get("ignore_patterns"))
        uploads.append(kwargs | {"files": set(kept), "folder": Path(folder_path)})
        done: Future[None] = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return uploads


def test_the_student_and_its_card_are_pushed_and_nothing_else_of_the_run(trainer_of, student, hub) -> None:
    trainer = trainer_of(Curriculum.baby_step(2, epochs=1), divergence="skew_rkl", save_total_limit=None)
    trainer.train()
    output_dir = trainer.args.output_dir
    trainer.push_to_hub()
    (upload,) = hub
    assert upload["repo_id"] == "someone/run"
    assert {"config.json", "model.safetensors", "README.md"} <= upload["files"]
    assert not [name for name in upload["files"] if "/" in name or name.endswith((".jsonl", "optimizer.pt"))]
    card = (upload["folder"] / "README.md").read_text()
    assert "# run" in card
    assert "SkewReverseKL(skew=0.1)" in card
    loaded = transformers.AutoModelForCausalLM.from_pretrained(upload["folder"])
    assert equal(state_of(loaded), state_of(student))
    assert trainer.args.output_dir == output_dir


def test_checkpoints_are_pushed_while_training_without_the_stages_around_them(trainer_of, hub) -> None:
    trainer = trainer_of(Curriculum.baby_step(2, epochs=1), push_to_hub=True, hub_model_id="someone/small")
    trainer.train()
    assert [upload["commit_message"] for upload in hub] == [f"Training in progress, step {i}" for i in (2, 4, 6, 8, 10)]
    assert {upload["repo_id"] for upload in hub} == {"someone/small"}
    assert all("model.safetensors" in upload["files"] for upload in hub)
    assert not [name for upload in hub for name in upload["files"] if "/" in name]


def test_only_what_is_needed_stays_on_disk(trainer_of) -> None:
    trainer = trainer_of(Curriculum.baby_step(2, epochs=1))
    trainer.train()
    names = [sorted(path.name for path in trainer.progress.stage_dir(i).iterdir()) for i in (0, 1)]
    assert names == [["finished.json", "student"]] * 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(trainer.progress.student_dir(1))
    assert equal(state_of(loaded), state_of(trainer.model))


def test_a_loss_that_is_not_finite_stops_with_step_stage_and_samples(trainer_of, student, rows) -> None:
    class Poison(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                with torch.no_grad():
                    model.model.norm.weight.fill_(float("nan"))

    trainer = trainer_of(Curriculum.baby_step(2, epochs=1), callbacks=[Poison()])
    with pytest.raises(
        FloatingPointError, match=r"loss is nan in stage 0 at step 3, on the samples with sample_id 1\d\d"
    ):
        trainer.train()
    assert trainer.progress.newest_checkpoint(0) == trainer.progress.stage_dir(0) / "checkpoint-2"


def test_a_batch_whose_labels_are_all_ignored_has_no_loss_and_no_gradient(trainer_of, rows) -> None:
    ignored = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    trainer = trainer_of(
        Curriculum.constant(epochs=1, num_subsets=1),
        data=[*ignored, rows[0]],
        subsets=[0] * len(ignored) + [1],  # the one with labels is in no stage
        weight_decay=0.0,
    )
    before = state_of(trainer.model)
    trainer.train()
    assert {line["loss"] for line in lines(trainer)} == {0.0}
    assert {line["grad_norm"] for line in lines(trainer)} == {0.0}
    assert equal(before, state_of(trainer.model))


def test_bad_setups_are_refused_beforehand(trainer_of, config, teacher, rows) -> None:
    with pytest.raises(ValueError, match=r"belong to the curriculum.*num_train_epochs=3"):
        config(num_train_epochs=3)
    with pytest.raises(ValueError, match="max_steps=7"):
        config(max_steps=7)
    with pytest.raises(ValueError, match="patience=1 needs evaluations"):
        trainer_of(Curriculum.baby_step(2, patience=1))
    with pytest.raises(ValueError, match="2 samples for 4 stages"):
        trainer_of(Curriculum.baby_step(4), data=rows[:2], subsets=[0, 1])
    with pytest.raises(ValueError, match="each of the 22 rows, got 3"):
        trainer_of(Curriculum.baby_step(2), subsets=[0, 1, 1])
    with pytest.raises(ValueError, match="compute_generation_metrics"):
        trainer_of(Curriculum.baby_step(2), compute_metrics=lambda p: {})
    with pytest.raises(ValueError, match="optimizer='carried' needs checkpoints"):
        trainer_of(Curriculum.baby_step(2, optimizer="carried"), save_strategy="no")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pocl.trainer.trainer.is_deepspeed_zero3_enabled", lambda: True)
        with pytest.raises(ValueError, match="ZeRO-3 hides the weights of the head"):
            trainer_of(Curriculum.baby_step(2))
    from pocl.trainer import POCLTrainer

    with pytest.raises(ValueError, match="args must be a POCLConfig"):
        POCLTrainer(teacher.model, teacher, transformers.TrainingArguments(use_cpu=True), rows)


def test_a_teacher_with_another_vocabulary_is_refused_and_a_padded_one_is_not(trainer_of, student, rows) -> None:
    def with_vocabulary(size: int) -> OnlineTeacher:
        torch.manual_seed(0)
        fields = student.config.to_dict() | {"vocab_size": size}
        return OnlineTeacher(transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)))

    with pytest.raises(ValueError, match="its vocabulary has 2000 entries and the student's 61"):
        trainer_of(Curriculum.baby_step(2), trained_by=with_vocabulary(2000))
    trainer_of(Curriculum.constant(max_steps=2, num_subsets=2), trained_by=with_vocabulary(64)).train()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT 0.21 asks by the old name
def test_adapters_train_alone_resume_and_are_saved_as_adapters(trainer_of, student, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        student, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    before = state_of(adapted)
    trainer = trainer_of(Curriculum.baby_step(2, epochs=1), model=adapted)
    trainer.train()
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    result = state_of(adapted)
    adapted.load_state_dict(before)
    trainer_of(Curriculum.baby_step(2, epochs=1), model=adapted).train()
    assert equal(state_of(adapted), result)
    assert (trainer.progress.student_dir(1) / "adapter_model.safetensors").exists()


def test_activation_checkpointing_changes_memory_only(trainer_of, student, tmp_path) -> None:
    start, results = state_of(student), []
    for name, options in (("plain", {}), ("checkpointing", {"activation_checkpointing": True})):
        student.load_state_dict(start)
        trainer_of(Curriculum.constant(max_steps=3, num_subsets=2), output_dir=str(tmp_path / name), **options).train()
        results.append(state_of(student))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)


def test_rows_of_like_length_share_batches_and_none_is_lost(trainer_of, rows) -> None:
    trainer = trainer_of(Curriculum.constant(num_subsets=2), train_sampling_strategy="group_by_length", packing=False)
    batches = list(trainer.get_train_dataloader())
    assert sorted(i for batch in batches for i in batch["sample_id"].tolist()) == [row["sample_id"] for row in rows]
    spread = [int(batch["attention_mask"].sum(1).max() - batch["attention_mask"].sum(1).min()) for batch in batches]
    assert max(spread) <= 3


def test_an_evaluation_before_training_is_logged_once_as_step_0_and_changes_no_weight(
    config: Any, rows: list[dict[str, Any]], unseen_rows: list[dict[str, Any]], teacher: Any, tmp_path: Path
) -> None:
    from pocl.trainer import POCLTrainer

    def trained(folder: str, **fields: Any) -> POCLTrainer:
        args = config(output_dir=str(tmp_path / folder), eval_strategy="epoch", save_strategy="epoch", **fields)
        curriculum = Curriculum.constant(epochs=1)
        made = POCLTrainer(llama(16, 1, seed=1), teacher, args, rows, None, curriculum, eval_dataset=unseen_rows)
        made.train()
        return made

    with_start, without = trained("with", eval_on_start=True), trained("without")
    with_start.train()  # finished: not measured again
    steps = [[line["step"] for line in t.progress.read_log() if "eval_loss" in line] for t in (with_start, without)]
    assert steps[0] == [0, *steps[1]]
    ours, theirs = (t.model.state_dict() for t in (with_start, without))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
