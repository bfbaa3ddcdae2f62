"""A recipe with `student.lora` in two processes: the adapters of one, killed and started again, and merged."""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pocl.models import load_causal_lm
from pocl.pipeline import run
from pocl.recipe import load_recipe

from ..conftest import pocl
from .test_lora import with_student

pytest.importorskip("peft")

IDS = torch.arange(3, 12).unsqueeze(0)
# what `accelerate launch --config_file recipes/accelerate/fsdp2.yaml` says to its processes
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def work(recipe: Path, output: Path, *, engine: str, killed: bool = False) -> None:
    """Run the recipe up to its student, as a process that a launcher started."""
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

    from pocl.trainer import POCLTrainer

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    begin, step = POCLTrainer.__init__, POCLTrainer.training_step

    def start(trainer: Any, *args: Any, **options: Any) -> None:
        if engine == "fsdp2":  # accelerate shards on GPUs only; the code behind is the same for gloo on CPUs
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(trainer, *args, **options)

    def training_step(trainer: Any, *args: Any) -> Any:
        assert trainer.is_fsdp_enabled == (engine == "fsdp2")
        if killed and trainer.stage.index == 1 and trainer.state.global_step > 3:
            torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, *args)

    POCLTrainer.__init__, POCLTrainer.training_step = start, training_step  # type: ignore[method-assign]
    os.environ |= FSDP2 if engine == "fsdp2" else {}
    words = ["--output", str(output), "--training.batch_size", "4" if engine != "alone" else "8"]
    words += ["--training.save_every", "4"]
    run(load_recipe(recipe, words), until="training", console=Console(quiet=True))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Detected an existing checkpoint:UserWarning"
)  # by steps, and at the end of an epoch
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT, of an adapted lm_head
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_adapters_of_two_processes_are_those_of_one(
    engine: str,
    recipe: Path,
    tmp_path: Path,
    tiny_model_folder: Path,
    start_processes: Callable[..., list[Any]],
) -> None:
    def start(output: str, size: int = 2, **options: Any) -> list[int]:
        call = functools.partial(work, recipe, tmp_path / output, **options)
        for process in (processes := start_processes(call, size)):
            process.join(120)
            process.kill()
        return [process.exitcode for process in processes]

    with_student(recipe, tiny_model_folder, targets="q_proj,down_proj,lm_head")
    text = recipe.read_text().replace("learning_rate: 0.05", "learning_rate: 0.002")
    recipe.write_text(text.replace("epochs: 1", "epochs: 0").replace("num_test: 6", "num_test: 0"))  # no warm-up
    assert start("one", 1, engine="alone") == [0]
    assert start("two", engine=engine, killed=True) == [-signal.SIGKILL] * 2
    assert list((tmp_path / "two" / "training" / "stage-1").glob("checkpoint-*"))
    assert start("two", engine=engine) == [0, 0]
    one, two = (load_file(tmp_path / run / "student" / "adapter_model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[name].any() for name in one)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)

    assert pocl("merge", tmp_path / "two").exit_code == 0
    apart = load_causal_lm(tmp_path / "one" / "student", trained=True)(IDS).logits
    merged = load_causal_lm(tmp_path / "two" / "student-merged")(IDS).logits
    torch.testing.assert_close(merged, apart, rtol=0, atol=1e-4)
    assert (apart - load_causal_lm(tiny_model_folder)(IDS).logits).abs().max() > 1e-2
