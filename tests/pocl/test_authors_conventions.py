"""The paper's recipes minimise what the code of the paper's authors minimises, with all its conventions.

Their losses, written out here in float64 over full logits, have quirks of their own: T^2 on some divergences only, no
`sum p log p` in the forward KLs, 0.9 of the JSD on the student's side. Ours come from the shipped recipes and take the
way they take in training.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pocl import heads
from pocl.pipeline import plan, run
from pocl.pipeline.curricula import curriculum_of
from pocl.pipeline.training import divergence_of, scales_by_temperature
from pocl.recipe import Recipe, load_recipe
from pocl.trainer.checks import divergence_of as divergences_of_stages
from pocl.trainer.fused import DistillationLossCall
from pocl_kernels import Head

B, L, V, H_S, H_T = 3, 7, 50, 6, 9

Rows = Callable[[Tensor, Tensor, float], Tensor]  # log q, log p, skew -> [N]


def forward_kl(l: Tensor, r: Tensor, _: float) -> Tensor:
    return -(r.exp() * l).sum(-1)


def reverse_kl(l: Tensor, r: Tensor, _: float) -> Tensor:
    return -(l.exp() * r - l.exp() * l).sum(-1)


def jensen_shannon(l: Tensor, r: Tensor, _: float) -> Tensor:
    lam, q, p = 0.9, l.exp(), r.exp()
    log_m = ((1 - lam) * p + lam * q).log()
    return -lam * (q * log_m - q * l).sum(-1) - (1 - lam) * (p * log_m - p * r).sum(-1)


def total_variation(l: Tensor, r: Tensor, _: float) -> Tensor:
    return 0.5 * (r.exp() - l.exp()).abs().sum(-1)


def skew_forward_kl(l: Tensor, r: Tensor, skew: float) -> Tensor:
    return -(r.exp() * (skew * r.exp() + (1 - skew) * l.exp()).log()).sum(-1)


def skew_reverse_kl(l: Tensor, r: Tensor, skew: float) -> Tensor:
    log_m = ((1 - skew) * r.exp() + skew * l.exp()).log()
    return -(l.exp() * log_m - l.exp() * l).sum(-1)


# (rows, whether T^2 is applied, whether sum p log p is left out)
AUTHORS: dict[str, tuple[Rows, bool, bool]] = {
    "fkl": (forward_kl, True, True),
    "rkl": (reverse_kl, False, False),
    "jsd": (jensen_shannon, True, False),
    "tvd": (total_variation, False, False),
    "skew_fkl": (skew_forward_kl, False, True),
    "skew_rkl": (skew_reverse_kl, True, False),
}


# Of the four stages, in the authors' scripts: (temperature, kd_ratio, skew).
SCRIPTS = {
    "paper-gpt2": [(1.0, 0.7, 0.1), (1.33, 0.8, 0.1), (1.67, 0.9, 0.1), (2.0, 1.0, 0.12)],
    "paper-opt": [(1.0, 0.7, 0.1), (1.33, 0.8, 0.1), (1.67, 0.9, 0.1), (2.0, 1.0, 0.1)],
}


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Hidden states and heads of both models in float64, and labels of which a part is ignored."""
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    labels = torch.randint(V, (B, L), generator=made)
    labels[:, :3], labels[1, 5:] = -100, -100
    return {
        "labels": labels,
        "hidden": normal(B, L, H_S).requires_grad_(),
        "weight": normal(V, H_S).requires_grad_(),
        "teacher_hidden": normal(B, L, H_T),
        "teacher_weight": normal(V, H_T),
    }


def ours(batch: dict[str, Tensor], recipe: Recipe, index: int) -> Tensor:
    """The loss of one batch in a stage, as the trainer computes it."""
    stage = curriculum_of(recipe).stages[index]
    positions = heads.label_positions({"labels": batch["labels"]})
    call = DistillationLossCall(
        labels=batch["labels"],
        positions=positions,
        teacher=heads.at_positions(batch["teacher_hidden"], positions),
        teacher_head=Head(batch["teacher_weight"]),
        divergence=divergences_of_stages(curriculum_of(recipe), divergence_of(recipe))[index],
        temperature=stage.temperature,
        scale_by_temperature=scales_by_temperature(recipe, recipe.loss.divergence),
        kd_ratio=stage.kd_ratio,
        normalizer=torch.tensor(len(positions)),
    )
    return call(batch["hidden"], Head(batch["weight"]))["loss"]


