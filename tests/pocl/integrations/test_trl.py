"""The curriculum in TRL's trainers and in transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pocl.curriculum import Curriculum
from pocl.integrations.trl import CurriculumCallback, in_stages, staged_order

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

CURRICULUM = Curriculum.baby_step(2, epochs=2)
SUBSETS = [0, 1] * 5
# TRL 1.16 still says gradient_checkpointing where transformers 5.20 says activation_checkpointing.
OLD_NAMES = pytest.mark.filterwarnings("ignore:.*(is_)?gradient_checkpointing.*:FutureWarning")


def test_the_order_is_the_stages_one_after_the_other_in_whole_batches() -> None:
    order = staged_order(SUBSETS, CURRICULUM, batch_size=4)
    steps = CURRICULUM.stage_steps(SUBSETS, 4)
    assert steps == (4, 6)
    assert len(order) == 40
    for epoch in (order[:8], order[8:16]):
        assert set(epoch) == {0, 2, 4, 6, 8}
    for epoch in (order[16:28], order[28:]):
        assert set(epoch) == set(range(10))
        assert sorted(epoch[:10]) == list(range(10))
    assert order[:5] != order[8:13]
    assert order == staged_order(SUBSETS, CURRICULUM, batch_size=4)
    assert order != staged_order(SUBSETS, CURRICULUM, batch_size=4, seed=1)


def test_rows_and_subsets_must_match() -> None:
    with pytest.raises(ValueError, match="each of the 3 rows, got 10"):
        in_stages([1, 2, 3], SUBSETS, CURRICULUM, 4)


@pytest.fixture
def dataset(tiny_pairs: list[dict[str, str]]) -> Any:
    pairs = [{"prompt": row["instruction"], "completion": " " + row["output"]} for row in tiny_pairs[:10]]
    return datasets.Dataset.from_list(pairs)


class Watch(transformers.TrainerCallback):
    """Notes the stage and the temperature of every step."""

    def __init__(self, trainer: Any, callback: CurriculumCallback) -> None:
        self.trainer, self.callback, self.seen = trainer, callback, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append((self.callback.stage.index, getattr(self.trainer, "temperature", None)))


def settings(path: Path, **fields: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return common | fields


def watched(trainer: Any) -> list[tuple[int, float | None]]:
    callback = CurriculumCallback(trainer, CURRICULUM, SUBSETS, batch_size=4)
    watch = Watch(trainer, callback)
    trainer.add_callback(callback)
    trainer.add_callback(watch)
    trainer.train()
    return watch.seen


@OLD_NAMES
def test_sft_trainer_follows_the_stages(
    tmp_path: Path, make_tiny_model: Any, tiny_tokenizer: Any, dataset: Any
) -> None:
    trl = pytest.importorskip("trl")
    trainer = trl.SFTTrainer(
        model=make_tiny_model(),
        args=trl.SFTConfig(**settings(tmp_path, train_sampling_strategy="sequential")),
        train_dataset=in_stages(dataset, SUBSETS, CURRICULUM, batch_size=4),
        processing_class=tiny_tokenizer,
    )
    assert watched(trainer) == [(0, None)] * 4 + [(1, None)] * 6


@OLD_NAMES
def test_gkd_trainer_follows_the_stages(
    tmp_path: Path, make_tiny_model: Any, tiny_tokenizer: Any, dataset: Any
) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    tokenizer = tiny_tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    messages = dataset.map(
        lambda row: {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        },
        remove_columns=dataset.column_names,
    )
    trainer = gkd.GKDTrainer(
        model=make_tiny_model(),
        teacher_model=make_tiny_model(seed=1),
        args=gkd.GKDConfig(**settings(tmp_path, train_sampling_strategy="sequential", lmbda=0.0)),
        train_dataset=in_stages(messages, SUBSETS, CURRICULUM, batch_size=4),
        processing_class=tokenizer,
    )
    assert watched(trainer) == [(0, 1.0)] * 4 + [(1, 2.0)] * 6


@OLD_NAMES
def test_distillation_trainer_anneals_the_temperature_of_its_loss(
    tmp_path: Path, make_tiny_model: Any, tiny_tokenizer: Any, dataset: Any
) -> None:
    trl = pytest.importorskip("trl")
    if not hasattr(trl, "DistillationTrainer"):
        pytest.skip("this TRL has no DistillationTrainer")
    trainer = trl.DistillationTrainer(
        model=make_tiny_model(),
        teacher_model=make_tiny_model(seed=1),
        args=trl.DistillationConfig(**settings(tmp_path, shuffle_dataset=False, max_completion_length=4)),
        train_dataset=in_stages(dataset.select_columns(["prompt"]), SUBSETS, CURRICULUM, batch_size=4),
        processing_class=tiny_tokenizer,
    )
    assert watched(trainer) == [(0, 1.0)] * 4 + [(1, 2.0)] * 6


def test_a_trainer_that_shuffles_or_takes_other_steps_is_refused(tmp_path: Path, make_tiny_model: Any) -> None:
    rows = [{"input_ids": torch.tensor([3, 4, 5]), "labels": torch.tensor([3, 4, 5])} for _ in range(10)]
    laid_out = [rows[i] for i in staged_order(SUBSETS, CURRICULUM, 4)]

    def trainer(data: Any, **fields: Any) -> Any:
        args = transformers.TrainingArguments(**settings(tmp_path, **fields))
        return transformers.Trainer(make_tiny_model(), args, train_dataset=data)

    with pytest.raises(ValueError, match="shuffles the stages away"):
        watched(trainer(laid_out))
    with pytest.raises(ValueError, match="plans 3 steps and the curriculum 10"):
        watched(trainer(rows, train_sampling_strategy="sequential"))
    assert [stage for stage, _ in watched(trainer(laid_out, train_sampling_strategy="sequential"))] == [0] * 4 + [1] * 6
