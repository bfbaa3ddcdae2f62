"""Vocabulary-parallel heads: each process holds some rows of both heads, all of them see the same tokens.

What crosses processes, for each row: the maxima and sums of the normalisers, then ``(D, c)``, cross-entropy and
entropies; once a call the hidden states' gradient. Logits never do. Exact for every divergence, since a mixture needs
the normalisers alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


class VocabularyGroup:
    """The processes that share a vocabulary, found by the name of their process group."""

    def __init__(self, name: Any, local_vocab_size: int, device: torch.device) -> None:
        # A string; newer releases of torch give it a type of their own.
        self.group = _resolve_process_group(name)
        sizes = torch.zeros(dist.get_world_size(self.group), dtype=torch.int64, device=device)
        rank = dist.get_rank(self.group)
        sizes[rank] = local_vocab_size
        self.sum(sizes)
        self.offset = int(sizes[:rank].sum())
        """Token id of this process's first row."""
        self.total = int(sizes.sum())
        """Tokens of all processes."""
        self.largest = int(sizes.max())
        """Rows of the largest share. Chunks are sized by it: all processes must sum blocks of the same rows."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x

    def maximum(self, x: Tensor) -> Tensor:
        """Maximum over the processes, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x
