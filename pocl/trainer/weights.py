"""The student's weights as a folder that `from_pretrained` reads, whatever engine trained them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers.utils import logging

from pocl.modes import follow_umask


def save_weights(trainer: Any, folder: Path) -> None:
    """Write the student and its tokenizer; called on every process, as sharded weights are gathered.

    Args:
        trainer: the Trainer that holds the student.
        folder: made if missing.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        model.save_pretrained(folder, state_dict=state)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        follow_umask(folder)


def name_ends(folder: Path, ends: Sequence[int]) -> None:
    """Let the generation config of a saved student name all tokens that it was taught to end an answer with.

    A student that was a base model names its EOS alone, and would go on after the token that closes a turn.
    """
    file = folder / "generation_config.json"
    # as text: transformers refuses to save again what it finds fault with, such as a temperature without sampling
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = config.get("eos_token_id")
    if sorted(ends) != sorted([named] if isinstance(named, int) else named or []):
        config["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def no_saving_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every checkpoint across the bar of the stage."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_weights(model: Any, folder: Path) -> None:
    """Put weights from `save_weights` or from a checkpoint into a model that no engine has wrapped yet.

    Raises:
        ValueError: the folder holds no weights, or weights of another model.
    """
    if hasattr(model, "get_base_model") and (folder / "adapter_config.json").exists():
        model.load_adapter(str(folder), model.active_adapters[0], is_trainable=True)
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no weights in {folder}; remove its folder to train the stage again")
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = set(missing) - set(getattr(model, "_tied_weights_keys", None) or ())
    if missing or unexpected:
        raise ValueError(
            f"{folder} holds weights of another model (missing {sorted(missing)[:3]}, surplus {sorted(unexpected)[:3]})"
            "; use the student that the run began with"
        )
