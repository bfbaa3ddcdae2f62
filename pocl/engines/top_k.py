"""The likeliest tokens and their log-probabilities from hidden states, without the logits of a whole vocabulary.

Logits are made for [rows chunk, vocabulary chunk] at a time, in float32 whatever the weights are; of each chunk the
best k and the log-sum-exp stay. Beside the result, N x k x 8 bytes, this takes a few such chunks, and the float32 copy
of a chunk of 16-bit weights: 100 MB or so at any vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocl.models import project
from pocl_kernels import Head

ROWS, COLUMNS = 512, 16_384


@torch.no_grad()
def top_log_probs(
    hidden: Tensor,  # [N, H]
    head: Head,
    k: int,
    *,
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> tuple[Tensor, Tensor]:  # [N, k] int32, [N, k] float32
    """The k likeliest tokens at temperature 1, likeliest first, with their log-probabilities.

    Args:
        hidden: what enters the head.
        head: of the model.
        k: at least 1, at most the vocabulary.
        rows, columns: of one chunk of logits.

    Raises:
        ValueError: k is out of range, or the logits of a row are not finite (says which).
    """
    check_k(k, head.vocab_size)
    ids = torch.empty(len(hidden), k, dtype=torch.int32, device=hidden.device)
    log_probs = torch.empty(len(hidden), k, dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), rows):
        chunk = hidden[start : start + rows].float()
        best = chunk.new_empty(len(chunk), 0)
        best_ids = torch.empty(len(chunk), 0, dtype=torch.int64, device=hidden.device)
        total = chunk.new_full((len(chunk),), -torch.inf)
        for first in range(0, head.vocab_size, columns):
            logits = project(_part(head, first, first + columns), chunk)
            total = torch.logaddexp(total, logits.logsumexp(-1))
            values, places = logits.topk(min(k, logits.shape[1]), dim=-1)
            best, best_ids = torch.cat([best, values], 1), torch.cat([best_ids, places + first], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=-1)
            best_ids = best_ids.gather(1, order)
        if not bool(total.isfinite().all()):
            row = start + int((~total.isfinite()).nonzero()[0, 0])
            raise ValueError(
                f"hidden: the logits of row {row} are not finite; run the model in float32 or bfloat16, or check its "
                "weights"
            )
        ids[start : start + rows] = best_ids
        log_probs[start : start + rows] = (best - total[:, None]).clamp_(max=0)
    return ids, log_probs


def check_k(k: int, vocabulary: int) -> None:
    """Raise a ValueError unless 1 <= k <= vocabulary."""
    if not 1 <= k <= vocabulary:
        raise ValueError(f"top_k must be between 1 and the {vocabulary} tokens of the vocabulary, got {k}")


def _part(head: Head, first: int, stop: int) -> Head:
    bias = None if head.bias is None else head.bias[first:stop].float()
    return Head(head.weight[first:stop].float(), bias, scale=head.scale, softcap=head.softcap)
