"""DistillationLoss is the functional loss with settings that a schedule may assign."""

import pytest
import torch

import pocl


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    weight, teacher_weight = (torch.randn(40, 8, generator=generator) for _ in range(2))
    labels = torch.randint(0, 40, (2, 5), generator=generator)
    return hidden, weight, teacher_hidden, teacher_weight, labels


def test_module_equals_the_functional_loss_after_its_settings_changed(batch):
    *tensors, labels = batch
    loss = pocl.DistillationLoss("jsd")
    loss.temperature, loss.ce_weight, loss.divergence = 1.7, 0.2, pocl.SkewForwardKL(0.3)
    expected = pocl.fused_linear_divergence(
        *tensors, divergence=pocl.SkewForwardKL(0.3), temperature=1.7, ce_weight=0.2, labels=labels
    )
    for got, want in zip(loss(*tensors, labels=labels), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_unknown_divergence_is_refused_when_the_module_is_made():
    with pytest.raises(ValueError, match="fkl, rkl, skew_fkl"):
        pocl.DistillationLoss("kl")


def test_module_shows_its_settings():
    assert "SkewReverseKL(skew=0.1), temperature=2, ce_weight=0.3" in repr(
        pocl.DistillationLoss("skew_rkl", temperature=2.0, ce_weight=0.3)
    )


def test_module_takes_a_sparse_teacher_in_place_of_hidden_states_and_head(batch):
    hidden, weight, teacher_hidden, teacher_weight, labels = batch
    best = torch.log_softmax(teacher_hidden @ teacher_weight.T, -1).topk(4, -1)
    teacher = pocl.SparseTeacher(best.indices, best.values)
    got = pocl.DistillationLoss("jsd", temperature=1.7)(hidden, weight, teacher, labels=labels)
    want = pocl.fused_linear_divergence(hidden, weight, teacher, divergence="jsd", temperature=1.7, labels=labels)
    torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=0)
