"""`POCLTrainer`: the stages of `stages.py`, the fused loss inside the student's forward, evaluation and logging."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from pocl import heads
from pocl.curriculum import Curriculum, Stage
from pocl.data import Collator
from pocl.interval import Interval
from pocl.modes import follow_umask
from pocl.teacher import LikelyTokens, Teacher, signal_of
from pocl.trainer.callbacks import Convergence, EvaluateLast, StageBar, keep_beside_run
from pocl.trainer.card import distillation_section
from pocl.trainer.checks import check_eval_rows, check_rows, check_setup, divergence_of, packs
from pocl.trainer.config import POCLConfig
from pocl.trainer.figures import Figures, FiniteLossGuard
from pocl.trainer.fused import DistillationLossCall, install_fused_forward
from pocl.trainer.loading import PackedCollator, label_tokens, make_loader
from pocl.trainer.on_policy import OnPolicy
from pocl.trainer.progress import RunProgress
from pocl.trainer.sampler import StageRows, derived_seed
from pocl.trainer.saving import SaveEvery
from pocl.trainer.stages import StagedTrainer
from pocl_kernels import Divergence


class POCLTrainer(StagedTrainer):
    """Distils a teacher into a student along a curriculum.

    `train()` goes on from what `args.output_dir` holds of the same run, unless told `resume_from_checkpoint=False`.

    Args:
        model: the student, a Hugging Face causal language model or its PEFT wrapper.
        teacher: `OnlineTeacher`, `HiddenStateCache`, `TopKCache` or anything that is a `Teacher` or `LikelyTokens`;
            None trains on the labels alone, where every stage has `kd_ratio` 0.
        args: settings.
        train_dataset: tokenised rows with `sample_id`, `input_ids`, `labels` (see `pocl.data.tokenize`).
        subsets: the subset of each row, 0 the easiest (see `pocl.difficulty.rank`); None puts all rows into subset 0.
        curriculum: stages; the default is the paper's. Stages start from the best checkpoint of the stage before where
            `args.load_best_model_at_end` is set, from its last weights otherwise.
        eval_dataset: tokenised rows. The metrics are `eval_loss` (of the stage), `eval_divergence`,
            `eval_cross_entropy`, `eval_student_entropy` and `eval_teacher_entropy`, in nats per label token, and
            `eval_mean_token_accuracy`: the share of label tokens that are the student's likeliest.
        processing_class: the tokenizer; its padding token pads, and it is saved with the student.
        divergence: name or instance; a stage's `skew` replaces its skew.
        compute_generation_metrics: called with the student at every evaluation, on every process; returns further
            metrics, such as `rouge_l`, which `args.metric_for_best_model` may name.
        rerank: called before every stage but the first with its index and the student, on every process; returns the
            subsets that hold from this stage on.
        **kwargs: of `transformers.Trainer`.

    Raises:
        ValueError: a setting is out of range, a stage is left without samples, the vocabularies differ by more than
            padding, the student's logits are not its head applied to its last hidden states, nothing of it can be
            trained, or a row is not one that both models can read (names the sample).
    """

    # The loss is already divided by the label tokens of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher | LikelyTokens | None,
        args: POCLConfig,
        train_dataset: Any,
        subsets: Sequence[int] | None = None,
        curriculum: Curriculum | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        divergence: str | Divergence = "fkl",
        compute_generation_metrics: Callable[[nn.Module], dict[str, float]] | None = None,
        rerank: Callable[[int, nn.Module], Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.curriculum = curriculum or (Curriculum.baby_step() if subsets is not None else Curriculum.constant())
        self.divergences = divergence_of(self.curriculum, divergence)
        check_setup(model, teacher, args, self.curriculum, eval_dataset, processing_class, kwargs)
        self.teacher = teacher
        self.compute_generation_metrics = compute_generation_metrics
        self.rerank = rerank
        room = args.on_policy_max_new_tokens if args.on_policy else 0
        self.rows_summary = check_rows(train_dataset, "train_dataset", model, teacher, room)
        self.eval_summaries = check_eval_rows(eval_dataset, model, teacher)
        self.subsets = [0] * len(train_dataset) if subsets is None else [int(subset) for subset in subsets]
        if len(self.subsets) != len(train_dataset):
            raise ValueError(
                f"subsets must name the subset of each of the {len(train_dataset)} rows, got {len(self.subsets)}"
            )
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
        if self.curriculum.optimizer == "carried" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("optimizer='carried' works without sharding only; use optimizer='fresh' or DDP")
        if rerank is not None and self.is_fsdp_enabled:
            raise ValueError("rerank needs the student whole on every process, which FSDP does not leave; use DDP")
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "DeepSpeed's ZeRO-3 hides the weights of the head from the loss; use zero_stage 2 or FSDP2"
            )
        self.model_accepts_loss_kwargs = True
        if teacher is not None and hasattr(teacher, "to"):
            teacher.to(args.device)
        self.progress = RunProgress(args.output_dir)
        self.figures, self.eval_figures = Figures(self.accelerator), Figures(self.accelerator)
        self.guard = FiniteLossGuard()
        self.on_policy = OnPolicy.of(self) if args.on_policy else None
        keep_beside_run(self.callback_handler.callbacks, args.output_dir)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(StageBar(self))
        self.add_callback(EvaluateLast())
        if args.save_every is not None:
            self.add_callback(SaveEvery(Interval.parse(args.save_every), args.device))
        if self.curriculum.patience is not None:
            self.add_callback(Convergence(self.curriculum.patience))

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
        if eval_dataset is not None and not any(dataset is each for each in self._looked_at()):
            check_eval_rows(dataset, self.model, self.teacher)
        return make_loader(self, StageRows(dataset, range(len(dataset))), self.args.eval_batch_size)

    def _looked_at(self) -> Iterator[Any]:
        """The data sets whose rows were checked when the trainer was made."""
        yield self.train_dataset
        yield self.eval_dataset
        if isinstance(self.eval_dataset, Mapping):
            yield from self.eval_dataset.values()

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
        unheard = self.teacher is None or self.stage.kd_ratio == 0
        teacher, head = (None, None) if unheard else signal_of(self.teacher, inputs)  # type: ignore[arg-type]
        call = DistillationLossCall(
            labels=inputs["labels"],
            positions=heads.label_positions(inputs),
            teacher=teacher,
            teacher_head=head,
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
        folder = Path(self._get_output_dir(), f"checkpoint-{self.state.global_step}")
        # Sharded weights make it late: one process would have looked for it, and another not, and know another best.
        folder.mkdir(parents=True, exist_ok=True)
        if self.on_policy is not None:
            self.on_policy.save(folder)
        super()._save_checkpoint(model, trial)
        if self.accelerator.is_main_process:
            follow_umask(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # the state that makes a checkpoint whole is written next, by one process: the others must be done
        self.accelerator.wait_for_everyone()

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

    # -------------------------------------------------------------------------------------------------------- hub

    @contextlib.contextmanager
    def _hub_folder(self) -> Iterator[None]:
        """Let what is pushed lie in `output_dir/hub`: stages and checkpoints stay at home."""
        args = vars(self)["args"]
        self.args = copy.copy(args)
        self.args.output_dir = str(Path(args.output_dir, "hub"))
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            self.args = args

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers: the student, its tokenizer and a model card, and of the run nothing else."""
        if self.hub_model_id is None:  # now, as a repository without a name takes the folder's
            self.init_hf_repo(token=token, private=kwargs.get("private"))
        kwargs.setdefault("model_name", (self.args.hub_model_id or Path(self.args.output_dir).name).split("/")[-1])
        with self._hub_folder():
            return super().push_to_hub(commit_message, blocking, token, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        step = self.state.global_step
        self.state.global_step += self._step_offset  # which the message of the commit names
        with self._hub_folder():
            super()._push_from_checkpoint(checkpoint_folder)
        self.state.global_step = step

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of transformers, with a section on loss, stages and figures."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            with open(Path(self.args.output_dir, "README.md"), "a", encoding="utf-8") as file:
                file.write(distillation_section(self))
