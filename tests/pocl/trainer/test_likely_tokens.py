"""Training from a store of the teacher's likeliest tokens."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl.curriculum import Curriculum
from pocl.data import Collator
from pocl.pipeline.validation import kl_to_teacher
from pocl.teacher import HiddenStateCache, TopKCache
from pocl.trainer import POCLTrainer

from .conftest import VOCABULARY

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")


def trained(student: Any, teacher: Any, rows: Any, config: Any, folder: Path, **kwargs: Any) -> tuple[Any, list[float]]:
    model = copy.deepcopy(student)
    args = config(output_dir=str(folder), **kwargs)
    curriculum = Curriculum.baby_step(2, epochs=2, temperature=(1.0, 2.0))
    trainer = POCLTrainer(model, teacher, args, rows, [i % 2 for i in range(len(rows))], curriculum, rows[:6])
    trainer.train()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return model, [line["divergence"] for line in lines if "divergence" in line]


def test_all_tokens_train_as_hidden_states_do(
    student: Any, teacher: Any, rows: Any, config: Any, tmp_path: Path
) -> None:
    hidden = HiddenStateCache.build(tmp_path / "h", teacher, rows, disable_tqdm=True)
    likely = TopKCache.build(tmp_path / "k", teacher, rows, top_k=VOCABULARY, disable_tqdm=True)
    one, losses = trained(student, hidden, rows, config, tmp_path / "a")
    two, others = trained(student, likely, rows, config, tmp_path / "b", dataloader_num_workers=1)
    assert others == pytest.approx(losses, rel=1e-4)
    for (name, mine), theirs in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)
    assert kl_to_teacher(one, likely, rows, 4) == pytest.approx(kl_to_teacher(one, teacher, rows, 4), rel=1e-4)


def test_some_tokens_bring_the_student_to_the_teacher(
    student: Any, teacher: Any, rows: Any, config: Any, tmp_path: Path
) -> None:
    likely = TopKCache.build(tmp_path / "k", teacher, rows, top_k=8, disable_tqdm=True)
    before = kl_to_teacher(student, teacher, rows, 4)
    model, _ = trained(student, likely, rows, config, tmp_path / "a")
    assert kl_to_teacher(model, teacher, rows, 4) < 0.9 * before


def test_responses_that_are_not_stored_are_asked_for(
    student: Any, teacher: Any, rows: Any, unseen_rows: Any, tmp_path: Path
) -> None:
    TopKCache.build(tmp_path / "k", teacher, rows, top_k=8, disable_tqdm=True)
    likely = TopKCache.open(tmp_path / "k", fallback=teacher, tail="renormalise")
    batch = Collator(0)(unseen_rows)
    expected = (teacher.hidden_states(batch) @ teacher.head.weight.T).log_softmax(-1).topk(8)
    found = likely.sparse(batch)
    assert (found.tail, found.vocab_size) == ("renormalise", VOCABULARY)
    torch.testing.assert_close(found.log_probs, expected.values, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="7 of 7 samples are not in it"):
        TopKCache.open(tmp_path / "k").sparse(batch)


def test_a_run_is_of_its_number_of_tokens_and_its_tail(
    student: Any, teacher: Any, rows: Any, config: Any, tmp_path: Path
) -> None:
    TopKCache.build(tmp_path / "k", teacher, rows, top_k=8, disable_tqdm=True)
    trained(student, TopKCache.open(tmp_path / "k"), rows, config, tmp_path / "a")
    with pytest.raises(ValueError, match="teacher.tail: 'bucket' there, 'uniform' now"):
        trained(student, TopKCache.open(tmp_path / "k", tail="uniform"), rows, config, tmp_path / "a")
    with pytest.raises(ValueError, match="on_policy > 0 samples responses .* pass TopKCache.open"):
        trained(student, TopKCache.open(tmp_path / "k"), rows, config, tmp_path / "b", on_policy=0.5)
