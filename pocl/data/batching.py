"""Token rows to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocl.data.encoder import IGNORE_INDEX
from pocl.data.token_rows import check_batch


@dataclass(frozen=True)
class Collator:
    """Stacks token rows into right-padded tensors.

    Returns `input_ids` [B, L] int64, `attention_mask` [B, L] int64, `labels` [B, L] int64 (padding is -100) and
    `sample_id` [B] int64, with L the longest row, rounded up to `pad_to_multiple_of`.

    Raises:
        ValueError: no rows, or one without tokens, with labels or a mask of another length, or padded already.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        check_batch(rows)
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            input_ids[i, :n] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            attention_mask[i, :n] = 1
            labels[i, :n] = torch.as_tensor(row["labels"], dtype=torch.int64)
        sample_id = torch.tensor([int(row["sample_id"]) for row in rows], dtype=torch.int64)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "sample_id": sample_id}
