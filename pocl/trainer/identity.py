"""What makes two runs the same run: everything that changes the weights in the end, in a form that `run.json` holds.

The number of processes, padding or packing, accumulation against batch size, and where things lie do not belong to it:
they leave the result alone but for rounding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from pocl import heads
from pocl.data import Collator
from pocl.data.token_rows import RowsSummary
from pocl.models.fingerprint import arithmetic_settings, model_fingerprint, weights_fingerprint
from pocl.run_folder import in_short
from pocl.teacher import HiddenStateCache, OnlineTeacher, TopKCache
from pocl.trainer.loading import PackedCollator

_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",  # of transformers before 5
    "optim",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "tf32",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "scale_by_temperature",
    "on_policy",
)
_OF_ON_POLICY = ("on_policy_max_new_tokens", "on_policy_temperature", "on_policy_replay")
# Where evaluations choose weights or end a stage.
_OF_CHOICE = (
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "save_strategy",
    "save_steps",
)
_NO_ADAPTER_SETTINGS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")

_WORDS = {
    "student.weights": "student: other weights at the start (a student that is made at random needs a seed)",
    "teacher.weights": "teacher: other weights or another configuration",
    "subsets": "subsets: the rows are dealt to them in another way",
}
_OF_ROWS = {"sample_ids": "sample_ids, or in another order", "tokens": "texts or another tokenizer", "labels": "labels"}

# Models that a run in this process has trained: its folder, the fingerprint it left them with, what it began with.
_LEFT: WeakKeyDictionary[nn.Module, tuple[Path, str, dict[str, Any]]] = WeakKeyDictionary()


def run_identity(trainer: Any, student: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values, as `json` reads them back.

    Args:
        trainer: a POCLTrainer.
        student: what `student_identity` gave.
    """
    args, curriculum = trainer.args, trainer.curriculum
    chooses = args.load_best_model_at_end or curriculum.patience is not None
    names = [*_ARGUMENTS, *(_OF_ON_POLICY if args.on_policy else ())]
    names += _OF_CHOICE if chooses else ("save_strategy", "save_steps") if curriculum.optimizer == "carried" else ()
    arguments = {name: getattr(args, name) for name in names if hasattr(args, name)}
    cls_and_kwargs = getattr(trainer, "optimizer_cls_and_kwargs", None)
    if cls_and_kwargs is not None:
        arguments["optimizer_cls_and_kwargs"] = [cls_and_kwargs[0].__qualname__, repr(cls_and_kwargs[1])]
    if not isinstance(trainer.data_collator, Collator | PackedCollator):
        arguments["data_collator"] = type(trainer.data_collator).__qualname__
    subsets = hashlib.blake2b(repr(trainer.subsets).encode(), digest_size=8).hexdigest()
    identity = {
        "student": student,
        "teacher": teacher_identity(trainer),
        "train_dataset": _rows(trainer.rows_summary),
        "subsets": subsets,
        "eval_dataset": {name: _rows(each) for name, each in trainer.eval_summaries.items()} if chooses else None,
        "curriculum": dataclasses.asdict(curriculum),
        "divergence": [repr(divergence) for divergence in trainer.divergences],
        "batch_size": trainer.batch_size,
        "rerank": trainer.rerank is not None,
        **arguments,
    }
    return _plain(identity)


def _rows(summary: RowsSummary) -> dict[str, Any]:
    return {"rows": summary.count, "sample_ids": summary.order, "tokens": summary.tokens, "labels": summary.labels}


def student_identity(model: nn.Module, folder: Path) -> dict[str, Any]:
    """What stands for the student that a run in `folder` begins with.

    A student that a run in the same folder has left behind in this process, untouched since, is the one that run began
    with: it goes on from the folder, whatever the model holds.
    """
    left = _LEFT.get(model)
    weights = _weights(model)
    if left is not None and left[:2] == (folder.absolute(), weights):
        return left[2]
    inner = heads.unwrapped(model)
    adapters = getattr(model, "peft_config", None) or {}
    return _plain(
        {
            "class": type(inner).__name__,
            "parameters": sum(p.numel() for p in inner.parameters()),
            "trained_parameters": sum(p.numel() for p in inner.parameters() if p.requires_grad),
            "weights": weights,
            "config": arithmetic_settings(inner),
            "adapters": {
                name: {k: v for k, v in config.to_dict().items() if k not in _NO_ADAPTER_SETTINGS}
                for name, config in adapters.items()
            },
        }
    )


def forget(model: nn.Module) -> None:
    """Take a model for a student of its own, whatever trained it."""
    _LEFT.pop(model, None)


def leave(model: nn.Module, folder: Path, identity: dict[str, Any]) -> None:
    """Note that a run in `folder` ends here, with what it began with."""
    _LEFT[model] = (folder.absolute(), _weights(model), identity)


def _weights(model: nn.Module) -> str:
    """Without the half of a LoRA pair that does nothing yet, which is random in every process."""
    inner = heads.unwrapped(model)
    state = inner.state_dict()
    idle = [
        name
        for name in state
        for mine, other in (("lora_A", "lora_B"), ("lora_embedding_B", "lora_embedding_A"))
        if mine in name and not state.get(name.replace(mine, other), state[name]).any()
    ]
    return weights_fingerprint(inner, skip=idle)


def teacher_identity(trainer: Any) -> dict[str, Any] | None:
    """A stored teacher is the one that it was stored of, in the type it was stored in."""
    teacher = trainer.teacher
    if teacher is None or all(stage.kd_ratio == 0 for stage in trainer.curriculum.stages):
        return None
    if isinstance(teacher, TopKCache):
        kept = {"vocabulary": teacher.vocabulary, "top_k": teacher.top_k, "tail": teacher.tail}
        return {**kept, "weights": teacher.index["teacher"][:32]}
    head = teacher.head.weight
    if isinstance(teacher, HiddenStateCache):
        weights, dtype = teacher.index["teacher"], teacher.dtype
    elif isinstance(teacher, OnlineTeacher):
        weights, dtype = model_fingerprint(teacher.model), head.dtype
    else:
        weights = hashlib.blake2b(repr((type(teacher).__qualname__, head.double().sum().item())).encode()).hexdigest()
        dtype = head.dtype
    return {"vocabulary": head.shape[0], "hidden_size": head.shape[1], "dtype": str(dtype), "weights": weights[:32]}


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """In words, what differs between the run of a folder and this one; empty where nothing does."""
    return [_in_words(*leaf) for leaf in _leaves(found, wanted)]


def _in_words(name: str, before: Any, now: Any) -> str:
    where, _, what = name.rpartition(".")
    if where.startswith(("train_dataset", "eval_dataset")) and what in _OF_ROWS:
        return f"{where.removesuffix('.eval_dataset')}: other {_OF_ROWS[what]}"
    return _WORDS.get(name) or f"{name}: {in_short(before)} there, {in_short(now)} now"


def _leaves(found: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        found, wanted = ({str(i): value for i, value in enumerate(values)} for values in (found, wanted))
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        # another release of transformers knows other fields of a configuration
        keys = found.keys() & wanted.keys() if name == "student.config" else found.keys() | wanted.keys()
        for key in sorted(keys):
            yield from _leaves(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
    elif found != wanted:
        yield name, found, wanted


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As `json` writes and reads them; sets in order, enumerations as their values, anything else as its text."""

    def other(value: Any) -> Any:
        return sorted(value, key=str) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))

    plain: dict[str, Any] = json.loads(json.dumps(values, default=other))
    return plain
