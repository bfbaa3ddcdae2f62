"""The trainer on a tiny pair: what a stage trains on, what the loss is, what is logged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pocl import heads
from pocl.curriculum import Curriculum, Stage
from pocl.data import Collator

transformers = pytest.importorskip("transformers")


def make(model: Any, teacher: Any, args: Any, rows: Any, **kwargs: Any) -> Any:
    from pocl.trainer import POCLTrainer

    return POCLTrainer(model, teacher, args, rows, **kwargs)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def log_of(args: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(args.output_dir) / "log.jsonl").read_text().splitlines()]


def test_a_curriculum_runs_to_its_end_and_lowers_the_divergence(student, teacher, config, rows, subsets) -> None:
    args = config()
    curriculum = Curriculum.baby_step(3, epochs=3)
    trainer = make(student, teacher, args, rows, subsets=subsets, curriculum=curriculum)
    output = trainer.train()
    assert output.global_step == sum(curriculum.stage_steps(subsets, 4))
    lines = [line for line in log_of(args) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, output.global_step + 1))
    assert [line["stage"] for line in lines] == [0] * 6 + [1] * 12 + [2] * 18
    assert {round(line["temperature"], 6) for line in lines if line["stage"] == 1} == {1.5}
    assert lines[-1]["divergence"] < 0.7 * lines[0]["divergence"]
    assert {"kd_ratio", "learning_rate", "cross_entropy", "student_entropy", "tokens_per_second", "epoch"} <= set(
        lines[0]
    )
    assert 0.0 <= lines[0]["mean_token_accuracy"] <= 1.0
    assert lines[0]["teacher_entropy"] > 0.0


def test_the_first_logged_loss_is_the_formula_on_the_models_own_logits(student, teacher, config, rows, subsets) -> None:
    stage = Stage(0, (0, 1, 2), epochs=1, temperature=2.0, kd_ratio=0.7)
    args = config(per_device_train_batch_size=22)
    batch = Collator(0)(rows)
    labels = heads.shifted_labels(batch["labels"])
    chosen = labels != -100
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        z_s, z_t = student(**inputs).logits[chosen].double(), teacher.model(**inputs).logits[chosen].double()
    log_q, log_p = F.log_softmax(z_s / 2, -1), F.log_softmax(z_t / 2, -1)
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    expected = 0.3 * F.cross_entropy(z_s, labels[chosen]) + 0.7 * 4 * divergence
    make(student, teacher, args, rows, subsets=subsets, curriculum=Curriculum((stage,))).train()
    first = log_of(args)[0]
    assert first["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert first["divergence"] == pytest.approx(divergence.item(), rel=1e-5)
    assert first["teacher_entropy"] == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-5)
    right = (z_s.argmax(-1) == labels[chosen]).double().mean().item()
    assert first["mean_token_accuracy"] == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize("scaled", [True, False])
def test_every_stage_has_its_own_temperature_ratio_and_skew(
    scaled: bool, student, teacher, config, rows, subsets
) -> None:
    stages = (
        Stage(0, (0, 1, 2), 1, temperature=1.0, kd_ratio=0.7, skew=0.1),
        Stage(1, (0, 1, 2), 1, temperature=3.0, kd_ratio=0.2, skew=0.5),
    )
    args = config(
        per_device_train_batch_size=22, optim="sgd", learning_rate=1e-30, lr_scheduler_kwargs={"min_lr": 0.0},
        scale_by_temperature=scaled,
    )  # fmt: skip
    batch = Collator(0)(rows)
    labels = heads.shifted_labels(batch["labels"])
    chosen = labels != -100
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        z_s, z_t = student(**inputs).logits[chosen].double(), teacher.model(**inputs).logits[chosen].double()
    expected = []
    for stage in stages:
        p, q = (z_t / stage.temperature).softmax(-1), (z_s / stage.temperature).softmax(-1)
        mixture = stage.skew * p + (1 - stage.skew) * q
        divergence = (p * (p / mixture).log()).sum(-1).mean()
        factor = stage.temperature**2 if scaled else 1.0
        cross_entropy = F.cross_entropy(z_s, labels[chosen])
        expected.append((stage.kd_ratio * factor * divergence + (1 - stage.kd_ratio) * cross_entropy).item())
    make(student, teacher, args, rows, subsets=subsets, curriculum=Curriculum(stages), divergence="skew_fkl").train()
    assert [line["loss"] for line in log_of(args) if "loss" in line] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", ["accumulation", "padding", "packing"])
def test_weights_do_not_depend_on(how: str, student, teacher, config, rows, subsets, tmp_path) -> None:
    def result(folder: str, per_device: int, accumulation: int, packing: bool = False, collator: Any = None) -> Any:
        model = transformers.LlamaForCausalLM(student.config)
        model.load_state_dict(student.state_dict())
        args = config(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            packing=packing,
            optim="sgd",  # AdamW and clipping would hide a wrong scale
            learning_rate=3e-2,
            max_grad_norm=0.0,
        )
        curriculum = Curriculum.baby_step(2, epochs=1)
        make(
            model, teacher, args, rows, subsets=[s % 2 for s in subsets], curriculum=curriculum, data_collator=collator
        ).train()
        return weights(model)

    base = result("a", 6, 1)
    other = {
        "accumulation": lambda: result("b", 2, 3),
        "padding": lambda: result("b", 6, 1, collator=Collator(0, pad_to_multiple_of=16)),
        "packing": lambda: result("b", 3, 2, packing=True),
    }[how]()
    assert not torch.equal(base, weights(student))
    torch.testing.assert_close(base, other, rtol=1e-4, atol=1e-5)


def test_packed_rows_without_a_prompt_do_not_predict_one_another(student, teacher, config, rows) -> None:
    whole = [{**row, "labels": list(row["input_ids"])} for row in rows]
    curriculum = Curriculum.constant(num_subsets=1)
    padded, packed = (
        make(student, teacher, config(packing=packing), whole, curriculum=curriculum).evaluate(whole)
        for packing in (False, True)
    )
    for name in ("eval_loss", "eval_cross_entropy", "eval_divergence"):
        assert packed[name] == pytest.approx(padded[name], rel=1e-5)


def test_a_model_that_mixes_packed_rows_is_padded_or_refused(teacher, config, rows) -> None:
    from pocl.trainer.loading import PackedCollator

    fields = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "pad_token_id": 0}
    recurrent = transformers.MambaForCausalLM(transformers.MambaConfig(**fields))
    curriculum = Curriculum.constant(num_subsets=1)
    trainer = make(recurrent, teacher, config(), rows, curriculum=curriculum)
    assert isinstance(trainer.data_collator, Collator)
    with pytest.raises(ValueError, match="packing=True, but MambaForCausalLM mixes the rows"):
        make(recurrent, teacher, config(packing=True), rows, curriculum=curriculum)
    again = teacher.model.requires_grad_(True)
    assert isinstance(make(again, teacher, config(), rows, curriculum=curriculum).data_collator, PackedCollator)


def test_a_student_whose_logits_are_not_its_heads_is_refused(student, teacher, config, rows, monkeypatch) -> None:
    forward = type(student).forward

    def shifted(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2  # as a scale that we do not know would
        return output

    monkeypatch.setattr(type(student), "forward", shifted)
    with pytest.raises(ValueError, match="logits"):
        make(student, teacher, config(), rows, curriculum=Curriculum.constant(num_subsets=1))


def test_stages_train_on_their_subsets_once_an_epoch(student, teacher, config, rows, subsets) -> None:
    trainer = make(student, teacher, config(), rows, subsets=subsets, curriculum=Curriculum.baby_step(3, epochs=1))
    for stage in trainer.curriculum.stages:
        trainer.stage = stage
        seen = torch.cat([batch["sample_id"] for batch in trainer.get_train_dataloader()]).tolist()
        expected = [row["sample_id"] for row, subset in zip(rows, subsets, strict=True) if subset <= stage.index]
        assert sorted(seen) == expected
        assert seen != expected


def test_every_epoch_of_every_stage_has_an_order_of_its_own_that_the_seed_fixes(
    student, teacher, config, rows, tmp_path
) -> None:
    def orders(folder: str, **fields: Any) -> list[tuple[int, ...]]:
        seen: list[int] = []

        def collate(chosen: Any) -> Any:
            seen.extend(row["sample_id"] for row in chosen)
            return Collator(0)(chosen)

        stages = (Stage(0, (0,), epochs=2), Stage(1, (0,), max_steps=12))
        args = config(output_dir=str(tmp_path / folder), save_strategy="no", **fields)
        make(student, teacher, args, rows, curriculum=Curriculum(stages), data_collator=collate).train()
        return [tuple(seen[start : start + len(rows)]) for start in range(0, len(seen), len(rows))]

    first = orders("a")
    assert len(set(first)) == len(first) == 4
    assert {tuple(sorted(order)) for order in first} == {tuple(row["sample_id"] for row in rows)}
    assert orders("b") == first
    assert not set(orders("c", seed=7)) & set(first)


def test_a_second_call_trains_nothing_and_restores_the_result(student, teacher, config, rows, subsets) -> None:
    args, curriculum = config(), Curriculum.baby_step(2, epochs=1)
    pairs = [s % 2 for s in subsets]
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    make(student, teacher, args, rows, subsets=pairs, curriculum=curriculum).train()
    result, log = weights(student), log_of(args)
    student.load_state_dict(start)
    again = make(student, teacher, args, rows, subsets=pairs, curriculum=curriculum)
    assert again.train().global_step == sum(curriculum.stage_steps(pairs, 4))
    assert torch.equal(weights(student), result)
    assert log_of(args) == log


def test_evaluation_is_token_weighted_over_the_whole_set(student, teacher, config, rows, subsets) -> None:
    trainer = make(student, teacher, config(), rows, subsets=subsets, curriculum=Curriculum.constant(num_subsets=3))
    metrics = trainer.evaluate(rows)
    batch = Collator(0)(rows)
    labels = heads.shifted_labels(batch["labels"])
    with torch.no_grad():
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert metrics["eval_cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_model_generates_and_saves_as_ever_after_training(
    student, teacher, config, rows, subsets, tmp_path
) -> None:
    trainer = make(
        student, teacher, config(), rows, subsets=subsets, curriculum=Curriculum.constant(epochs=1, num_subsets=3)
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    prompt = torch.tensor([[5, 6, 7]])
    student.eval()
    generated = student.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, loaded.generate(prompt, max_new_tokens=4, do_sample=False))
    assert student(prompt, labels=prompt).loss is not None
