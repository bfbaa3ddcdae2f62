"""What would end a run, and what it would do to its folder: looked at without writing, fetching or loading weights."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl.pipeline.context import Context, naming_folder, source_fingerprint
from pocl.pipeline.disk import check_disk, existing_parent, size_in_words
from pocl.pipeline.engine import Step, fingerprints
from pocl.pipeline.estimate import Lengths, lengths_of
from pocl.recipe import Recipe
from pocl.run_folder import MANIFEST, RunFolder

if TYPE_CHECKING:
    from datasets import Dataset

    from pocl.recipe.models import StudentSection, TeacherSection

SAMPLES = 1_000  # looked at


@dataclass
class Findings:
    """What a look at a run found."""

    problems: list[str] = field(default_factory=list)
    """What would end the run, in words."""
    unknown: list[str] = field(default_factory=list)
    """What could not be looked at, as it is not on this machine."""
    steps: dict[str, str] = field(default_factory=dict)
    """By name of a step: `to do`, `done`, `goes on`, or what is deleted before it is done again."""
    disk: dict[str, int] | None = None
    """Bytes that models and checkpoints need; None where the models are not on this machine."""
    cache: str = ""
    """What the teacher's cache takes, about, and what is lost; empty where there is none."""

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        from pocl.errors import in_words

        try:
            yield
        except LookupError as error:
            self.unknown.append(str(error.args[0] if error.args else error))
        except ValueError as error:
            self._say(self.problems, str(error))
        except OSError as error:
            said = in_words(error)
            hub = isinstance(error, ConnectionError) or "hub cannot be reached" in said or "couldn't connect" in said
            self._say(self.unknown if hub else self.problems, said)

    @staticmethod
    def _say(what: list[str], text: str) -> None:
        if text not in what:
            what.append(text)


def look(
    recipe: Recipe, steps: Sequence[Step], examples: Dataset | None, *, change: bool = False
) -> tuple[Findings, Lengths | None]:
    """Look at settings, models, rows, folder and disk; call it where the hub's libraries are offline.

    Returns:
        What was found, and how long rows are; None where the tokenizer or the data is not on this machine.

    Args:
        recipe: what is asked for.
        steps: those that would be done.
        examples: of training, None where they could not be read.
        change: whether a folder of another recipe is accepted.
    """
    from pocl.pipeline.guess import check_student
    from pocl.pipeline.hub import check_hub
    from pocl.pipeline.preflight import check_settings
    from pocl.pipeline.run import check_precision

    found, lengths = Findings(), None
    names = [step.name for step in steps]
    with found.collecting():
        check_precision(recipe)
    with found.collecting():
        check_settings(recipe, names)
    if "models" in names:
        with found.collecting():
            check_student(recipe)
    if "upload" in names:
        with found.collecting():
            check_hub(recipe)
    with found.collecting():
        lengths = _check_models(recipe, names, examples, found)
    with found.collecting():
        _look_at_folder(recipe, steps, found, change)
    pending = [name for name in names if found.steps.get(name) != "done"]
    with found.collecting():
        found.disk = check_disk(recipe, pending)
    return found, lengths


