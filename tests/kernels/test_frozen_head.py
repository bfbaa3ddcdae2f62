"""A head that is not trained (a student of LoRA's) makes no gradient of its weight, nor room for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pocl_kernels
from tests.kernels.cases import make_case
from tests.kernels.test_memory import allocations

V, H, ROWS = 501, 512, 8  # every other buffer is far smaller than [V, H]


def buffers(loss: Any, *, trained: bool, rows: int = ROWS, **call: Any) -> list[int]:
    """Bytes of the allocations, during forward and backward, that could hold a float32 gradient of the weight."""
    case = make_case(rows, V, hidden=(H, 16))
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_head.weight.clone().requires_grad_(trained)
    labels = torch.arange(rows)
    head = pocl_kernels.Head(weight)

    def run() -> None:
        if loss is pocl_kernels.fused_linear_cross_entropy:
            value = loss(hidden, head, labels, **call)
        else:
            value = loss(
                hidden, head, case.teacher_hidden, case.teacher_head, labels=labels, ce_weight=0.3, **call
            ).loss
        value.sum().backward()

    run()  # what is compiled or imported at first is not counted
    found = [size for size in allocations(run) if size >= 4 * V * H]
    assert hidden.grad is not None
    assert (weight.grad is not None) == trained
    return found


def check_frozen(loss: Any, **call: Any) -> None:
    """No such buffer with the head frozen, and at least one with it trained: else nothing would be counted."""
    assert buffers(loss, trained=False, **call) == []
    assert buffers(loss, trained=True, **call) != []


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["fkl", "jsd"])
def test_a_frozen_head_has_no_gradient_buffer(engine: Any, divergence: str, reduction: str) -> None:
    call = engine.options({"reduction": reduction})
    check_frozen(pocl_kernels.fused_linear_divergence, divergence=divergence, **call)
    check_frozen(pocl_kernels.fused_linear_cross_entropy, label_smoothing=0.1, **call)
