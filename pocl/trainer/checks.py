"""What can be wrong with a setup, said before anything starts."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from torch import nn

from pocl import heads
from pocl.curriculum import Curriculum
from pocl.teacher import HiddenStateCache, OnlineTeacher, Teacher
from pocl.trainer.config import POCLConfig
from pocl_kernels import Divergence
from pocl_kernels.divergences import get_divergence


def check_setup(
    model: nn.Module,
    teacher: Teacher | None,
    args: POCLConfig,
    curriculum: Curriculum,
    eval_dataset: Any,
    processing_class: Any,
    kwargs: dict[str, Any],
) -> None:
    """Raise a ValueError that names the argument, what came, and what to do."""
    if not isinstance(args, POCLConfig):
        raise ValueError(f"args must be a POCLConfig, got {type(args).__name__}; it takes the same fields")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, which transformers would use through DataParallel; start one process "
            "a GPU with torchrun or accelerate launch, or show one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    for name, instead in (
        ("compute_metrics", "compute_generation_metrics, as logits are never made"),
        ("compute_loss_func", "divergence"),
        ("optimizers", "optimizer_cls_and_kwargs, as every stage makes its own"),
        ("model_init", "model"),
    ):
        if kwargs.get(name) not in (None, (None, None)):
            raise ValueError(f"{name} is not taken by POCLTrainer; pass {instead}")
    if curriculum.patience is not None and (args.eval_strategy == "no" or eval_dataset is None):
        raise ValueError(
            f"patience={curriculum.patience} needs evaluations; pass eval_dataset and eval_strategy='steps' or 'epoch'"
        )
    if curriculum.optimizer == "carried" and (args.save_only_model or args.save_strategy == "no"):
        raise ValueError(
            "optimizer='carried' needs checkpoints with optimizer states; set save_strategy and not save_only_model"
        )
    if curriculum.schedule == "continuous" and args.lr_scheduler_type == "reduce_lr_on_plateau":
        raise ValueError(
            "schedule='continuous' needs a schedule that is a function of the step, not reduce_lr_on_plateau"
        )
    if args.on_policy and isinstance(teacher, HiddenStateCache) and teacher.fallback is None:
        raise ValueError(
            "on_policy > 0 samples responses that no cache holds; pass HiddenStateCache.open(..., "
            "fallback=OnlineTeacher(model)) or an OnlineTeacher"
        )
    if args.on_policy and processing_class is None:
        raise ValueError("on_policy > 0 needs processing_class, the tokenizer, for its end and padding tokens")
    heads.verify_head(model, trained=True)
    if teacher is None:
        if any(stage.kd_ratio > 0 for stage in curriculum.stages):
            raise ValueError("teacher is None, but a stage has kd_ratio > 0; pass a teacher or set kd_ratio=0")
    else:
        heads.check_vocabularies(heads.head_of(model).vocab_size, teacher.head.vocab_size)


def packs(args: POCLConfig, model: Any, teacher: Teacher | None) -> bool:
    """Whether batches are packed: `args.packing`, or where it is None, whether that is faster and both models can.

    Raises:
        ValueError: `packing=True`, but a model mixes packed rows.
    """
    if args.packing is False:
        return False
    attention = getattr(heads.unwrapped(model).config, "_attn_implementation", None) or ""
    if args.packing is None and args.device.type != "cpu" and "flash" not in attention:
        return False
    models = [model, *([teacher.model] if isinstance(teacher, OnlineTeacher) else [])]
    mixing = [type(heads.unwrapped(m)).__name__ for m in models if not heads.separates_packed_rows(m)]
    if mixing and args.packing:
        raise ValueError(f"packing=True, but {mixing[0]} mixes the rows of a packed batch; set packing=False")
    return not mixing


def divergence_of(curriculum: Curriculum, divergence: str | Divergence) -> list[Divergence]:
    """The divergence of every stage, with the stage's skew."""
    base = get_divergence(divergence)
    result = []
    for stage in curriculum.stages:
        if stage.skew is not None and not hasattr(base, "skew"):
            raise ValueError(f"skew of stage {stage.index} is set, but {base} has none; use skew_fkl or skew_rkl")
        result.append(base if stage.skew is None else dataclasses.replace(base, skew=stage.skew))  # type: ignore[call-arg]
    return result


def run_identity(trainer: Any) -> dict[str, Any]:
    """What makes two runs the same run; the number of processes and the place of the data do not."""
    args = trainer.args
    rows = trainer.train_dataset
    ids = rows["sample_id"] if hasattr(rows, "column_names") else [row["sample_id"] for row in rows]
    data = hashlib.blake2b(repr((list(map(int, ids)), trainer.subsets)).encode(), digest_size=8).hexdigest()
    return {
        "curriculum": dataclasses.asdict(trainer.curriculum),
        "divergence": [repr(divergence) for divergence in trainer.divergences],
        "samples": data,
        "batch_size": trainer.batch_size,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "scale_by_temperature": args.scale_by_temperature,
    }
