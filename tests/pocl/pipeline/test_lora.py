"""A recipe whose student learns by adapters: every step of it, killed and started again, merged or not, and refused."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from pocl.models import adapter_base, load_causal_lm
from pocl.pipeline import run
from pocl.pipeline.disk import disk_needs
from pocl.recipe import RecipeError, load_recipe

from ..conftest import pocl

pytest.importorskip("peft")

IDS = torch.arange(3, 12).unsqueeze(0)
ADAPTER = "adapter_model.safetensors"


def with_student(recipe: Path, folder: Path, **lora: Any) -> Path:
    values = yaml.safe_load(recipe.read_text())
    values["student"] = {"model": str(folder), "lora": {"r": 4, **lora}}
    values["curriculum"] |= {"epochs": 2, "learning_rate": 0.05}
    values["training"] |= {"metric": "loss", "activation_checkpointing": True}
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def run_to(step: str, recipe: Path, *words: str) -> Path:
    return run(load_recipe(recipe, words), until=step, console=Console(quiet=True))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTER)


def dies_in_the_second_stage(recipe: Path, output: Path) -> None:
    from pocl.trainer import POCLTrainer

    step = POCLTrainer.training_step

    def training_step(trainer: Any, *args: Any) -> Any:
        if trainer.stage.index == 1 and trainer.state.global_step > 5:  # behind the checkpoint of an epoch
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, *args)

    POCLTrainer.training_step = training_step  # type: ignore[method-assign]
    run_to("training", recipe, "--output", str(output))


def test_all_steps_work_on_adapters_and_a_kill_changes_nothing(
    recipe: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    with_student(recipe, tiny_model_folder, targets="all-linear,lm_head")
    folder = run_to("evaluation", recipe)
    before, after = folder / "warmup" / "student", folder / "student"
    for student in (before, after):
        assert adapter_base(student) == str(tiny_model_folder)
        assert not (student / "model.safetensors").exists()
    assert not any(torch.equal(weights(before)[name], tensor) for name, tensor in weights(after).items())
    scores = {
        key: json.loads((folder / "evaluation" / f"student-{key}.json").read_text()) for key in ("initial", "final")
    }
    assert scores["final"]["kl_to_teacher"] < scores["initial"]["kl_to_teacher"]
    assert "LoRA adapters of rank 4, alpha 8 on" in (after / "README.md").read_text()

    killed = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=dies_in_the_second_stage, args=(recipe, killed))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list((killed / "training" / "stage-1").glob("checkpoint-*"))
    assert not (killed / "student").exists()
    run_to("training", recipe, "--output", str(killed))
    theirs = weights(killed / "student")
    assert weights(after).keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(after).items())

    assert pocl("evaluate", folder, "--models", "student", "--name", "again").exit_code == 0
    again = json.loads((folder / "evaluation" / "again" / "student-final.json").read_text())
    assert again["kl_to_teacher"] == scores["final"]["kl_to_teacher"]


def test_a_merged_student_computes_what_its_adapter_does(
    recipe: Path, tmp_path: Path, make_tiny_folder: Callable[..., Path]
) -> None:
    base = make_tiny_folder(tie_word_embeddings=True)
    with_student(recipe, base, targets=["q_proj", "lm_head"])
    words = ["--warmup.epochs", "0", "--num_test", "0", "--curriculum.kind", "constant", "--curriculum.epochs", "1",
             "--curriculum.temperature", "1", "--curriculum.kd_ratio", "1"]  # fmt: skip
    run_to("training", recipe, *words)
    run_to("training", recipe, *words, "--student.lora.merge", "true", "--output", str(tmp_path / "merging"))
    result = pocl("merge", tmp_path / "run")
    assert result.exit_code == 0, result.output
    apart = load_causal_lm(tmp_path / "run" / "student", trained=True)(IDS).logits
    assert (apart - load_causal_lm(base)(IDS).logits).abs().max() > 1e-3
    for folder in (tmp_path / "merging" / "student", tmp_path / "run" / "student-merged"):
        assert not (folder / "adapter_config.json").exists()
        torch.testing.assert_close(load_causal_lm(folder)(IDS).logits, apart, rtol=1e-5, atol=1e-5)
        ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert ends == json.loads((tmp_path / "run" / "student" / "generation_config.json").read_text())["eos_token_id"]
    assert "is there already" in pocl("merge", tmp_path / "run").stderr


def test_another_way_to_save_does_not_measure_or_warm_up_again(recipe: Path, tiny_model_folder: Path) -> None:
    from pocl.pipeline.engine import fingerprints
    from pocl.pipeline.steps import build_steps

    with_student(recipe, tiny_model_folder)

    def marks(*words: str) -> dict[str, str]:
        return fingerprints(build_steps(load_recipe(recipe, words), content=lambda *_: ""))

    before, merged, other = marks(), marks("--student.lora.merge", "true"), marks("--student.lora.r", "8")
    assert {name for name in before if before[name] != merged[name]} == {"training", "evaluation", "report"}
    assert {name for name in before if before[name] == other[name]} == {"models", "data", "teacher-cache"}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 0}, "student.lora.r: must be greater than 0, got 0"),
        ({"r": -3}, "student.lora.r: must be greater than 0, got -3"),
        ({"dropout": 1}, "student.lora.dropout: must be less than 1"),
        ({"alpha": 0}, "student.lora.alpha: must be greater than 0"),
        ({"targets": []}, "student.lora.targets"),
        ({"rank": 3}, r"student.lora.rank: unknown key; did you mean student.lora.r\?"),
        ({"target_modules": "q_proj"}, r"did you mean student.lora.targets\?"),
    ],
)
def test_bad_values_are_refused_when_the_recipe_is_read(
    recipe: Path, tiny_model_folder: Path, lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(with_student(recipe, tiny_model_folder, **lora))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora.targets", "query"], "student.lora.targets: .* no layer called 'query'.*it has down_proj"),
        (["--lora.targets", "lm_head", "--lora.dropout", "0.1"], "student.lora.dropout = 0.1 with lm_head"),
        (["--student", "ADAPTER"], "is an adapter already"),
        (["--student.cut", "2"], "one made by `cut` has to learn"),
        (["--student.drop", "1"], "one made by `drop` has to learn"),
        (["--student.lora", "8"], "student.lora: is a section, got 8; write .*r, alpha, dropout, targets"),
        (["--student.lora", "true"], "student.lora: takes no true"),
        (["NO PEFT"], r"student.lora needs the package peft.*run `pip install 'pocl\[lora\]'`"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_cannot_be_adapted_is_said_before_anything_is_done(
    recipe: Path, tiny_model_folder: Path, tmp_path: Path, words: list[str], message: str, dry: bool, monkeypatch: Any
) -> None:
    import re

    with_student(recipe, tiny_model_folder)
    if words == ["NO PEFT"]:
        words = []
        monkeypatch.setitem(sys.modules, "peft", None)
    if "ADAPTER" in words:
        from pocl.models.lora import add_lora

        add_lora(load_causal_lm(tiny_model_folder), r=2, alpha=4.0).save_pretrained(tmp_path / "adapter")
        words = ["--student.model", str(tmp_path / "adapter")]
    result = pocl("distill", recipe, *words, *(["--dry-run"] if dry else []))
    assert result.exit_code == 2
    assert re.search(message, " ".join((result.output + result.stderr).split())), result.output
    assert not (tmp_path / "run" / "data").exists()


def test_the_disk_holds_adapters_and_not_three_times_the_student(recipe: Path, tiny_model_folder: Path) -> None:
    with_student(recipe, tiny_model_folder)
    steps = ["models", "warm-up", "training"]
    apart, merged, whole = (
        disk_needs(load_recipe(recipe, words), steps)
        for words in ([], ["--lora.merge", "true"], ["--student.lora", "null"])
    )
    assert None not in (apart, merged, whole)
    numbers = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 2 * (32 + 64) + (64 + 32))  # layers, rank, shapes
    assert apart == {"students": 2 * 4 * numbers, "checkpoints": 6 * 4 * numbers}
    assert merged["students"] - apart["students"] == whole["students"] // 2
