"""How many rows fit: from what the cache of a row takes and what the machine has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from pocl.models import view_of

# Rows beyond which a step takes as much longer as it has rows. Of a 50 M model, an AVX2 core takes 3.3 ms a token at 16
# rows, 2.4 at 32, 2.2 at 64 and 1.9 at 128; a GPU still gains at several hundred.
MAX_ROWS = {"cpu": 64, "cuda": 512}
# Of the free memory, what the cache may take: the rest is for activations, logits and other programs.
_SHARE = 0.5


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text("utf-8").strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text("utf-8"))))
    return free


def cache_bytes_per_token(model: nn.Module) -> int:
    """Keys and values of one token in all layers; for models without attention heads, as if the heads were full."""
    view = view_of(model)
    config: Any = view.config
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * shared * size * view.dtype.itemsize


def rows_that_fit(model: nn.Module, tokens_per_row: int, *, processes: int = 1) -> int:
    """Rows of the slot engine: what half of the free memory holds, at most `MAX_ROWS` of the device, at least one.

    Args:
        tokens_per_row: longest prompt and longest answer together.
        processes: how many share a machine's memory; of a GPU each has its own.
    """
    view = view_of(model)
    device = view.device
    # float32 logits and their copies while a token is chosen, beside the cache
    row = tokens_per_row * cache_bytes_per_token(model) + 3 * 4 * view.vocabulary
    share = _SHARE / (processes if device.type == "cpu" else 1)
    return max(1, min(MAX_ROWS.get(device.type, MAX_ROWS["cuda"]), int(available_bytes(device) * share) // row))
