"""What the launcher of a run hands on, read without loading a trainer."""

from __future__ import annotations

import os

_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_launcher_precision(chosen: str) -> None:
    """Refuses a launcher that would train in another precision than `bf16`, `fp16` or `no` asks for.

    `accelerate launch` hands its choice on in the environment, where it would win in silence.

    Raises:
        ValueError: names both, and what to change.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", chosen):
        raise ValueError(
            f"accelerate was launched with mixed_precision {launched}, and the run asks for {_PRECISIONS[chosen]}: "
            "leave mixed_precision out of the launcher's configuration (or launch with --mixed_precision no), and set "
            "training.precision in the recipe, or bf16 and fp16 of POCLConfig"
        )
