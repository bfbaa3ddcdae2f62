"""Responses sampled from the student: of its distribution, judged by the teacher, the same after a restart."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pocl.curriculum import Curriculum
from pocl.data import Collator
from pocl.teacher import HiddenStateCache
from pocl.teacher.batches import rows_of
from pocl.trainer.loading import PackedCollator
from pocl.trainer.on_policy import OnPolicy

transformers = pytest.importorskip("transformers")


class Tokenizer(SimpleNamespace):
    """What the trainer asks of a tokenizer."""

    pad_token_id = 0
    eos_token_id = 2

    def save_pretrained(self, folder: Any) -> None:
        pass


def sampler(**fields: Any) -> OnPolicy:
    defaults = {"max_new_tokens": 6, "temperature": 1.0, "replay_capacity": 0, "eos_token_id": 2, "pad_token_id": 0}
    settings: Any = defaults | {"collator": Collator(0), "rank": 0, "seed": 0} | fields
    return OnPolicy(settings.pop("probability", 1.0), **settings)


def test_rows_come_back_from_padded_and_packed_batches(rows) -> None:
    plain = [{name: row[name] for name in ("sample_id", "input_ids", "labels")} for row in rows]
    assert rows_of(Collator(0)(rows)) == plain
    assert rows_of(PackedCollator()(rows)) == plain


def test_responses_are_sampled_to_the_same_prompts_and_end_at_the_end_token(student, rows) -> None:
    batch = Collator(0)(rows)
    replaced = rows_of(sampler().replace(student, batch, 0, 0, 0))
    ended = 0
    for before, after in zip(rows_of(batch), replaced, strict=True):
        prompt = next(i for i, label in enumerate(before["labels"]) if label != -100)
        response = after["input_ids"][prompt:]
        assert after["input_ids"][:prompt] == before["input_ids"][:prompt]
        assert after["labels"] == [-100] * prompt + response
        assert 1 <= len(response) <= 6
        assert 2 not in response[:-1]
        ended += response[-1] == 2
    assert ended


def test_a_decision_and_a_sample_follow_from_the_place_alone(student, rows) -> None:
    batch = Collator(0)(rows[:4])
    torch.manual_seed(1)
    first = sampler().replace(student, batch, 0, 5, 0)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert torch.equal(sampler().replace(student, batch, 0, 5, 0)["input_ids"], first["input_ids"])
    assert torch.equal(torch.random.get_rng_state(), state)
    other = sampler().replace(student, batch, 0, 6, 0)
    assert other["input_ids"].shape != first["input_ids"].shape or not torch.equal(
        other["input_ids"], first["input_ids"]
    )


def test_settings_that_a_checkpoint_generates_with_do_not_change_the_distribution(student, rows) -> None:
    batch = Collator(0)(rows[:6])
    plain = sampler().replace(student, batch, 0, 0, 0)
    student.generation_config.repetition_penalty = 9.0
    student.generation_config.update(top_k=1, min_p=0.9, suppress_tokens=list(range(3, 40)))
    settings = student.generation_config
    assert torch.equal(sampler().replace(student, batch, 0, 0, 0)["input_ids"], plain["input_ids"])
    assert student.generation_config is settings


def test_the_temperature_of_sampling_is_the_one_asked_for(student, rows) -> None:
    batch = Collator(0)(rows)
    greedy = sampler(temperature=1e-4).replace(student, batch, 0, 0, 0)
    assert torch.equal(
        sampler(temperature=1e-4, seed=1).replace(student, batch, 0, 0, 0)["input_ids"], greedy["input_ids"]
    )


def test_no_token_is_left_out_of_sampling(student, rows) -> None:
    made = rows_of(sampler(temperature=1e6, max_new_tokens=1).replace(student, Collator(0)(rows[:1] * 900), 0, 0, 0))
    assert {row["input_ids"][-1] for row in made} == set(range(student.config.vocab_size))


def test_the_share_of_replaced_batches_is_the_probability(student, rows) -> None:
    half = sampler(probability=0.5, max_new_tokens=1)
    batch = Collator(0)(rows[:1])
    kept = sum(torch.equal(half.replace(student, batch, 0, step, 0)["labels"], batch["labels"]) for step in range(200))
    assert 70 < kept < 130


def test_the_buffer_is_bounded_used_again_and_kept_with_checkpoints(student, rows, tmp_path: Path) -> None:
    replaying = sampler(replay_capacity=6)
    batch = Collator(0)(rows[:4])
    seen: list[Any] = []
    again = 0
    for step in range(12):
        made = rows_of(replaying.replace(student, batch, 0, step, 0))
        again += all(row in seen for row in made)
        seen += made
    assert len(replaying.replay) == 6
    assert 2 <= again <= 10
    replaying.save(tmp_path)
    restored = sampler(replay_capacity=6)
    restored.load(tmp_path)
    assert restored.replay == replaying.replay
    restored.load(None)
    assert not restored.replay


@pytest.mark.parametrize("packing", [False, True])
def test_training_on_policy_runs_and_resumes_in_the_same_bits(
    packing: bool, student, teacher, config, rows, subsets, tmp_path: Path
) -> None:
    from pocl.trainer import POCLTrainer

    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    def run(folder: str, callback: Any = None) -> dict[str, torch.Tensor]:
        student.load_state_dict(start)
        args = config(output_dir=str(tmp_path / folder), on_policy=0.6, on_policy_max_new_tokens=5, on_policy_replay=8,
                      packing=packing)  # fmt: skip
        trainer = POCLTrainer(
            student, teacher, args, rows, [s % 2 for s in subsets], Curriculum.baby_step(2, epochs=2),
            processing_class=Tokenizer(), callbacks=[callback] if callback else None,
        )  # fmt: skip
        trainer.train()
        return {name: tensor.clone() for name, tensor in student.state_dict().items()}

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", Interrupt())
    cut = run("cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    losses = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 for line in losses if "loss" in line)


def test_a_cache_needs_a_fallback_for_what_it_cannot_hold(student, teacher, config, rows, tmp_path: Path) -> None:
    from pocl.trainer import POCLTrainer

    cache = HiddenStateCache.build(tmp_path / "cache", teacher, rows, disable_tqdm=True)
    curriculum = Curriculum.constant(num_subsets=1, max_steps=4)
    sampled = {"on_policy": 0.5, "on_policy_max_new_tokens": 40}
    with pytest.raises(ValueError, match=r"fallback=OnlineTeacher"):
        POCLTrainer(student, cache, config(**sampled), rows, curriculum=curriculum, processing_class=Tokenizer())
    with pytest.raises(ValueError, match="needs processing_class"):
        POCLTrainer(student, teacher, config(**sampled), rows, curriculum=curriculum)
    with_fallback = HiddenStateCache.open(tmp_path / "cache", fallback=teacher)
    made = sampler().replace(student, Collator(0)(rows[:3]), 0, 0, 0)
    assert torch.equal(with_fallback.hidden_states(made), teacher.hidden_states(made))
    trainer = POCLTrainer(
        student, with_fallback, config(**sampled), rows, curriculum=curriculum, processing_class=Tokenizer()
    )
    trainer.train()


def test_values_out_of_range_are_refused(config) -> None:
    with pytest.raises(ValueError, match=r"on_policy must be a share of batches in \[0, 1\], got 1.5"):
        config(on_policy=1.5)
    with pytest.raises(ValueError, match="on_policy_temperature must be > 0"):
        config(on_policy_temperature=0.0)


def test_a_response_ends_at_every_token_that_tokenizer_or_model_names(student, rows) -> None:
    batch = Collator(0)(rows)
    student.generation_config.eos_token_id = None
    whole = rows_of(sampler(eos_token_id=None, max_new_tokens=12).replace(student, batch, 0, 0, 0))
    said = [[label for label in row["labels"] if label != -100] for row in whole]
    first, second = said[0][2], said[1][3]
    student.generation_config.eos_token_id = [first]
    for given in (second, [second]):
        ended = sampler(eos_token_id=given, max_new_tokens=12).replace(student, batch, 0, 0, 0)
        for long, row in zip(said, rows_of(ended), strict=True):
            short = [label for label in row["labels"] if label != -100]
            stop = next((i + 1 for i, token in enumerate(long) if token in (first, second)), len(long))
            assert short == long[:stop]


def test_the_prompt_of_a_row_with_several_answers_is_what_stands_before_the_last(student, rows) -> None:
    ids = [5, 6, 7, 8, 9, 10]
    row = {"sample_id": 3, "input_ids": ids, "labels": [-100, 6, 7, -100, 9, 10]}
    replaced = rows_of(sampler().replace(student, Collator(0)([row]), 0, 0, 0))[0]
    assert replaced["input_ids"][:4] == ids[:4]
    assert replaced["labels"][:4] == [-100] * 4
    assert -100 not in replaced["labels"][4:]
