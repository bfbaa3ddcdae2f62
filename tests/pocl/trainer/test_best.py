"""Which checkpoint is the best: by the metric, and by the loss where the metric tells nothing."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pocl.curriculum import Curriculum, Stage
from pocl.trainer.callbacks import Convergence, Evaluations

transformers = pytest.importorskip("transformers")

STEPS = 6


@pytest.fixture
def trained(student: Any, teacher: Any, config: Any, rows: Any, unseen_rows: Any) -> Callable[..., Any]:
    """Train one stage with a metric of given values, and the weights after every step."""
    from pocl.trainer import POCLTrainer

    def go(values: list[float], losses: list[float] | None = None, stages: int = 1, **settings: Any) -> Any:
        after: list[dict[str, torch.Tensor]] = []

        class Watch(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
                after.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

        remaining, of_loss = iter(values), iter(losses or ())

        def measure(model: Any) -> dict[str, float]:
            return {"rouge_l": next(remaining)} | ({"loss": next(of_loss)} if losses else {})

        patience = settings.pop("patience", None)
        every = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
        trainer = POCLTrainer(
            student,
            teacher,
            config(**every | {"metric_for_best_model": "rouge_l", "save_total_limit": 2} | settings),
            rows,
            curriculum=Curriculum(
                tuple(Stage(i, (0,), max_steps=len(values) // stages) for i in range(stages)), patience=patience
            ),
            eval_dataset=unseen_rows,
            callbacks=[Watch()],
            compute_generation_metrics=measure,
        )
        trainer.train()
        kept = trainer.model.state_dict()
        (step,) = [i for i, state in enumerate(after, 1) if all(torch.equal(kept[n], state[n]) for n in kept)]
        return SimpleNamespace(step=step, trainer=trainer, steps=len(after))

    return go


FALLING = [5.0, 4.0, 3.0, 2.0, 2.5, 4.0]


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan], ids=str)
def test_a_metric_that_never_changes_leaves_the_choice_to_the_loss_and_says_so_once(
    value: float, trained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    result = trained([value] * STEPS, FALLING)
    assert result.step == 4
    (told,) = [m for m in caplog.messages if "cannot tell weights apart" in m]
    assert told.startswith(f"eval_rouge_l was {value:g} at all 6 evaluations of stage 0 and cannot tell weights apart")


def test_all_stages_of_a_run_share_one_warning(trained: Any, caplog: pytest.LogCaptureFixture) -> None:
    trained([0.0] * 4, [2.0, 1.0, 0.5, 3.0], stages=2)
    assert sum("cannot tell weights apart" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.1, 0.1], 2),  # the first of equals
        ([0.0, 0.0, 0.0, 0.2, 0.1, 0.1], 4),  # begins to tell something
        ([0.2, 0.2, 0.2, 0.1, 0.1, 0.1], 3),  # the lowest loss of those that were equal until then
    ],
)
def test_a_metric_that_changes_chooses(
    values: list[float], best: int, trained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert trained(values, FALLING).step == best
    assert not [m for m in caplog.messages if "cannot tell" in m]


def test_a_stage_does_not_end_on_a_metric_that_tells_nothing_but_on_the_loss(trained: Any) -> None:
    result = trained([0.0] * STEPS, [5.0, 4.0, 3.0, 4.0, 3.5, 1.0], patience=2)
    assert (result.steps, result.step) == (5, 3)


def test_a_metric_that_no_evaluation_gives_is_named_with_those_that_are(trained: Any) -> None:
    with pytest.raises(ValueError, match=r"metric_for_best_model='bleu' is not among .*: cross_entropy, .*rouge_l"):
        trained([0.0] * STEPS, metric_for_best_model="bleu")


def test_several_evaluation_sets_have_losses_of_their_own() -> None:
    log = [{"eval_a_rouge_l": 0.0, "eval_a_loss": loss} for loss in (3.0, 2.0)]
    log[1:1] = [{"eval_b_rouge_l": 0.5, "eval_b_loss": 9.0}]
    args = SimpleNamespace(metric_for_best_model="a_rouge_l", greater_is_better=True)
    seen = Evaluations(args, SimpleNamespace(log_history=log))
    assert (seen.values, seen.losses, seen.scores()) == ([0.0, 0.0], [3.0, 2.0], [-3.0, -2.0])
    for name in ("loss", "eval_a_loss", None):
        args = SimpleNamespace(metric_for_best_model=name, greater_is_better=False)
        log = [{"eval_loss": 1.0, "eval_a_loss": 1.0}] * 3
        assert Evaluations(args, SimpleNamespace(log_history=log)).scores() == [-1.0] * 3
        assert Convergence(2).reached(args, SimpleNamespace(log_history=log))
