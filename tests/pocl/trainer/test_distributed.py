"""Two gloo processes reach the weights of one, under DDP and FSDP2, with and without the cache."""

import copy
import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl.curriculum import Curriculum
from pocl.teacher import HiddenStateCache

transformers = pytest.importorskip("transformers")

CURRICULUM = Curriculum.baby_step(2, epochs=2)


class Tokenizer:
    """What the trainer asks of a tokenizer."""

    pad_token_id = 0
    eos_token_id = 2

    def save_pretrained(self, folder: Any) -> None:
        pass


class Kill(transformers.TrainerCallback):
    """Kill all processes after a step of the second stage."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.max_steps == 6 and state.global_step == 4:
            torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    folder: Path, pair: tuple[Any, Any], rows: Any, *, sharded: bool, killed: bool = False, **settings: Any
) -> None:
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

    from pocl.trainer import POCLConfig, POCLTrainer

    # A forked child must not take over the state of a run that its parent made.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    fsdp: dict[str, Any] = {}
    if sharded:
        fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    args = POCLConfig(
        output_dir=str(folder),
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        disable_tqdm=True,
        **settings,
        **fsdp,
    )
    if sharded:  # accelerate shards on GPUs only; the code behind is the same for gloo on CPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    student, teacher = pair
    trainer = POCLTrainer(
        student,
        teacher,
        args,
        rows,
        subsets=[i % 2 for i in range(len(rows))],
        curriculum=CURRICULUM,
        eval_dataset=rows[:5],
        processing_class=Tokenizer(),
        callbacks=[Kill()] if killed else None,
    )
    trainer.train()
    if sharded:
        from torch.distributed.tensor import DTensor

        assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    AcceleratorState._reset_state(reset_partial_state=True)


def start_two(*args: Any, **kwargs: Any) -> list[int | None]:
    """Exit codes of two processes of one group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def child(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.stdout = sys.stderr
        train(*args, **kwargs)
        torch.distributed.destroy_process_group()

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    return [process.exitcode for process in processes]


def result(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "stage-1" / "student" / "model.safetensors")


def figures(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line[name] for line in lines for name in ("loss", "divergence", "eval_loss", "grad_norm") if name in line]


@pytest.fixture
def rows(rows: Any) -> Any:
    return rows[:21]


@pytest.mark.parametrize("engine", ["ddp", "ddp, cached", "fsdp2", "fsdp2, cached"])
def test_two_processes_reach_the_weights_of_one(
    engine: str, tmp_path: Path, student: Any, teacher: Any, rows: Any
) -> None:
    # An evaluation before the first step must not keep the student from being wrapped; FSDP2 makes none.
    settings: dict[str, Any] = {"sharded": "fsdp2" in engine, "eval_on_start": "ddp" in engine}
    # a copy, since accelerate marks the models it has prepared and does not wrap them for another group
    one_alone = settings | {"sharded": False, "per_device_train_batch_size": 8}
    train(tmp_path / "one", (copy.deepcopy(student), teacher), rows, **one_alone)
    if "cached" in engine:
        teacher = HiddenStateCache.build(tmp_path / "cache", teacher, rows, disable_tqdm=True)
    codes = start_two(
        tmp_path / "two",
        (student, teacher),
        rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **settings,
    )
    assert codes == [0, 0]
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    # gradient norms, as AdamW and clipping hide a wrong scale
    assert figures(tmp_path / "two") == pytest.approx(figures(tmp_path / "one"), rel=1e-4)


# PEFT 0.21 asks models for a property by the name it had before transformers 5.20, and warns of its own defaults.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:Setting `save_embedding")
@pytest.mark.parametrize("kind", [{"use_rslora": True}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_on_the_head_is_gathered_as_its_base_is(
    kind: dict[str, Any], tmp_path: Path, student: Any, teacher: Any, rows: Any
) -> None:
    from safetensors.torch import load_file

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", **kind)
    adapted = peft.get_peft_model(student, config)
    train(tmp_path / "one", (copy.deepcopy(adapted), teacher), rows[:8], sharded=False, per_device_train_batch_size=4)
    codes = start_two(tmp_path / "two", (adapted, teacher), rows[:8], sharded=True, per_device_train_batch_size=2)
    assert codes == [0, 0]
    one, two = (load_file(tmp_path / run / "stage-1/student/adapter_model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    assert any("lm_head.lora_B" in name and one[name].any() for name in one)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    assert figures(tmp_path / "two") == pytest.approx(figures(tmp_path / "one"), rel=1e-4)


def test_processes_sample_together_though_one_may_have_fillers_only(
    tmp_path: Path, student: Any, teacher: Any, rows: Any
) -> None:
    settings = {
        "on_policy": 0.7,
        "on_policy_max_new_tokens": 3,
        "on_policy_replay": 9,
        "per_device_train_batch_size": 2,
    }
    for engine, sharded in (("ddp", False), ("fsdp2", True)):
        assert start_two(tmp_path / engine, (student, teacher), rows, sharded=sharded, **settings) == [0, 0]
    assert figures(tmp_path / "fsdp2") == pytest.approx(figures(tmp_path / "ddp"), rel=1e-4)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_killed_processes_end_in_the_same_bits(
    sharded: bool, tmp_path: Path, student: Any, teacher: Any, rows: Any
) -> None:
    sizes = {"per_device_train_batch_size": 4, "sharded": sharded}
    assert start_two(tmp_path / "whole", (student, teacher), rows, **sizes) == [0, 0]
    assert start_two(tmp_path / "cut", (student, teacher), rows, killed=True, **sizes) == [-signal.SIGKILL] * 2
    assert start_two(tmp_path / "cut", (student, teacher), rows, **sizes) == [0, 0]
    whole, cut = result(tmp_path / "whole"), result(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2"])
def test_accelerate_reads_the_configurations_that_are_shipped(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = Path(__file__).parents[3] / "recipes" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    assert f"recipes/accelerate/{name}.yaml" in path.read_text().splitlines()[0]
