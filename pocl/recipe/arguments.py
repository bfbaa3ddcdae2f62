"""Names of transformers' TrainingArguments, which many know, and where a recipe has what they stand for."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

_HUB = "hub.repository and hub.private (the token comes from HF_TOKEN or `hf auth login`)"
# What the recipe decides already, and where; an empty place: the pipeline does.
DECIDED = {
    "output_dir": "output",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "learning_rate": "curriculum.learning_rate",
    "weight_decay": "training.weight_decay",
    "adam_beta2": "training.adam_beta2",
    "max_grad_norm": "training.max_grad_norm",
    "warmup_steps": "training.warmup_steps",
    "warmup_ratio": "training.warmup_steps, a number below 1",
    "train_sampling_strategy": "training.group_by_length",
    "group_by_length": "training.group_by_length",
    "lr_scheduler_type": "training.min_learning_rate_ratio, of a cosine",
    "lr_scheduler_kwargs": "training.min_learning_rate_ratio",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "save_every": "training.save_every",
    "save_steps": "training.save_every",
    "save_strategy": "training.save_every",
    "eval_strategy": "training.eval_every",
    "evaluation_strategy": "training.eval_every",
    "eval_steps": "training.eval_every",
    "logging_steps": "training.log_every",
    "logging_strategy": "training.log_every",
    "dataloader_num_workers": "training.dataloader_workers",
    "report_to": "training.report_to",
    "load_best_model_at_end": "curriculum.start",
    "metric_for_best_model": "training.metric",
    "greater_is_better": "training.metric",
    "num_train_epochs": "curriculum.epochs",
    "max_steps": "curriculum.max_steps",
    "seed": "training.seed",
    "gradient_checkpointing": "training.activation_checkpointing",
    "activation_checkpointing": "training.activation_checkpointing",
    "scale_by_temperature": "loss.scale_by_temperature",
    "on_policy": "on_policy.share",
    "on_policy_max_new_tokens": "on_policy.max_new_tokens",
    "on_policy_temperature": "on_policy.temperature",
    "on_policy_replay": "on_policy.replay",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "push_to_hub_model_id": _HUB,
    "push_to_hub_organization": _HUB,
    "push_to_hub_token": _HUB,
    "eval_on_start": "",
    "disable_tqdm": "",
}
OF_THE_PIPELINE = "a run is evaluated before its first step, and has bars of its own"


def place_of_argument(name: str) -> str | None:
    """What to write in place of a field of TrainingArguments; None where it is none."""
    if name in DECIDED:
        return f"set {DECIDED[name]}" if DECIDED[name] else OF_THE_PIPELINE
    return f"write it as training.extra: {{{name}: ...}}" if name in _field_names() else None


@functools.cache
def _field_names() -> frozenset[str]:
    """Read from the source, as importing transformers takes seconds and this is for an error message."""
    spec = importlib.util.find_spec("transformers")
    folder = next(iter((spec and spec.submodule_search_locations) or ()), "")
    file = Path(folder) / "training_args.py"
    if not file.is_file():
        return frozenset()
    classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    lines = [line for node in classes if node.name == "TrainingArguments" for line in node.body]
    return frozenset(
        line.target.id for line in lines if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    )
