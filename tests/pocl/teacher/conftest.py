"""A tiny teacher, and rows of random tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pocl.teacher import OnlineTeacher


def samples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = 4 + int(torch.randint(12, (1,), generator=generator))
        ids = torch.randint(3, 1000, (length,), generator=generator).tolist()
        rows.append({"sample_id": i, "input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


@pytest.fixture
def online(make_tiny_model: Callable[..., Any]) -> OnlineTeacher:
    return OnlineTeacher(make_tiny_model(seed=1))


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return samples(30)
