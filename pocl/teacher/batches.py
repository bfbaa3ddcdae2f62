"""Rows back from batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def rows_of(batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The rows (`sample_id`, `input_ids`, `labels`, as lists) that a right-padded or packed batch was made of."""
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    if batch.get("position_ids") is not None:
        starts = (batch["position_ids"].cpu().flatten() == 0).nonzero().flatten().tolist()
        lengths = [end - start for start, end in zip(starts, [*starts[1:], ids.numel()], strict=True)]
        of_rows, of_labels = ids.flatten().split(lengths), labels.flatten().split(lengths)
    else:
        mask = batch.get("attention_mask")
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
        of_rows = [row[:n] for row, n in zip(ids, lengths, strict=True)]
        of_labels = [row[:n] for row, n in zip(labels, lengths, strict=True)]
    names = batch["sample_id"].tolist() if "sample_id" in batch else list(range(len(of_rows)))
    return [
        {"sample_id": name, "input_ids": row.tolist(), "labels": label.tolist()}
        for name, row, label in zip(names, of_rows, of_labels, strict=True)
    ]
