"""What models cannot do with the rows, or with one another, is said when the trainer is made, and of which sample."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pocl.curriculum import Curriculum
from pocl.teacher import HiddenStateCache, OnlineTeacher

from .conftest import llama

transformers = pytest.importorskip("transformers")


class Tokenizer:
    pad_token_id, eos_token_id = 0, 2

    def save_pretrained(self, folder: Any) -> None:
        pass


@pytest.fixture
def make(student: Any, teacher: Any, config: Any, rows: Any) -> Callable[..., Any]:
    from pocl.trainer import POCLTrainer

    def of(
        model: Any = student, trained_by: Any = teacher, data: Any = rows, evaluated: Any = None, **settings: Any
    ) -> Any:
        return POCLTrainer(
            model,
            trained_by,
            config(**settings),
            data,
            curriculum=Curriculum.constant(num_subsets=1, max_steps=1),
            eval_dataset=evaluated,
            processing_class=Tokenizer(),
        )

    return of


def positions(count: int) -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_positions=count, n_embd=16, n_layer=1, n_head=2)
    )


def test_rows_longer_than_a_context_name_sample_and_model(make: Any, rows: Any) -> None:
    longest = max(rows, key=lambda row: len(row["input_ids"]))
    told = rf"sample {longest['sample_id']} has 14 tokens, and the context of the {{}}, a GPT2LMHeadModel, is 12"
    with pytest.raises(ValueError, match="train_dataset: " + told.format("student")):
        make(positions(12))
    with pytest.raises(ValueError, match="train_dataset: " + told.format("teacher")):
        make(trained_by=OnlineTeacher(positions(12)))
    short = [row for row in rows if len(row["input_ids"]) <= 12]
    with pytest.raises(ValueError, match=r"eval_dataset\['far'\]: " + told.format("student")):
        make(positions(12), data=short, evaluated={"near": short, "far": rows})
    trainer = make(positions(12), data=short, evaluated=short)
    with pytest.raises(ValueError, match="eval_dataset: " + told.format("student")):
        trainer.evaluate(rows)
    make(positions(14)).train()


def test_tokens_that_a_model_lacks_are_told_wherever_they_stand(
    make: Any, rows: Any, teacher: Any, tmp_path: Any
) -> None:
    cache = HiddenStateCache.build(tmp_path / "cache", teacher, rows, disable_tqdm=True)
    wide = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**teacher.model.config.to_dict() | {"vocab_size": 70})
    )
    for column in ("input_ids", "labels"):
        unknown = copy.deepcopy(rows)
        unknown[5][column][-1] = 65
        told = "sample 105 has the token id 65, and the {}, a LlamaForCausalLM, embeds 61 tokens"
        with pytest.raises(ValueError, match=told.format("teacher")):
            make(wide, data=unknown)
        with pytest.raises(ValueError, match=told.format("student")):
            make(trained_by=cache, data=unknown)


def test_sampled_responses_must_fit_behind_the_longest_prompt(make: Any) -> None:
    sampled = {"on_policy": 1.0, "on_policy_max_new_tokens": 6}
    with pytest.raises(ValueError, match=r"prompt of sample 117 has 11 tokens.*student.*on_policy_max_new_tokens=5 at"):
        make(positions(16), **sampled)
    with pytest.raises(ValueError, match=r"max_new_tokens=6 would leave the context of the teacher"):
        make(trained_by=OnlineTeacher(positions(16)), **sampled)
    make(positions(17), **sampled).train()


def test_a_student_that_cannot_be_trained_is_refused(make: Any, student: Any, teacher: Any) -> None:
    with pytest.raises(ValueError, match=r"nothing to train.*requires_grad_\(True\)"):
        make(copy.deepcopy(student).requires_grad_(False))
    with pytest.raises(ValueError, match="model is the teacher's model too, which OnlineTeacher has frozen"):
        make(teacher.model)
    with pytest.raises(ValueError, match="float16 weights to train"):
        make(copy.deepcopy(student).half())
    with pytest.raises(ValueError, match="model must be the student itself, got str"):
        make("gpt2")
    part = copy.deepcopy(student).requires_grad_(False)
    part.lm_head.requires_grad_(True)
    make(part).train()


def test_a_teacher_must_be_one(make: Any) -> None:
    with pytest.raises(ValueError, match=r"bare LlamaForCausalLM; pass OnlineTeacher\(model\), or a HiddenStateCache"):
        make(trained_by=llama(24, 2, seed=2))
    with pytest.raises(ValueError, match="must be an OnlineTeacher, a HiddenStateCache, a TopKCache or None, got str"):
        make(trained_by="teacher")


def test_rows_of_which_nothing_is_to_be_learned_are_refused(make: Any, rows: Any) -> None:
    first_only = [{**row, "labels": row["input_ids"][:1] + [-100] * (len(row["labels"]) - 1)} for row in rows]
    with pytest.raises(ValueError, match="every label is -100, so there is nothing to learn"):
        make(data=first_only)