def theirs(batch: dict[str, Tensor], name: str, T: float, kd_ratio: float, skew: float) -> tuple[Tensor, Tensor]:
    """The authors' loss of one batch, and the constant that they leave out of it."""
    rows, squared, leaves_out = AUTHORS[name]
    labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]  # position i predicts token i + 1
    mask = (labels != -100).double()
    z = batch["hidden"] @ batch["weight"].T
    l = torch.log_softmax(z / T, -1)
    r = torch.log_softmax(batch["teacher_hidden"] @ batch["teacher_weight"].T / T, -1)

    def mean(values: Tensor) -> Tensor:
        return (values * mask).sum() / mask.sum()

    weight = kd_ratio * (T**2 if squared else 1.0)
    cross_entropy = torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten(), ignore_index=-100)
    left_out = weight * mean((r.exp() * r).sum(-1)) if leaves_out else torch.zeros(())
    distillation = weight * mean(rows(l, r, skew))
    return (1 - kd_ratio) * cross_entropy + distillation, left_out


@pytest.mark.parametrize("index", range(4), ids=lambda index: f"stage {index}")
@pytest.mark.parametrize("name", AUTHORS)
@pytest.mark.parametrize("shipped", ["paper-gpt2", "paper-opt"])
def test_loss_and_gradients_are_the_authors(shipped: str, name: str, index: int, batch: dict[str, Tensor]) -> None:
    recipe = load_recipe(shipped, ["--loss.divergence", name])
    loss, (expected, left_out) = ours(batch, recipe, index), theirs(batch, name, *SCRIPTS[shipped][index])
    assert loss.item() == pytest.approx((expected + left_out).item(), rel=1e-13)
    inputs = [batch["hidden"], batch["weight"]]
    gradients = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True)
    for mine, other in gradients:
        assert torch.linalg.norm(mine - other) <= 1e-13 * torch.linalg.norm(other)


@pytest.mark.parametrize("name", AUTHORS)
def test_the_constant_that_the_forward_kls_leave_out_is_no_rounding(name: str, batch: dict[str, Tensor]) -> None:
    _, left_out = theirs(batch, name, *SCRIPTS["paper-gpt2"][-1])
    assert (left_out < -0.5) == (name in ("fkl", "skew_fkl"))


@pytest.mark.parametrize("name", ["rkl", "skew_fkl", "tvd"])
def test_our_own_convention_differs_by_the_squared_temperature(name: str, batch: dict[str, Tensor]) -> None:
    words = ["--loss.divergence", name]
    recipe, own = (load_recipe("paper-gpt2", [*words, *more]) for more in ([], ["--loss.scale_by_temperature", "true"]))
    # The last stage, temperature 2 and kd_ratio 1: nothing but the divergence.
    assert ours(batch, own, 3).item() == pytest.approx(4 * ours(batch, recipe, 3).item(), rel=1e-13)


@pytest.mark.parametrize("shipped", ["paper-gpt2", "paper-opt"])
def test_the_plan_is_the_papers_without_weights_data_or_network(
    shipped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("a plan must not use the network"))
    made = plan(load_recipe(shipped))
    assert "not on this machine" in made.unread
    assert [row["samples"] for row in made.stages] == ["2,832", "5,664", "8,496", "11,328"]
    # The authors' logs have 352, 712, 1064 and 1416.
    assert [row["steps"] for row in made.stages] == ["360", "712", "1,064", "1,416"]
    assert [row["T"] for row in made.stages] == ["1", "1.33", "1.67", "2"]
    assert [row["kd_ratio"] for row in made.stages] == ["0.7", "0.8", "0.9", "1"]
    assert {row["learning_rate"] for row in made.stages} == {"0.0001"}
    assert "20 passes" in made.teacher
    assert made.loss == {"paper-gpt2": "fkl, times T^2", "paper-opt": "jsd, beta 0.1, times T^2"}[shipped]


@pytest.mark.slow
def test_the_papers_run_goes_through_with_small_models(
    tmp_path: Path, tiny_teacher_folder: Path, tiny_model_folder: Path, tiny_pairs: list[dict[str, str]]
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs))
    smaller = {
        "output": tmp_path / "run",
        "teacher.model": tiny_teacher_folder,
        "teacher.dtype": "float32",
        "student.model": tiny_model_folder,
        "data.source": data,
        "data.num_train": 16,
        "data.num_validation": 4,
        "data.num_test": 4,
        "data.max_length": 64,
        "data.max_prompt_length": 32,
        "ranking.max_new_tokens": 4,
        "curriculum.epochs": 1,
        "training.precision": "float32",
        "training.metric": "loss",
        "evaluation.max_new_tokens": 4,
        "evaluation.seeds": [10, 20],
        "loss.divergence": "rkl",
    }
    folder = run(
        load_recipe("paper-gpt2", [word for key, value in smaller.items() for word in (f"--{key}", str(value))])
    )
    log = [json.loads(line) for line in (folder / "training" / "log.jsonl").read_text().splitlines()]
    temperatures = dict.fromkeys(line["temperature"] for line in log if "temperature" in line)
    assert list(temperatures) == [1.0, 1.33, 1.67, 2.0]
    last = next(line for line in reversed(log) if line.get("kd_ratio") == 1)
    assert last["loss"] == pytest.approx(last["divergence"], rel=1e-3)  # the reverse KL: no factor of 4
    assert "squared temperature" not in (folder / "student" / "README.md").read_text()
