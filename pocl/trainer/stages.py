"""The loop over stages: one `Trainer.train()` each.

Why a loop of training calls and not one call over a virtual epoch: what the paper asks for at the border of two stages
(a fresh optimizer and learning rate, the best checkpoint of the stage before, a stop at convergence) is what
`Trainer.train()` does at its beginning and end, for every engine. What the loop costs is an offset on step counts.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, set_seed
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from pocl.curriculum import Curriculum, Stage
from pocl.difficulty.processes import Processes
from pocl.trainer.callbacks import Convergence, Evaluations
from pocl.trainer.carry import carry_optimizer, shifted
from pocl.trainer.figures import Figures
from pocl.trainer.identity import forget, leave, run_identity, student_identity
from pocl.trainer.on_policy import OnPolicy
from pocl.trainer.progress import FinishedStage, RunProgress
from pocl.trainer.sampler import derived_seed
from pocl.trainer.weights import load_weights, no_saving_bars, save_weights

logger = logging.getLogger(__name__)


class StagedTrainer(Trainer):
    """A trainer that goes through the stages of a curriculum, and goes on where it was interrupted.

    Attributes:
        curriculum: the stages.
        stage: the one that is trained, or was last.
        subsets: the subset of each training row.
        progress: the files of the run.
        figures: what is logged, cleared when a stage begins.
        on_policy: its replay buffer belongs to the checkpoints.
        rerank: gives the subsets anew before a stage.
        stage_rows: the row numbers of each stage.
    """

    curriculum: Curriculum
    stage: Stage
    subsets: list[int]
    progress: RunProgress
    figures: Figures
    on_policy: OnPolicy | None
    rerank: Callable[[int, nn.Module], Sequence[int]] | None
    stage_rows: tuple[tuple[int, ...], ...]
    _step_offset: int = 0  # optimizer steps of the finished stages
    _stage_in_memory: int | None = None  # the stage whose result the model holds
    _warned: bool = False  # that the metric tells nothing
    _began_with: dict[str, Any] | None = None  # what stands for the student at the start

    @property
    def batch_size(self) -> int:
        """Samples of one optimizer step, over processes and accumulation."""
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def train(
        self,
        resume_from_checkpoint: bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train all stages that are not finished yet.

        Args:
            resume_from_checkpoint: None or True goes on from what `output_dir` holds, False removes it first.
            trial, ignore_keys_for_eval: must be left out; taken for the signature of `Trainer`.

        Returns:
            Optimizer steps over all stages, mean loss of the last stage trained, and its speed metrics.

        Raises:
            ValueError: `output_dir` holds another run.
            FloatingPointError: the loss is not finite; says step, stage and samples. Checkpoints stay as they are.
        """
        if isinstance(resume_from_checkpoint, str | Path) or trial is not None or ignore_keys_for_eval is not None:
            raise ValueError(
                "train() takes resume_from_checkpoint=None, True or False only: each stage has its own checkpoints in "
                "output_dir, and the newest whole one is found there"
            )
        with Processes.current() as processes:
            processes.first(lambda: self._claim(anew=resume_from_checkpoint is False))
        base_args: Any = vars(self)["args"]
        self._step_offset, output = 0, TrainOutput(0, 0.0, {})
        self._measure_start()
        try:
            with no_saving_bars():
                for stage in self.curriculum.stages:
                    record = self.progress.finished(stage.index)
                    if record is None:
                        self._restore_result_of(stage.index - 1)
                        self._rank_again(stage.index)
                        output, record = self._train_stage(stage, base_args)
                    self._step_offset += record.steps
            self._restore_result_of(stage.index)
        finally:
            self.args = base_args
            if self._began_with is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                leave(self.model, self.progress.root, self._began_with)
        self.state.log_history = self.progress.read_log()
        return TrainOutput(self._step_offset, output.training_loss, output.metrics)

    def _claim(self, *, anew: bool) -> None:
        """Make the folder that of this run, on the first process: others may hold no weights before they are shared."""
        if anew:
            self.progress.forget()
            self._began_with = None
        if self.progress.identity() is None:
            forget(self.model)
        if self._began_with is None:
            self._began_with = student_identity(self.model, self.progress.root)
        self.progress.claim(run_identity(self, self._began_with))

    def _measure_start(self) -> None:
        """With `eval_on_start`, log an evaluation before any training, as step 0: curves begin where the student did.

        Sharding engines wrap the model anew for training, and are left alone.
        """
        first = self.curriculum.stages[0].index
        begun = self.progress.finished(first) is not None or self._to_go_on_from(first) is not None
        evaluates = self.eval_dataset is not None and self.args.eval_on_start
        if begun or not evaluates or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        self.progress.cut_log(-1)
        metrics = self.evaluate()
        if self.is_world_process_zero():
            self.progress.append_log({"step": 0, "stage": first, **metrics})

    def _train_stage(self, stage: Stage, base_args: Any) -> tuple[TrainOutput, FinishedStage]:
        """One call of `Trainer.train`, from the stage's newest whole checkpoint if it has one."""
        self._enter(stage, base_args)
        checkpoint = self._to_go_on_from(stage.index)
        resumed = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.accelerator.is_main_process:
            self.progress.clean(stage.index)
            self.progress.cut_log(self._step_offset + (resumed.global_step if resumed else 0))
        self.accelerator.wait_for_everyone()
        if self.on_policy is not None:
            self.on_policy.load(checkpoint)
        if checkpoint is not None and resumed is not None and self._had_converged(resumed):
            load_weights(self.model, Path(self._best(resumed) or checkpoint))
            self.state, output = resumed, TrainOutput(resumed.global_step, 0.0, {})
        else:
            try:
                output = super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            except KeyboardInterrupt:
                logger.warning(
                    "interrupted in stage %d at step %d; the same command goes on from the newest checkpoint in %s",
                    stage.index,
                    self._step_offset + self.state.global_step,
                    self.progress.root,
                )
                raise
        return output, self._finish(stage)

    def _to_go_on_from(self, index: int) -> Path | None:
        """The newest whole checkpoint of a stage; weights without their optimizer's state are none: it starts anew."""
        return None if self.args.save_only_model else self.progress.newest_checkpoint(index)

    def _rank_again(self, index: int) -> None:
        """Deal the samples to this stage and those after it by the student as it is."""
        if self.rerank is not None and index > 0:
            rows = self.curriculum.rows(list(self.rerank(index, self.model)))
            self.stage_rows = (*self.stage_rows[:index], *rows[index:])

    def _enter(self, stage: Stage, base_args: Any) -> None:
        self.stage = stage
        self.args = copy.copy(base_args)
        self.args.num_train_epochs = stage.epochs
        self.args.max_steps = stage.max_steps or -1
        self.args.learning_rate = stage.learning_rate or base_args.learning_rate
        last = stage.index == len(self.curriculum.stages) - 1
        self.args.eval_on_start = False  # once a run, not once a stage: see `_measure_start`
        self.args.load_best_model_at_end &= last or self.curriculum.start == "best"
        set_seed(derived_seed(base_args.seed, stage.index))
        self.optimizer, self.lr_scheduler = None, None
        self._let_wrap()
        if self.is_deepspeed_enabled:  # its engine owns the optimizer, so a fresh optimizer needs a fresh engine
            self.model_wrapped, self.deepspeed = self.model, None
        self.figures.clear()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = 0

    def _let_wrap(self) -> None:
        """Take accelerate's mark from a model that was evaluated before it was trained: a marked one is not wrapped for
        DDP, and every process would train a student of its own."""
        bare = self.model_wrapped is self.model and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if bare and self.args.world_size > 1:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model.__dict__.pop("_is_accelerate_prepared", None)

    def _had_converged(self, state: TrainerState) -> bool:
        """A run may die between the evaluation that ends a stage and the end of the stage."""
        if self.curriculum.patience is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        return Convergence(self.curriculum.patience).reached(self.args, state)

    def _best(self, state: TrainerState) -> str | None:
        return state.best_model_checkpoint if self.args.load_best_model_at_end else None

    def _finish(self, stage: Stage) -> FinishedStage:
        self._warn_of_metric(stage)
        save_weights(self, self.progress.student_dir(stage.index))
        record = FinishedStage(self.state.global_step, self.state.best_metric, self._kept_checkpoint(stage))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.progress.mark_finished(stage.index, record)
            if self.args.save_total_limit is not None:
                self.progress.keep_only(stage.index, record.checkpoint)
        self.accelerator.wait_for_everyone()
        self._stage_in_memory = stage.index
        return record

    def _kept_checkpoint(self, stage: Stage) -> str | None:
        """The checkpoint whose optimizer state the next stage carries on."""
        if self.curriculum.optimizer == "fresh" or stage.index == len(self.curriculum.stages) - 1:
            return None
        chosen = self._best(self.state) or self.progress.newest_checkpoint(stage.index)
        return None if chosen is None else Path(chosen).name

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this is the best checkpoint so far: by the metric, or by the loss while the metric tells nothing."""
        name = f"eval_{str(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if self.args.metric_for_best_model is not None and name not in metrics:
            known = sorted(key.removeprefix("eval_") for key in metrics if key.startswith("eval_"))
            raise ValueError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} is not among what the evaluation measures: "
                f"{', '.join(known)}; name one of these, or return it from compute_generation_metrics"
            )
        best = super()._determine_best_metric(metrics, trial)
        evaluations = Evaluations(self.args, self.state)
        scores = evaluations.scores()
        if not best and evaluations.tell_nothing and evaluations.losses and scores[-1] > max(scores[:-1]):
            self.state.best_global_step, best = self.state.global_step, True
        return best

    def _warn_of_metric(self, stage: Stage) -> None:
        """Say once what chose the best weights, where the metric could not."""
        evaluations = Evaluations(self.args, self.state)
        used = self.args.load_best_model_at_end or self.curriculum.patience is not None
        if used and evaluations.tell_nothing and evaluations.losses and not self._warned:
            self._warned = True
            if self.is_world_process_zero():
                logger.warning(
                    "%s was %g at all %d evaluations of stage %d and cannot tell weights apart; the loss did instead",
                    evaluations.name,
                    evaluations.values[0],
                    len(evaluations.values),
                    stage.index,
                )

    def _restore_result_of(self, index: int) -> None:
        if index >= 0 and self._stage_in_memory != index:
            load_weights(self.model, self.progress.student_dir(index))
            self._stage_in_memory = index

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Without those about weights that are there under another name, such as a head that is the embedding."""
        named = self.model.state_dict(keep_vars=True)
        missing = set(load_result.missing_keys)
        there = {named[name].data_ptr() for name in named.keys() - missing}
        load_result.missing_keys[:] = [n for n in missing if n not in named or named[n].data_ptr() not in there]
        super()._issue_warnings_after_load(load_result)

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self.progress.stage_dir(self.stage.index))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.curriculum.optimizer == "carried" and self.stage.index > 0:
            before = self.progress.finished(self.stage.index - 1)
            assert before is not None
            checkpoint = self.progress.stage_dir(self.stage.index - 1) / str(before.checkpoint)
            carry_optimizer(optimizer, checkpoint, self.args.learning_rate, self.args.device)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.curriculum.schedule == "restart" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        total = sum(self.curriculum.stage_steps(self.subsets, self.batch_size))
        scheduler: Any = shifted(super().create_scheduler(total, optimizer), self._step_offset)
        self.lr_scheduler = scheduler
        return scheduler
