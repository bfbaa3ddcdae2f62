"""A student of LoRA's, whose head is not trained, makes no gradient of the head on the way through the trainer."""

from typing import Any

import pytest
import torch

import pocl
from pocl import heads
from pocl.curriculum import Curriculum
from pocl.teacher import OnlineTeacher
from pocl.trainer import POCLTrainer
from tests.kernels.test_memory import allocations
from tests.pocl.trainer.conftest import random_rows

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    # PEFT 0.21 asks models for a property by the name it had before transformers 5.20
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

V, H = 1601, 64  # more than four sequences have tokens, so that no other buffer is as large as [V, H]


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def student(targets: list[str]) -> Any:
    return peft.get_peft_model(llama(1), peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))


def large(run: Any) -> int:
    return sum(size >= 4 * V * H for size in allocations(run))


def test_of_a_training_run(config: Any) -> None:
    teacher = OnlineTeacher(llama(2))
    rows = random_rows(8)
    for targets, frozen in ((["q_proj"], True), (["q_proj", "lm_head"], False)):
        args = config(output_dir=str(config().output_dir) + "-".join(targets))
        trainer = POCLTrainer(
            student(targets), teacher, args, rows, subsets=[0] * 8, curriculum=Curriculum.constant(epochs=1)
        )
        assert (large(trainer.train) == 0) == frozen


def test_of_a_loop_of_ones_own() -> None:
    teacher, model, ids = llama(2).requires_grad_(False), student(["q_proj"]), torch.randint(3, V, (2, 9))
    loss_fn = pocl.DistillationLoss("skew_rkl")

    def step() -> None:
        states = heads.hidden_states(model, ids)
        with torch.no_grad():
            of_teacher = heads.hidden_states(teacher, ids)
        labels = heads.shifted_labels(ids)
        loss_fn(states, heads.head_of(model), of_teacher, heads.head_of(teacher), labels=labels).loss.backward()

    step()
    assert large(step) == 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
