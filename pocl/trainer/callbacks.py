"""A progress bar that shows the stage, and the stop at convergence."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback


def keep_beside_run(callbacks: Iterable[TrainerCallback], folder: str) -> None:
    """Let TensorBoard write to `folder/tensorboard`, wherever it was not told another place.

    It would make `./runs` for what is logged before training begins, such as the evaluation of the student as it is.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(folder, "tensorboard"))


class StageBar(TrainerCallback):
    """One bar a stage, over optimizer steps: stage, temperature, loss, tokens per second.

    Args:
        trainer: the POCLTrainer, asked for its stage.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from tqdm.auto import tqdm

        if state.is_world_process_zero:
            stage, count = self.trainer.stage, len(self.trainer.curriculum.stages)
            title = f"stage {stage.index}{f' of 0-{count - 1}' if count > 1 else ''}, T={stage.temperature:.2f}"
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=title, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None and logs:
            shown = {"loss": "loss", "eval_loss": "eval_loss", "tokens_per_second": "tok/s"}
            self.bar.set_postfix({short: f"{logs[name]:.4g}" for name, short in shown.items() if name in logs})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class EvaluateLast(TrainerCallback):
    """Where evaluations come by steps, the last weights of a stage are measured, too: they may be its best."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate |= args.eval_strategy == "steps" and state.global_step >= state.max_steps


class Evaluations:
    """The evaluations of a stage so far, by the metric that is to choose the best, from the log that checkpoints keep.

    Attributes:
        name: of the metric, as it is logged.
        values: at each evaluation.
        losses: at the same; empty where the metric is a loss itself, or none was logged.
    """

    def __init__(self, args: TrainingArguments, state: TrainerState) -> None:
        self.name = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        entries = [entry for entry in state.log_history if self.name in entry]
        self.values = [float(entry[self.name]) for entry in entries]
        # of several evaluation sets each logs its own, as eval_<set>_loss
        losses = [[float(v) for k, v in e.items() if k.startswith("eval_") and k.endswith("_loss")] for e in entries]
        self.losses = [] if self.name.endswith("loss") or not all(losses) else [first for first, *_ in losses]
        self._sign = 1.0 if args.greater_is_better else -1.0

    @property
    def tell_nothing(self) -> bool:
        """Whether there are several, and the metric was the same, or not finite, at all of them."""
        return len(self.values) > 1 and len(set(map(_ordered, self.values))) == 1

    def scores(self) -> list[float]:
        """Higher is better: the metric, or the loss where the metric tells nothing."""
        if self.tell_nothing and self.losses:
            return [_ordered(-loss) for loss in self.losses]
        return [_ordered(self._sign * value) for value in self.values]


def _ordered(value: float) -> float:
    """What is not finite is worse than anything."""
    return value if math.isfinite(value) else -math.inf


class Convergence(TrainerCallback):
    """Ends a stage after `patience` evaluations without a better metric, or loss where the metric tells nothing.

    It reads the log that checkpoints keep, so a resumed run stops where the uninterrupted one does.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= self.reached(args, state)

    def reached(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether the last `patience` evaluations brought nothing better than the one before them."""
        scores = Evaluations(args, state).scores()
        return len(scores) > self.patience and scores.index(max(scores)) < len(scores) - self.patience
