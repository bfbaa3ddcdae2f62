"""A mixture of experts that asks for its balance loss gets it, as its own forward adds it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pocl import heads
from pocl.models import project, view_of

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.25,
    "initializer_range": 0.3,
}


def experts(family: str = "qwen3_moe", **fields: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **SIZES | fields))


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "olmoe"])
def test_loss_and_gradients_are_those_of_the_models_own_forward(family: str) -> None:
    model = experts(family).train()
    heads.verify_head(model, trained=True)
    view = view_of(model)
    ids = torch.randint(3, 61, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    own = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    hidden, balance = view.states_and_router_loss(ids, mask)
    logits = project(view.head(), hidden).flatten(0, 1)
    cross_entropy = torch.nn.functional.cross_entropy(logits, heads.shifted_labels(labels).flatten())
    ours = cross_entropy + view.router_coefficient * balance
    assert (ours - cross_entropy).item() > 0.1
    torch.testing.assert_close(ours, own)
    expected = gradients(model, own)
    found = gradients(model, ours)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_it_is_nothing_where_the_config_does_not_ask() -> None:
    assert view_of(experts(output_router_logits=False)).router_coefficient == 0
    assert view_of(experts(router_aux_loss_coef=0.0)).router_coefficient == 0


def test_the_head_is_whole_again_after_its_forward_was_left_out() -> None:
    model = experts().eval()
    ids = torch.randint(3, 61, (1, 5))
    before = model(input_ids=ids).logits
    view_of(model).states_and_router_loss(ids)
    assert torch.equal(model(input_ids=ids).logits, before)


class Tokenizer:
    pad_token_id = 0
    eos_token_id = 2

    def save_pretrained(self, folder: Any) -> None:
        pass


def test_parts_of_a_batch_add_the_mean_of_their_balance_losses(
    tmp_path: Any, make_tiny_model: Callable[..., Any]
) -> None:
    from pocl.curriculum import Curriculum
    from pocl.teacher import OnlineTeacher
    from pocl.trainer import POCLConfig, POCLTrainer

    generator = torch.Generator().manual_seed(0)
    rows = []
    for index, (prompt, length) in enumerate([(2, 9), (3, 5), (2, 7), (4, 12)]):
        ids = torch.randint(3, 61, (length,), generator=generator).tolist()
        rows.append({"sample_id": index, "input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    teacher = OnlineTeacher(make_tiny_model(vocab_size=61))
    student = experts()

    def step(model: Any, name: str) -> dict[str, float]:
        args = POCLConfig(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_grad_norm=0.0,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            packing=False,
        )
        curriculum = Curriculum.constant(num_subsets=1, epochs=1)
        trainer = POCLTrainer(model, teacher, args, rows, curriculum=curriculum, processing_class=Tokenizer())
        trainer.train()
        return next(line for line in trainer.state.log_history if "divergence" in line)

    silent = copy.deepcopy(student)
    silent.config.output_router_logits = False
    expected, total = 0.0, 0
    for row in rows:
        tokens = sum(label != -100 for label in row["labels"])
        with torch.no_grad():
            balance = view_of(student).states_and_router_loss(torch.tensor([row["input_ids"]]))[1]
        expected, total = expected + 0.25 * tokens * balance.item(), total + tokens
    found, without = step(student, "with"), step(silent, "without")
    assert found["router_loss"] == pytest.approx(expected / total, rel=1e-4)
    assert found["divergence"] == pytest.approx(without["divergence"], rel=1e-5)
    assert found["loss"] - without["loss"] == pytest.approx(found["router_loss"], rel=1e-3)
    assert "router_loss" not in without
