"""Loading a causal language model from where it lies: a whole model, or a PEFT adapter with the base that it names.

Weights are read from safetensors only.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocl.models.adapters import check_adapters
from pocl.models.faults import check_loaded, naming_faults
from pocl.models.wrappers import peft_wrapper, text_config, unwrapped

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load_causal_lm(
    source: str | Path,
    *,
    trained: bool = False,
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model in evaluation mode, on the CPU.

    Args:
        source: folder or hub id of a model, or of a PEFT adapter (`adapter_config.json`), whose base is loaded too.
        trained: keep an adapter apart from its base, ready to be trained; otherwise it is merged, so that the model is
            an ordinary one and as fast.
        dtype: of the weights; `auto` is that of the files.
        revision: branch, tag or commit of a hub id; an adapter names that of its base itself.
        trust_remote_code: run model code that comes with the weights. Only for authors you trust.

    Returns:
        A `PreTrainedModel`; with `trained` and an adapter a `PeftModel`.

    Raises:
        ValueError: there is no such model, it is damaged, of another kind, or lacks weights; an adapter without
            safetensors, without a base that can be found, or of a kind that adds tokens (prompt tuning); PEFT is not
            installed.
        OSError: the hub cannot be reached.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    settings = adapter_settings(source, revision)
    if settings is None:
        found = {} if Path(source).is_dir() else {"revision": revision}
        return _load(source, options | found).eval()
    base = _base_of(source, settings)
    if not Path(base).is_dir():
        options["revision"] = settings.get("revision")
    model = _load(base, options)
    return _with_adapter(model, source, trained, revision).eval()


def _load(source: str | Path, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    with naming_faults(source):
        model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    check_loaded(source, info)
    return model


def load_tokenizer(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id; where an adapter comes without one, that of its base.

    Raises:
        ValueError: there is none, or it is damaged.
        OSError: the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    options = {} if Path(source).is_dir() else {"revision": revision}
    settings = adapter_settings(source, revision)
    if settings is not None and Path(source).is_dir() and not (Path(source) / "tokenizer_config.json").exists():
        source = _base_of(source, settings)
        options = {} if Path(source).is_dir() else {"revision": settings.get("revision")}
    with naming_faults(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def adapter_settings(source: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """What `adapter_config.json` of a folder or hub id says; None where there is none, as a whole model lies there."""
    if Path(source).is_dir():
        file: str | Path | None = Path(source) / _CONFIG
    else:
        from transformers.utils.peft_utils import find_adapter_config_file

        file = find_adapter_config_file(str(source), revision=revision)
    if file is None or not Path(file).exists():
        return None
    try:
        settings = json.loads(Path(file).read_text("utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{source}: its {_CONFIG} is no JSON object; save the adapter again with save_pretrained")
    return settings


def adapter_base(source: str | Path) -> str | None:
    """Folder or hub id of the base of a local adapter folder, None where the folder holds no adapter."""
    settings = adapter_settings(source) if Path(source).is_dir() else None
    return None if settings is None else _base_of(source, settings)


def with_merged_adapters(model: Any) -> Any:
    """An ordinary model with the weights that a PEFT model computes with; other models as they are.

    Raises:
        ValueError: an adapter that is not a change of weights.
    """
    wrapper = peft_wrapper(model)
    if wrapper is None:
        return model
    check_adapters(wrapper)
    try:
        return _merged(copy.deepcopy(wrapper))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"model: PEFT cannot merge its adapter into the weights ({error}); use an adapter that it can merge"
        ) from error


def _merged(wrapper: Any) -> Any:
    _untie(unwrapped(wrapper))
    merged = wrapper.merge_and_unload(safe_merge=True).requires_grad_(True)  # as of any model that was loaded
    if hasattr(merged, "peft_config"):  # PEFT may leave what it was adapted by
        del merged.peft_config
    return merged


def _untie(model: Any) -> None:
    """Where a tied head or embedding has an adapter, each gets a weight of its own: only one of them changes."""
    layers = [model.get_output_embeddings(), model.get_input_embeddings()]
    if not any(hasattr(layer, "get_base_layer") for layer in layers):
        return
    head, embedding = (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers)
    if head is not embedding and getattr(head, "weight", None) is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        for config in (model.config, text_config(model)):
            config.tie_word_embeddings = False


@contextlib.contextmanager
def of_peft() -> Iterator[None]:
    """PEFT warns of tied heads, which are handled here, and of a name that transformers has given up."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie.*", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def keep_base_apart(model: Any) -> Any:
    """Let a PEFT model save its adapters alone. PEFT adds embeddings and head, gigabytes, where one has an adapter,
    and asks the hub at every checkpoint whether they have grown."""
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    return model


def _base_of(source: str | Path, settings: dict[str, Any]) -> str:
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{source} holds a PEFT adapter that does not name its base model; write base_model_name_or_path, a folder "
            f"or a hub id, into its {_CONFIG}"
        )
    beside = Path(source) / base
    if not Path(base).is_dir() and beside.is_dir():  # written down relative to the adapter
        return str(beside)
    if not Path(base).is_dir() and (Path(base).is_absolute() or base.startswith(".")):
        raise ValueError(
            f"{source} holds a PEFT adapter of the model in {base}, and there is no such folder (in {Path.cwd()}); "
            f"put it there, or correct base_model_name_or_path in the adapter's {_CONFIG}"
        )
    return str(base)


def _with_adapter(model: nn.Module, source: str | Path, trained: bool, revision: str | None) -> Any:
    try:
        from peft import PeftModel
    except ModuleNotFoundError:
        raise ValueError(
            f"{source} holds a PEFT adapter, and PEFT is not installed; run `pip install 'pocl[lora]'`"
        ) from None
    options: dict[str, Any] = {}
    if not Path(source).is_dir():
        options["revision"] = revision
    elif not (Path(source) / _WEIGHTS).exists():
        raise ValueError(
            f"{source} holds a PEFT adapter without {_WEIGHTS}; pickled weights are not read: save it with "
            "save_pretrained(..., safe_serialization=True)"
        )
    grown = _make_room(model, source)
    with of_peft():
        adapted = PeftModel.from_pretrained(model, str(source), is_trainable=trained, **options)
    check_adapters(adapted)
    if trained:
        return adapted if grown else keep_base_apart(adapted)
    try:
        return _merged(adapted)
    except (AttributeError, NotImplementedError, RuntimeError):  # a kind that PEFT cannot merge runs as it is
        return adapted


def _make_room(model: Any, source: str | Path) -> bool:
    """Rows for the tokens that were added when the adapter was trained: its tokenizer lies beside it."""
    if not (Path(source) / "tokenizer_config.json").exists():
        return False
    from transformers import AutoTokenizer

    tokens = len(AutoTokenizer.from_pretrained(source))
    if tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokens)
        return True
    return False
