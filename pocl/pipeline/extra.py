"""`training.extra`: further fields of transformers' TrainingArguments, checked by name and by type."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

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
    "train_sampling_strategy": "training.group_by_length",
    "lr_scheduler_type": "training.min_learning_rate_ratio, of a cosine",
    "lr_scheduler_kwargs": "training.min_learning_rate_ratio",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "save_every": "training.save_every",
    "save_steps": "training.save_every",
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
    "eval_strategy": "",
    "eval_steps": "",
    "eval_on_start": "",
    "save_strategy": "",
    "disable_tqdm": "",
}


def check_extra(extra: Mapping[str, Any]) -> None:
    """Refuses names that `POCLConfig` lacks or the recipe sets elsewhere, and values of another type.

    Raises:
        ValueError: names the field, and what to write.
    """
    if not extra:
        return
    from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

    from pocl.trainer import POCLConfig

    known = {field.name for field in dataclasses.fields(POCLConfig) if field.init}
    hints = typing.get_type_hints(POCLConfig)
    for name, value in extra.items():
        if name in DECIDED:
            place = DECIDED[name]
            advice = f"set {place}" if place else "evaluations and checkpoints come at every epoch's end"
            raise ValueError(f"training.extra: {name} is decided by the recipe already; {advice}")
        if name not in known:
            nearest = difflib.get_close_matches(name, known - set(DECIDED), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"training.extra: transformers' TrainingArguments have no field {name}{hint}")
        try:
            TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            said = error.errors()[0]["msg"].replace("Input should be", "must be")
            raise ValueError(f"training.extra: {name} {said}, got {value!r}") from None
        except PydanticSchemaGenerationError:  # a type of transformers' own, which judges it itself
            continue
