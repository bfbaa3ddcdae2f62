"""What the steps of a run share: the recipe, the folder, and models and tables loaded when a step asks for them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl.data.corpus import is_corpus
from pocl.data.tables import write_parquet_table
from pocl.digests import content_fingerprint
from pocl.embedded import (
    EMBEDDED,
    EMBEDDED_CORPUS,
    EMBEDDED_TEXT,
    embedded_versions,
    reference_texts,
    teacher_folder,
)
from pocl.pipeline.made import folder_of, recipe_mark, recipe_of
from pocl.recipe import Recipe
from pocl.recipe.models import StudentSection, TeacherSection
from pocl.run_folder import fingerprint, replacing

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from rich.console import Console

SPLITS = ("train", "validation", "test")


class Context:
    """One run in progress.

    Attributes:
        recipe: what to do.
        path: the run folder.
        console: where to tell the user.
        summaries: the summary of every step finished so far.
    """

    def __init__(self, recipe: Recipe, path: Path, console: Console) -> None:
        self.recipe = recipe
        self.path = path
        self.console = console
        self.summaries: dict[str, Mapping[str, Any]] = {}
        self._loaded: dict[str, Any] = {}

    def release(self) -> None:
        """Forget loaded models and tables, so that a step's memory ends with it."""
        self._loaded.clear()

    def say(self, text: str) -> None:
        """One line below the running step's headline."""
        self.console.print(f"      {text}", highlight=False, soft_wrap=True)

    # --------------------------------------------------------------------------------------------------------- models

    def base_teacher_source(self) -> str:
        """Hub id or folder of the teacher before it is adapted; the embedded one is converted on first use."""
        model = self.recipe.teacher.model
        return str(teacher_folder(on_convert=self.say)) if model == EMBEDDED else str(folder_of(model) or model)

    def teacher_source(self) -> str:
        """Hub id or folder of the teacher that is learned from."""
        adapted = self.recipe.teacher.adapt_epochs > 0
        return str(self.path / "adapted-teacher" / "teacher") if adapted else self.base_teacher_source()

    def student_source(self) -> str:
        """Hub id or folder of the student before any training."""
        model = self.recipe.student.model
        return str(folder_of(model) or model) if model else str(self.path / "student-initial")

    def warm_student_source(self) -> str:
        """The student that is ranked with and that the curriculum starts from."""
        return str(self.path / "warmup" / "student") if self.recipe.warmup.epochs else self.student_source()

    def teacher(self) -> Any:
        """The teacher, in eval mode, on the device."""
        return self._load("teacher", lambda: self.load_model(self.teacher_source(), self.recipe.teacher))

    def tokenizer(self) -> Any:
        """The student's tokenizer (the teacher's where the student is cut from it); has a padding token."""
        return self._load("tokenizer", self._load_tokenizer)

    def load_model(self, source: str, section: TeacherSection | StudentSection, *, trained: bool = False) -> Any:
        """A causal language model with the options of its section of the recipe, in eval mode, on the device."""
        import torch

        from pocl.models import load_causal_lm

        with naming_folder(source):
            model = load_causal_lm(
                source,
                trained=trained,
                dtype=getattr(torch, section.dtype),
                revision=section.revision,
                trust_remote_code=section.trust_remote_code,
            )
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def load_student(self, source: str, *, trained: bool = False) -> Any:
        """The student of a folder; where it is a PEFT adapter, merged unless it is to be trained.

        To be trained, it has the adapters that the recipe asks for, new ones where it comes without.
        """
        from pocl.pipeline.lora import with_lora

        student = self.recipe.student
        model = self.load_model(source, student, trained=trained)
        if trained and student.lora and not hasattr(model, "peft_config"):
            return with_lora(model, student.lora, seed=self.recipe.seed, revision=student.revision)
        return model

    def _load_tokenizer(self) -> Any:
        from pocl.models import load_tokenizer

        student = self.recipe.student
        source = self.student_source() if student.model else self.base_teacher_source()
        section: TeacherSection | StudentSection = student if student.model else self.recipe.teacher
        with naming_folder(source):
            tokenizer = load_tokenizer(source, revision=section.revision, trust_remote_code=section.trust_remote_code)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    # --------------------------------------------------------------------------------------------------------- tables

    def examples(self, split: str) -> Dataset:
        """Prompts and responses of `train`, `validation` or `test`; may be empty but for `train`."""
        return self._load(f"examples-{split}", lambda: read_parquet(self.path / "data" / f"{split}.parquet"))

    def has_rows(self, split: str) -> bool:
        """Whether `train`, `validation` or `test` holds any sample."""
        return self._rows_path(split).is_file()

    def store_rows(self, split: str, examples: Dataset) -> Any:
        """Make the token rows of a split, for all steps, processes and later launches; returns what became of them."""
        labels = self.recipe.data.labels
        report = self._write_rows(self._rows_path(split), examples, labels)
        if labels != "last" and not is_corpus(examples.column_names):
            self._write_rows(self._judged_path(split), examples, "last")
        return report

    def _write_rows(self, path: Path, examples: Dataset, labels: str) -> Any:
        from pocl.data.encoding import RowMaker
        from pocl.data.rows import write_rows

        data = self.recipe.data
        options: dict[str, Any] = {"labels": labels, "blocks": data.blocks, "workers": data.workers}
        maker = RowMaker(examples, self.tokenizer(), **options, **self.text_options())
        write_rows(path, maker.schema, maker.batches())
        return maker.report()

    def rows(self, split: str) -> Dataset:
        """The token rows that `train`, `validation` or `test` is learnt from (`pocl.data.tokenize`), memory-mapped."""
        from pocl.data.rows import map_rows

        return self._load(f"rows-{split}", lambda: map_rows(self._rows_path(split)))

    def judged_rows(self, split: str) -> Dataset:
        """The token rows that ranking and evaluation judge: the last answers, beside each the text of its `reference`.

        Those of a corpus are the blocks that are learnt, without references.
        """
        from datasets import concatenate_datasets

        from pocl.data.rows import map_rows

        rows = self.rows(split)
        if is_corpus(rows.column_names):
            return rows
        rows = map_rows(self._judged_path(split)) if self._judged_path(split).is_file() else rows
        answers = read_parquet(self.path / "data" / f"{split}.parquet", columns=["response"])
        return concatenate_datasets([rows, answers.rename_column("response", "reference")], axis=1)

    def is_corpus(self) -> bool:
        """Whether the run learns texts, without questions and answers."""
        return is_corpus(self.rows("train").column_names)

    def tokenize(self, examples: Dataset) -> Dataset:
        """The token rows of other examples."""
        from pocl.data import tokenize

        data = self.recipe.data
        options: dict[str, Any] = {"labels": data.labels, "blocks": data.blocks, "workers": data.workers}
        return tokenize(examples, self.tokenizer(), progress=False, **options, **self.text_options())[0]

    def _rows_path(self, split: str) -> Path:
        return self.path / "data" / f"rows-{split}.arrow"

    def _judged_path(self, split: str) -> Path:
        return self.path / "data" / f"judged-{split}.arrow"

    def text_options(self) -> dict[str, Any]:
        """How examples become tokens, as keyword arguments that `tokenize`, `score` and `evaluate` share."""
        data = self.recipe.data
        return {
            "template": data.template,
            "max_length": data.max_length,
            "max_prompt_length": data.max_prompt_length,
            "template_kwargs": data.template_kwargs,
            "special_tokens": data.special_tokens,
        }

    def template_name(self) -> str:
        """The template with all that decides what it makes of a conversation; what a teacher's cache is known by."""
        data = self.recipe.data
        usual = {"labels": "last", "template_kwargs": {}, "special_tokens": "text"}
        chosen = {name: value for name, was in usual.items() if (value := getattr(data, name)) != was}
        return f"{data.template} {json.dumps(chosen, sort_keys=True)}" if chosen else data.template

    def _load(self, key: str, make: Any) -> Any:
        if key not in self._loaded:
            self._loaded[key] = make()
        return self._loaded[key]


