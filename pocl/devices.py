"""Where models compute: the accelerator that pocl can use, or the processor."""

from __future__ import annotations

import torch


def accelerator() -> torch.device | None:
    """The accelerator of this machine; None where the processor does the work.

    Apple's GPUs (MPS) are left idle: they have no float64, in which losses and their normalisers are summed.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is not None and found.type == "mps" else found
