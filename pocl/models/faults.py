"""What is wrong with a folder or hub id from which a model or tokenizer cannot be loaded, in words."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@contextlib.contextmanager
def naming_faults(source: str | Path) -> Iterator[None]:
    """Errors of loading from `source` become ones that name it, say what is wrong with it, and what to do.

    Raises:
        ValueError: what is there is no model, no tokenizer, or damaged.
        OSError: the hub cannot be reached; as it came.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        unreachable = not Path(source).is_dir() and "couldn't connect" in said
        if unreachable or isinstance(error, MemoryError) or "out of memory" in said:
            raise
        raise ValueError(_fault(str(source), Path(source), error, said)) from error


def check_loaded(source: str | Path, info: Mapping[str, Any]) -> None:
    """Refuse a model of which some weights were not in its files: they are random.

    Args:
        source: folder or hub id.
        info: what `from_pretrained(..., output_loading_info=True)` gives beside the model.
    """
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights that its config.json asks for ({_some(missing)}), and "
            "random ones would be in their place; save the whole model, AutoModelForCausalLM with its head, with "
            "save_pretrained"
        )


def _fault(source: str, folder: Path, error: Exception, said: str) -> str:
    """What is wrong with a model or tokenizer that could not be loaded."""
    if "trust_remote_code" in said:
        return (
            f"{source} brings model code of its own, which runs only where its authors are trusted: "
            "set trust_remote_code to true if you do"
        )
    if "does not recognize this architecture" in said:
        return f"this release of transformers ({_transformers()}) does not know {source}: {_type(folder)}; upgrade it"
    if "Unrecognized configuration class" in said:
        return (
            f"{source} is no causal language model ({_type(folder)}); only decoders with a head for the next token can "
            "be distilled"
        )
    if folder.is_dir():
        fault = _fault_of_folder(folder, error, said)
        if fault:
            return fault
    elif isinstance(error, OSError):
        return (
            f"the hub gives no model {source!r}: {said[:300]}; check its name, and log in with `hf auth login` if it "
            "is gated"
        )
    return f"{source} cannot be loaded, {type(error).__name__}: {said[:300]}"


def _fault_of_folder(folder: Path, error: Exception, said: str) -> str | None:
    names = sorted(path.name for path in folder.iterdir())
    has = f"it has {_some(names)}" if names else "it is empty"
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file():
        return f"{folder} holds no model, for it has no config.json ({has}); give a folder that save_pretrained wrote"
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return f"{file} is damaged: it is no JSON; get it again"
    if "okenizer" in said:
        return (
            f"{folder} has no tokenizer ({has}); put the tokenizer.json and tokenizer_config.json of the model there, "
            "with tokenizer.save_pretrained"
        )
    if "model_type" in said:
        return f"{folder}/config.json names no model_type; give a folder that save_pretrained wrote"
    if type(error).__name__ == "SafetensorError":
        damaged = [file for file in weights if not _is_whole(file)]
        return "; ".join(map(_damage, damaged)) or None
    if "no file named" in said:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            return (
                f"{folder} has pickled weights only ({_some(pickled)}), which could run code when loaded; load the "
                "model where you trust it, and write it with save_pretrained, as safetensors"
            )
        return f"{folder} has no weights ({has}); give a folder with model.safetensors"
    if "ignore_mismatched_sizes" in said:
        return f"the weights in {folder} have other shapes than its config.json says; take both from one model"
    return None


def _damage(file: Path) -> str:
    with file.open("rb") as stream:
        begins = stream.read(40)
    if begins.startswith(b"version https://git-lfs"):
        return f"{file} is a Git LFS pointer in place of the weights; get them with `git lfs pull`"
    return f"{file} is damaged or cut off ({file.stat().st_size:,} bytes); get it again"


def _is_whole(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            return True
    except (SafetensorError, OSError):
        return False


def _type(folder: Path) -> str:
    try:
        return f"model_type {json.loads((folder / 'config.json').read_text(encoding='utf-8'))['model_type']}"
    except (OSError, ValueError, KeyError):
        return "an unknown model_type"


def _transformers() -> str:
    import transformers

    return str(transformers.__version__)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