def _check_models(recipe: Recipe, names: Sequence[str], examples: Dataset | None, found: Findings) -> Lengths | None:
    """Tokenizers, weights as far as their headers go, and the lengths of some rows.

    Raises:
        LookupError: a model is not on this machine.
    """
    from rich.console import Console

    from pocl.data.corpus import is_corpus
    from pocl.engines.vllm import vllm_python
    from pocl.models import check_vocabularies
    from pocl.pipeline.guess import hidden_size
    from pocl.pipeline.preflight import check_lengths
    from pocl.pipeline.prepare import teacher_tokenizer
    from pocl.pipeline.teacher import cache_in_words
    from pocl.teacher.store import keyed

    context = Context(recipe, Path(recipe.output), Console(quiet=True))
    asked: list[tuple[TeacherSection | StudentSection, Callable[[], str]]] = []
    here = recipe.teacher.server is None
    if "models" in names:
        context.summaries["models"] = {}
        asked += [(recipe.teacher, context.base_teacher_source)] if here else []
        if "vllm" in (recipe.teacher.engine, recipe.student.engine):
            vllm_python()
    if recipe.student.model:
        asked.append((recipe.student, context.student_source))
    for section, source in asked:
        _refuse_unmade(section)
        _check_weights(source(), section)
    tokenizer = context.tokenizer()
    if "models" in names and recipe.student.model and here:
        check_vocabularies(tokenizer, teacher_tokenizer(context))
    if examples is None or not len(examples):
        return None
    started = time.perf_counter()
    rows = context.tokenize(examples.select(range(min(len(examples), SAMPLES))))
    seconds = time.perf_counter() - started
    check_lengths(context, "train", rows)
    if "teacher-cache" in names and not is_corpus(examples.column_names):
        some = sum(count for _, count, _ in keyed(rows))
        found.cache = cache_in_words(recipe, some * len(examples) // max(len(rows), 1), hidden_size(recipe))
    return lengths_of(rows, seconds)


def _refuse_unmade(section: TeacherSection | StudentSection) -> None:
    """What is made at the first use is not made for a look."""
    from pocl.embedded import EMBEDDED, teacher_folder
    from pocl.pipeline.made import folder_of, recipe_of

    def not_now(text: str) -> None:
        raise LookupError(f"the embedded teacher is not unpacked yet: {text}")

    if section.model == EMBEDDED:
        teacher_folder(on_convert=not_now)
    elif section.model and recipe_of(section.model) is not None and not Path(str(folder_of(section.model))).is_dir():
        raise LookupError(f"{section.model} is made at its first use")


def _check_weights(source: str, section: TeacherSection | StudentSection) -> None:
    from transformers import AutoConfig

    from pocl.models.faults import naming_faults
    from pocl.models.loading import adapter_base

    with naming_folder(source):
        folder = adapter_base(source) or source
        with naming_faults(folder):
            options = {} if Path(folder).is_dir() else {"revision": section.revision}
            AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code, **options)
            if Path(folder).is_dir():
                _open_weights(Path(folder))


def _open_weights(folder: Path) -> None:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError("no file named model.safetensors")
    for file in files:
        with safe_open(file, framework="numpy"):
            pass


def _look_at_folder(recipe: Recipe, steps: Sequence[Step], found: Findings, change: bool) -> None:
    from pocl.run_lock import in_use_by

    path = Path(recipe.output)
    found.steps |= {step.name: "to do" for step in steps}
    parent = existing_parent(path)
    if not parent.is_dir():
        raise ValueError(f"output: {parent} is a file, and a folder is needed; choose another with --output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"output: nothing can be written in {parent}; choose another folder with --output")
    if user := in_use_by(path):
        found.problems.append(user)
    folder = RunFolder(path, change=change)
    if (path / MANIFEST).is_file():
        _say_what_is_done(path, folder, steps, found)
    folder.check(recipe.model_dump(mode="json"))


def _say_what_is_done(path: Path, folder: RunFolder, steps: Sequence[Step], found: Findings) -> None:
    marks = fingerprints(steps)
    for step in steps:
        record, mark = folder.record(step.name), marks[step.name]
        if folder.is_finished(step.name, mark):
            found.steps[step.name] = "done"
            continue
        lie_there = [path / name for name in step.outputs if (path / name).exists()]
        if not lie_there:
            continue
        if record.get("fingerprint") == mark:
            found.steps[step.name] = "goes on"
            continue
        listing = ", ".join(f"{place} ({size_in_words(_size(place))})" for place in lie_there)
        found.steps[step.name] = f"deletes {listing}"


def _size(place: Path) -> int:
    files: list[Any] = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def content_of(recipe: Recipe) -> Callable[..., str]:
    """What stands for the content of models and data: read only where there is a run to compare with."""
    there = (Path(recipe.output) / MANIFEST).is_file()
    return source_fingerprint if there else lambda *_: ""
