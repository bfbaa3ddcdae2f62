"""`POCLTrainer`: one `Trainer.train()` a stage, the fused loss inside the student's forward, and nothing else.

Why a loop of training calls and not one call over a virtual epoch: what the paper asks for at the border of two stages
(a fresh optimizer and learning rate, the best checkpoint of the stage before, a stop at convergence) is what
`Trainer.train()` does at its beginning and end, for every engine. What the loop costs is an offset on step counts.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, set_seed
from transformers.trainer_callback import ProgressCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from pocl import heads
from pocl.curriculum import Curriculum, Stage
from pocl.data import Collator
from pocl.teacher import Teacher
from pocl.trainer.callbacks import Convergence, StageBar
from pocl.trainer.checks import check_setup, divergence_of, packs, run_identity
from pocl.trainer.config import POCLConfig
from pocl.trainer.figures import Figures, FiniteLossGuard
from pocl.trainer.fused import DistillationLossCall, install_fused_forward
from pocl.trainer.loading import PackedCollator, label_tokens, make_loader
from pocl.trainer.on_policy import OnPolicy
from pocl.trainer.progress import FinishedStage, RunProgress
from pocl.trainer.sampler import StageRows, derived_seed
from pocl.trainer.weights import load_weights, no_saving_bars, save_weights
from pocl_kernels import Divergence

logger = logging.getLogger(__name__)


class POCLTrainer(Trainer):
    """Distils a teacher into a student along a curriculum.

    `train()` goes on from what `args.output_dir` holds of the same run, unless told `resume_from_checkpoint=False`.

    Args:
        model: the student, a Hugging Face causal language model or its PEFT wrapper.
        teacher: `OnlineTeacher`, `HiddenStateCache` or anything with their two members; None trains on the labels
            alone, where every stage has `kd_ratio` 0.
        args: settings.
        train_dataset: tokenised rows with `sample_id`, `input_ids`, `labels` (see `pocl.data.tokenize`).
        subsets: the subset of each row, 0 the easiest (see `pocl.difficulty.rank`); None puts all rows into subset 0.
        curriculum: stages; the default is the paper's. Stages start from the best checkpoint of the stage before where
            `args.load_best_model_at_end` is set, from its last weights otherwise.
        eval_dataset: tokenised rows. The metrics are `eval_loss` (of the stage), `eval_divergence`,
            `eval_cross_entropy` and `eval_student_entropy`, in nats per label token.
        processing_class: the tokenizer; its padding token pads, and it is saved with the student.
        divergence: name or instance; a stage's `skew` replaces its skew.
        compute_generation_metrics: called with the student at every evaluation, on every process; returns further
            metrics, such as `rouge_l`, which `args.metric_for_best_model` may name.
        **kwargs: of `transformers.Trainer`.

    Raises:
        ValueError: a setting is out of range, a stage is left without samples, the vocabularies differ by more than
            padding, or the student's logits are not its head applied to its last hidden states.
    """

    # The loss is already divided by the label tokens of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher | None,
        args: POCLConfig,
        train_dataset: Any,
        subsets: Sequence[int] | None = None,
        curriculum: Curriculum | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        divergence: str | Divergence = "fkl",
        compute_generation_metrics: Callable[[nn.Module], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.curriculum = curriculum or (Curriculum.baby_step() if subsets is not None else Curriculum.constant())
        self.divergences = divergence_of(self.curriculum, divergence)
        check_setup(model, teacher, args, self.curriculum, eval_dataset, processing_class, kwargs)
        self.teacher = teacher
        self.compute_generation_metrics = compute_generation_metrics
        self.subsets = [0] * len(train_dataset) if subsets is None else [int(subset) for subset in subsets]
        self.stage_rows = self.curriculum.rows(self.subsets)
        self.stage: Stage = self.curriculum.stages[0]
        if kwargs.get("data_collator") is None:
            padded = Collator(getattr(processing_class, "pad_token_id", None) or 0)
            kwargs["data_collator"] = PackedCollator() if packs(args, model, teacher) else padded
        install_fused_forward(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True
        self.progress = RunProgress(args.output_dir)
        self.figures, self.eval_figures = Figures(self.accelerator), Figures(self.accelerator)
        self.guard = FiniteLossGuard()
        self.on_policy = OnPolicy.of(self) if args.on_policy else None
        self._step_offset = 0  # optimizer steps of the finished stages
        self._stage_in_memory: int | None = None  # the stage whose result the model holds
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(StageBar(self))
        if self.curriculum.patience is not None:
            self.add_callback(Convergence(self.curriculum.patience))

    # ------------------------------------------------------------------------------------------------------ stages

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
        with self.accelerator.main_process_first():
            if resume_from_checkpoint is False and self.accelerator.is_main_process:
                self.progress.forget()
            self.progress.claim(run_identity(self), write=self.accelerator.is_main_process)
        base_args: Any = vars(self)["args"]
        self._step_offset, output = 0, TrainOutput(0, 0.0, {})
        try:
            with no_saving_bars():
                for stage in self.curriculum.stages:
                    record = self.progress.finished(stage.index)
                    if record is None:
                        self._restore_result_of(stage.index - 1)
                        output, record = self._train_stage(stage, base_args)
                    self._step_offset += record.steps
        finally:
            self.args = base_args
        self._restore_result_of(stage.index)
        self.state.log_history = self.progress.read_log()
        return TrainOutput(self._step_offset, output.training_loss, output.metrics)

    def _train_stage(self, stage: Stage, base_args: Any) -> tuple[TrainOutput, FinishedStage]:
        """One call of `Trainer.train`, from the stage's newest whole checkpoint if it has one."""
        self._enter(stage, base_args)
        checkpoint = self.progress.newest_checkpoint(stage.index)
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

    def _enter(self, stage: Stage, base_args: Any) -> None:
        self.stage = stage
        self.args = copy.copy(base_args)
        self.args.num_train_epochs = stage.epochs
        self.args.max_steps = stage.max_steps or -1
        self.args.learning_rate = stage.learning_rate or base_args.learning_rate
        last = stage.index == len(self.curriculum.stages) - 1
        self.args.load_best_model_at_end &= last or self.curriculum.start == "best"
        set_seed(derived_seed(base_args.seed, stage.index))
        self.optimizer, self.lr_scheduler = None, None
        self.figures.clear()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = 0

    def _had_converged(self, state: TrainerState) -> bool:
        """A run may die between the evaluation that ends a stage and the end of the stage."""
        if self.curriculum.patience is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        return Convergence(self.curriculum.patience).reached(self.args, state)

    def _best(self, state: TrainerState) -> str | None:
        return state.best_model_checkpoint if self.args.load_best_model_at_end else None

    def _finish(self, stage: Stage) -> FinishedStage:
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

    def _restore_result_of(self, index: int) -> None:
        if index >= 0 and self._stage_in_memory != index:
            load_weights(self.model, self.progress.student_dir(index))
            self._stage_in_memory = index

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self.progress.stage_dir(self.stage.index))

    # ------------------------------------------------------------------------------------- optimizer and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.curriculum.optimizer == "carried" and self.stage.index > 0:
            record = self.progress.finished(self.stage.index - 1)
            assert record is not None
            assert record.checkpoint is not None
            path = self.progress.stage_dir(self.stage.index - 1) / record.checkpoint / "optimizer.pt"
            optimizer.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = self.args.learning_rate
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.curriculum.schedule == "restart" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        total = sum(self.curriculum.stage_steps(self.subsets, self.batch_size))
        whole, offset = super().create_scheduler(total, optimizer), self._step_offset
        shifted: Any = [lambda step, f=f: f(step + offset) for f in whole.lr_lambdas]
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(whole.optimizer, shifted)
        self.lr_scheduler = scheduler
        return scheduler

    # ------------------------------------------------------------------------------------------------------- data

    def get_train_dataloader(self) -> DataLoader:
        rows = self.stage_rows[self.stage.index]
        steps = self.stage.steps(len(rows), self.batch_size)
        per_epoch = -(-len(rows) // self.batch_size) if self.stage.max_steps else steps // self.stage.epochs
        return make_loader(
            self,
            StageRows(self.train_dataset, rows),
            self._train_batch_size,
            order=getattr(self.args, "train_sampling_strategy", "random"),
            batch=self.batch_size,
            seed=derived_seed(self.args.data_seed or self.args.seed, self.stage.index),
            epoch=lambda: self.state.global_step // per_epoch,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset is needed to evaluate; pass it to POCLTrainer or to evaluate()")
        return make_loader(self, StageRows(dataset, range(len(dataset))), self.args.eval_batch_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one optimizer step, and their label tokens over all processes."""
        batches: list[Any] = []
        with contextlib.suppress(StopIteration):
            while len(batches) < num_batches:
                batches.append(next(epoch_iterator))
        if self.on_policy is not None:
            place = (self.stage.index, self.state.global_step)
            batches = [self.on_policy.replace(self.model, batch, *place, i) for i, batch in enumerate(batches)]
        count = torch.zeros(1, dtype=torch.int64, device=device)
        for batch in batches:
            count += label_tokens(batch["labels"])
            self.figures.count_tokens(batch)
        self.figures.steps += 1
        return batches, self.accelerator.gather(count).sum().clamp(min=1)

    # ------------------------------------------------------------------------------------------------------- loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stage's loss of one micro-batch, in nats per label token of the whole batch when their count is given."""
        if num_items_in_batch is None:
            num_items_in_batch = label_tokens(inputs["labels"]).clamp(min=1)
        teacher = None if self.stage.kd_ratio == 0 else self.teacher
        call = DistillationLossCall(
            labels=inputs["labels"],
            teacher_hidden=None if teacher is None else teacher.hidden_states(inputs),
            teacher_head=None if teacher is None else teacher.head,
            divergence=self.divergences[self.stage.index],
            temperature=self.stage.temperature,
            scale_by_temperature=self.args.scale_by_temperature,
            kd_ratio=self.stage.kd_ratio,
            normalizer=num_items_in_batch,
        )
        outputs = model(**{n: inputs[n] for n in heads.MODEL_INPUTS if n in inputs}, distillation=call)
        loss = outputs["loss"]
        if model.training:
            self.figures.add(outputs)
            loss = loss * self.accelerator.num_processes  # engines average gradients over processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.watch(loss, inputs, self.stage, self._step_offset + self.state.global_step)
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.guard.check()
        if self.on_policy is not None:
            self.on_policy.save(Path(self._get_output_dir(), f"checkpoint-{self.state.global_step}"))
        super()._save_checkpoint(model, trial)

    # ---------------------------------------------------------------------------------------- evaluation and log

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Loss of one batch; logits are never made. Sums are kept for token-weighted means over the whole set."""
        inputs = self._prepare_inputs(inputs)
        tokens = label_tokens(inputs["labels"])
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, True, torch.ones_like(tokens))
        self.eval_figures.add({**outputs, "num_tokens": tokens})
        return loss / tokens.clamp(min=1), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        started = time.perf_counter()
        self.eval_figures.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = self.eval_figures.totals()
        tokens = max(sums.pop("num_tokens"), 1.0)
        metrics = {name: value / tokens for name, value in sums.items()}
        if self.compute_generation_metrics is not None:
            metrics |= self.compute_generation_metrics(self.model)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self.figures.pause(time.perf_counter() - started)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with global steps and the stage's figures, to the reporters and to `output_dir/log.jsonl`."""
        if "loss" in logs:
            logs |= self.figures.means()
            logs |= {"temperature": self.stage.temperature, "kd_ratio": self.stage.kd_ratio}
        logs["stage"] = self.stage.index
        step = self.state.global_step
        self.state.global_step += self._step_offset
        super().log(logs, start_time)
        if self.is_in_train and self.is_world_process_zero():
            self.progress.append_log({"step": self.state.global_step, **logs})
        self.state.global_step = step