@contextlib.contextmanager
def naming_folder(source: str) -> Iterator[None]:
    """Loading a model that is neither in a folder nor to be had from the hub ends in an error that says both."""
    missing = (
        f"there is no folder {source!r} here (in {Path.cwd()}); "
        "give the folder of a model, or a hub id such as gpt2 or Qwen/Qwen2.5-0.5B"
    )
    if not Path(source).is_dir() and (source.startswith((".", "~")) or Path(source).is_absolute()):  # never a hub id
        raise ValueError(missing)
    try:
        yield
    except OSError as error:
        if Path(source).is_dir() or "couldn't connect" not in str(error):
            raise
        raise OSError(f"the hub cannot be reached, and {missing}") from error


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Dataset:
    """A table, or some of its columns, in memory; nothing is copied to the cache that `datasets` keeps."""
    import pyarrow.parquet

    stat = path.stat()
    mark = fingerprint([str(path.absolute()), stat.st_size, stat.st_mtime_ns, columns])
    return in_memory(pyarrow.parquet.read_table(path, columns=columns), mark)


def in_memory(table: pa.Table, mark: str) -> Dataset:
    """An Arrow table as a `Dataset`. `mark` stands for its content; without one `datasets` would pickle every value."""
    from datasets import Dataset

    return Dataset(table, fingerprint=mark)


def write_parquet(table: Dataset, path: Path) -> None:
    """Write a table, whole or not at all."""
    with replacing(path) as temporary:
        write_parquet_table(table, temporary)


def source_fingerprint(source: str, revision: str | None = None) -> str:
    """What stands for the content of a model or data set: package versions, file contents, or hub id and revision."""
    if source == EMBEDDED_CORPUS:
        return f"Python's reference {fingerprint(reference_texts())}"
    if source in (EMBEDDED, EMBEDDED_TEXT):
        return " ".join(f"{wheel} {version}" for wheel, version in embedded_versions(source).items())
    if (recipe := recipe_of(source)) is not None:
        return f"{source} {recipe_mark(recipe)}"  # known before the model is made
    path = Path(source)
    if not path.exists():
        return f"{source}@{revision or 'main'}"
    if not (path / "adapter_config.json").exists():
        return content_fingerprint(path)
    from pocl.models import adapter_base

    return f"{content_fingerprint(path)} on {source_fingerprint(str(adapter_base(path)))}"
