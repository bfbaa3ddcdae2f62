"""What can be wrong with a setup, said before anything starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pocl import heads
from pocl.curriculum import Curriculum
from pocl.data.token_rows import RowsSummary, summarize
from pocl.models import view_of
from pocl.teacher import LikelyTokens, OnlineTeacher, StoredTeacher, Teacher, vocabulary_of
from pocl.trainer.config import POCLConfig
from pocl_kernels import Divergence
from pocl_kernels.divergences import get_divergence


def check_setup(
    model: nn.Module,
    teacher: Teacher | LikelyTokens | None,
    args: POCLConfig,
    curriculum: Curriculum,
    eval_dataset: Any,
    processing_class: Any,
    kwargs: dict[str, Any],
) -> None:
    """Raise a ValueError that names the argument, what came, and what to do."""
    if not isinstance(args, POCLConfig):
        raise ValueError(f"args must be a POCLConfig, got {type(args).__name__}; it takes the same fields")
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be the student itself, got {type(model).__name__}; load it with "
            "AutoModelForCausalLM.from_pretrained(...)"
        )
    if not (teacher is None or isinstance(teacher, Teacher | LikelyTokens)):
        raise ValueError(
            f"teacher is a bare {type(teacher).__name__}; pass OnlineTeacher(model), or a HiddenStateCache "
            "or TopKCache of it"
            if isinstance(teacher, nn.Module)
            else "teacher must be an OnlineTeacher, a HiddenStateCache, a TopKCache or None, got "
            f"{type(teacher).__name__}"
        )
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
    if args.on_policy and isinstance(teacher, StoredTeacher) and teacher.fallback is None:
        raise ValueError(
            f"on_policy > 0 samples responses that no cache holds; pass {type(teacher).__name__}.open(..., "
            "fallback=OnlineTeacher(model)) or an OnlineTeacher"
        )
    if args.on_policy and processing_class is None:
        raise ValueError("on_policy > 0 needs processing_class, the tokenizer, for its end and padding tokens")
    heads.verify_head(model, trained=True)
    _check_trained_weights(model, teacher)
    if teacher is None:
        if any(stage.kd_ratio > 0 for stage in curriculum.stages):
            raise ValueError("teacher is None, but a stage has kd_ratio > 0; pass a teacher or set kd_ratio=0")
    else:
        heads.check_vocabularies(heads.head_of(model).vocab_size, vocabulary_of(teacher))


def _check_trained_weights(model: nn.Module, teacher: Teacher | LikelyTokens | None) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        same = isinstance(teacher, OnlineTeacher) and heads.unwrapped(teacher.model) is heads.unwrapped(model)
        raise ValueError(
            "model is the teacher's model too, which OnlineTeacher has frozen; load the student for itself"
            if same
            else "model has nothing to train: no parameter requires a gradient; call model.requires_grad_(True), or "
            "load its adapter with is_trainable=True"
        )
    if any(parameter.dtype is torch.float16 for parameter in trained):
        raise ValueError(
            "model has float16 weights to train, in which steps of the optimizer are lost; load it with "
            "dtype=torch.float32, and set fp16=True or bf16=True for the arithmetic"
        )


def check_rows(
    rows: Any, name: str, model: nn.Module, teacher: Teacher | LikelyTokens | None, max_new_tokens: int = 0
) -> RowsSummary:
    """Look at every row before the first step: what it is (see `summarize`), and whether both models can read it.

    Args:
        rows, name, model, teacher: as in POCLTrainer; the name for messages.
        max_new_tokens: of a response that is sampled to each prompt.

    Raises:
        ValueError: a row is no token row, is longer than a model's context, has a token that a model does not have, or
            leaves no room for a sampled response; or no row has a label. Names the sample.
    """
    summary = summarize(rows, name)
    if not summary.num_labels:
        raise ValueError(f"{name}: every label is {heads.IGNORE_INDEX}, so there is nothing to learn from its rows")
    models = {"student": model} | ({"teacher": teacher.model} if isinstance(teacher, OnlineTeacher) else {})
    for role, each in models.items():
        view = view_of(each)
        kind, context, embedded = view.name, view.context, view.vocabulary
        if context and summary.longest.value > context:
            raise ValueError(
                f"{name}: sample {summary.longest.sample_id} has {summary.longest.value} tokens, and the context of "
                f"the {role}, a {kind}, is {context}; make rows with max_length={context} at most"
            )
        if summary.largest_id.value >= embedded:
            raise ValueError(
                f"{name}: sample {summary.largest_id.sample_id} has the token id {summary.largest_id.value}, and the "
                f"{role}, a {kind}, embeds {embedded} tokens; make rows with the tokenizer that both models share"
            )
        if max_new_tokens and context:
            _check_room(summary, name, max_new_tokens, context, f"{role}, a {kind},")
    return summary


def _check_room(summary: RowsSummary, name: str, max_new_tokens: int, context: int, whose: str) -> None:
    prompt = summary.longest_prompt
    left = context - prompt.value
    if max_new_tokens > left:
        option = f"set on_policy_max_new_tokens={left} at most, or " if left > 0 else ""
        raise ValueError(
            f"{name}: the prompt of sample {prompt.sample_id} has {prompt.value} tokens, and a response of "
            f"on_policy_max_new_tokens={max_new_tokens} would leave the context of the {whose} which is {context}; "
            f"{option}cut prompts with max_prompt_length"
        )


def check_eval_rows(rows: Any, model: nn.Module, teacher: Teacher | LikelyTokens | None) -> dict[str, RowsSummary]:
    """As `check_rows`, of evaluation rows or of a mapping from names to such."""
    if rows is None:
        return {}
    if not isinstance(rows, Mapping):
        return {"eval_dataset": check_rows(rows, "eval_dataset", model, teacher)}
    return {name: check_rows(each, f"eval_dataset[{name!r}]", model, teacher) for name, each in rows.items()}


def packs(args: POCLConfig, model: Any, teacher: Teacher | LikelyTokens | None) -> bool:
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
