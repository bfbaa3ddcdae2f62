"""From rows to batches: order, padding or packing, and what the teacher is known by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pocl.data.token_rows import check_batch
from pocl.heads import IGNORE_INDEX, label_positions
from pocl.teacher import StoredTeacher
from pocl.trainer.sampler import StageRows, StageSampler


class PackedCollator:
    """Puts the rows of a batch behind one another instead of padding them: no token is wasted on padding.

    Returns `input_ids`, `position_ids` and `labels` [1, T], T the tokens of all rows, and `sample_id` [B]. Positions
    start anew with every row, which tells transformers' attention (flash-attn's varlen path, or a block mask for SDPA)
    where rows end. The first label of a row is ignored, as the row before must not predict it; so losses equal the
    padded ones.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        check_batch(rows)
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        labels = [torch.as_tensor(row["labels"], dtype=torch.int64).clone() for row in rows]
        for of_row in labels:
            of_row[0] = IGNORE_INDEX
        return {
            "input_ids": torch.cat(ids).unsqueeze(0),
            "position_ids": torch.cat([torch.arange(len(row)) for row in ids]).unsqueeze(0),
            "labels": torch.cat(labels).unsqueeze(0),
            "sample_id": torch.tensor([int(row["sample_id"]) for row in rows], dtype=torch.int64),
        }


class CollatorWithLookups:
    """Adds to a batch, in the loader's worker, what would make the training step wait.

    `label_positions` [N], see `heads.label_positions`; and what a cache has of these rows.

    Args:
        collator: takes rows, gives a batch.
        cache: where the rows are looked up; with a fallback, a batch that is not in it gets no states.
    """

    def __init__(self, collator: Callable[[Any], dict[str, Any]], cache: StoredTeacher | None) -> None:
        self.collator, self.cache = collator, cache
        self.strict = cache is None or cache.fallback is None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        batch["label_positions"] = label_positions(batch)
        if self.cache is not None and (self.strict or self.cache.contains(rows)):
            batch |= self.cache.lookups(rows)
        return batch


def make_loader(
    trainer: Any, rows: StageRows, batch_size: int, *, order: str = "sequential", **of_sampler: Any
) -> DataLoader:
    """A loader over the rows of a stage, prepared for the trainer's processes.

    Args:
        trainer: the POCLTrainer: its collator, teacher, arguments and accelerator.
        batch_size: rows of one process and forward pass.
        order, of_sampler: of `StageSampler`.
    """
    args = trainer.args
    cache = trainer.teacher if isinstance(trainer.teacher, StoredTeacher) else None
    if order == "group_by_length":
        of_sampler["lengths"] = rows.lengths()
    micro_batch = batch_size * args.world_size if args.world_size > 1 else 1
    loader: DataLoader = DataLoader(
        rows,
        batch_size,
        sampler=StageSampler(len(rows), order=order, micro_batch=micro_batch, **of_sampler),
        collate_fn=CollatorWithLookups(trainer.data_collator, cache),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return trainer.accelerator.prepare(loader)


def label_tokens(labels: Tensor) -> Tensor:
    """Number of tokens that are predicted: the first of a row never is."""
    return (labels[..., 1:] != IGNORE_INDEX).sum()
