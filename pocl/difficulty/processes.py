"""The processes of one scoring run, as `torchrun` or `accelerate launch` start them, or one process alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Processes wait for the slowest one at the end, for as long as its last shards may take.
_PATIENCE = timedelta(days=7)


@dataclass
class Processes:
    """Which one this is, of how many."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    """Processes on this machine, which share its memory."""
    _group: Any = field(default=None, repr=False)
    _owned: bool = field(default=False, repr=False)

    @classmethod
    def current(cls, *, devices: bool = False) -> Processes:
        """Reads the launcher's environment, and makes a gloo group to wait in if there is more than one process.

        Args:
            devices: take the GPU of this process' local rank, and let the group serve training on it as well.
        """
        size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        owned = not dist.is_initialized()
        use_gpu = owned and devices and torch.cuda.is_available()
        if owned:
            if use_gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout=_PATIENCE)
        group = dist.group.WORLD if owned and not use_gpu else dist.new_group(backend="gloo", timeout=_PATIENCE)
        return cls(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)), group, owned)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        # Whoever trains next in these processes makes a group for its own device.
        if self._owned:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Returns once every process has come here."""
        if self.size > 1:
            dist.barrier(group=self._group)

    def first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, or raises, on the first process, the only one to do it; on every process."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (OSError, ValueError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]
