"""Low-rank adapters (LoRA, by PEFT) on a model that is loaded: made, checked before, and merged afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocl.models.loading import adapter_settings, keep_base_apart, load_causal_lm, load_tokenizer, of_peft
from pocl.models.wrappers import unwrapped
from pocl.modes import follow_umask

ALL_LINEAR = "all-linear"  # every linear layer but the head, in PEFT's words
INSTALL = "pip install 'pocl[lora]'"


def check_peft() -> None:
    """Raise a ValueError that names the command where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(f"lora needs the package peft, which is not installed: run `{INSTALL}`") from None


def add_lora(
    model: Any,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = (ALL_LINEAR,),
    rank_stabilized: bool = False,
    dora: bool = False,
    seed: int = 0,
    revision: str | None = None,
) -> Any:
    """The model with new adapters that leave it unchanged until they are trained; all else of it is frozen.

    Args:
        model: a `PreTrainedModel`, changed in place.
        r, alpha, dropout: rank, scale (times 1 / r) and dropout of the adapters.
        targets: ends of module names, or `all-linear`.
        rank_stabilized: scale by 1 / sqrt(r).
        dora: weight-decomposed adapters.
        seed: of the half of each adapter that begins at random.
        revision: of the model, where it is of the hub; the adapter names it with its base.

    Returns:
        A `PeftModel`. What it saves names the model's folder, absolute, or its hub id.

    Raises:
        ValueError: PEFT is not installed, or see `adapted_modules`.
    """
    check_peft()
    from peft import LoraConfig, get_peft_model

    adapted_modules(model, targets, dropout)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # whole in files, as PEFT writes it
        lora_dropout=dropout,
        target_modules=ALL_LINEAR
        if ALL_LINEAR in targets and len(targets) == 1
        else _without_shorthand(model, targets),
        use_rslora=rank_stabilized,
        use_dora=dora,
    )
    with torch.random.fork_rng(), of_peft():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    made = adapted.peft_config["default"]
    base = Path(str(made.base_model_name_or_path))
    made.base_model_name_or_path = str(base.absolute()) if base.is_dir() else made.base_model_name_or_path
    made.revision = None if base.is_dir() else revision
    return keep_base_apart(adapted)


def adapted_modules(model: Any, targets: Sequence[str], dropout: float = 0.0) -> dict[str, nn.Module]:
    """By name, the modules of a model that adapters with these `targets` would be put on; no weight is read.

    Raises:
        ValueError: a target that no linear layer and no embedding is called by; says what there is. Or the head with a
            dropout.
    """
    able = {name: module for name, module in model.named_modules() if _can_be_adapted(module)}
    head = _name_of(able, model.get_output_embeddings())
    embedding = _name_of(able, model.get_input_embeddings())
    found: dict[str, nn.Module] = {}
    for target in targets:
        if target == ALL_LINEAR:
            chosen = {name: m for name, m in able.items() if name != head and not isinstance(m, nn.Embedding)}
        else:
            chosen = {name: m for name, m in able.items() if name == target or name.endswith(f".{target}")}
        if not chosen:
            leaves = sorted({name.rpartition(".")[2] for name in able if name not in (head, embedding)})
            ends = [name.rpartition(".")[2] for name in (head, embedding) if name]
            raise ValueError(
                f"lora.targets: {unwrapped(model).__class__.__name__} has no layer called {target!r} that could be "
                f"adapted; it has {', '.join(leaves)}, the head and embedding {', '.join(ends)}, and {ALL_LINEAR} for "
                "all but these"
            )
        found |= chosen
    if dropout and head in found:
        raise ValueError(
            f"lora.dropout = {dropout:g} with {head} among lora.targets: the loss sees a head as one weight, which has "
            f"no dropout; set it to 0, or leave {head} out"
        )
    return found


def num_lora_parameters(model: Any, targets: Sequence[str], r: int) -> int:
    """How many numbers adapters of rank `r` have."""
    shapes: list[Any] = [module.weight.shape for module in adapted_modules(model, targets).values()]
    return sum(r * (rows + columns) for rows, columns in shapes)


def _can_be_adapted(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"


def _name_of(modules: dict[str, nn.Module], module: Any) -> str:
    return next((name for name, each in modules.items() if each is module), "")


def _without_shorthand(model: Any, targets: Sequence[str]) -> list[str]:
    """`all-linear` among other names is spelled out, as PEFT takes it alone."""
    if ALL_LINEAR in targets:
        return list(adapted_modules(model, targets))
    return list(targets)


def merge_folder(
    source: str | Path,
    target: Path,
    *,
    dtype: Any = "auto",
    trust_remote_code: bool = False,
    finishing: Callable[[Path], None] | None = None,
) -> None:
    """Write the model that an adapter makes of its base, an ordinary one, with its tokenizer; whole or not at all.

    Args:
        source: folder of a PEFT adapter.
        target: folder to write, which must not be there.
        dtype: of the weights; that of the base when left out.
        trust_remote_code: run model code that comes with the base.
        finishing: is given the folder before it takes its place, to add to it.

    Raises:
        ValueError: no adapter lies in `source`, it cannot be merged, or `target` is there.
    """
    if adapter_settings(source) is None:
        raise ValueError(f"{source} holds no adapter (no adapter_config.json), so there is nothing to merge")
    if target.exists():
        raise ValueError(f"{target} is there already; name another folder with --output, or move it away")
    model = load_causal_lm(source, dtype=dtype, trust_remote_code=trust_remote_code)
    if hasattr(model, "peft_config"):
        raise ValueError(f"{source}: PEFT cannot merge this kind of adapter into the weights; use it as it is")
    scratch = target.with_name(f".{target.name}-merging")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    load_tokenizer(source, trust_remote_code=trust_remote_code).save_pretrained(scratch)
    ends = Path(source) / "generation_config.json"
    if ends.is_file():  # of the student: all tokens that it was taught to end with
        _take_ends(ends, scratch / ends.name)
    if finishing:
        finishing(scratch)
    follow_umask(scratch)
    scratch.rename(target)


def _take_ends(source: Path, target: Path) -> None:
    config = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    config |= {"eos_token_id": json.loads(source.read_text(encoding="utf-8")).get("eos_token_id")}
    target.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
