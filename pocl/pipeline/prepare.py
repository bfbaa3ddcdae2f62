"""The steps before any training: models and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocl.data.corpus import is_corpus
from pocl.data.tables import arrow_column, values_of
from pocl.embedded import cut_layers, drop_layers, embedded_rows
from pocl.pipeline.context import SPLITS, Context, naming_folder, write_parquet
from pocl.pipeline.corpus import check_corpus, write_blocks
from pocl.pipeline.preflight import check_lengths
from pocl.pipeline.teacher import is_apart, teacher_engine
from pocl.recipe import Recipe
from pocl.run_folder import replacing
from pocl.split import hold_out

if TYPE_CHECKING:
    from datasets import Dataset

    from pocl.data.sources import Rows


def prepare_models(context: Context) -> Mapping[str, Any]:
    """Find the teacher, cut the student if there is none, and make sure that they speak the same tokens."""
    from pocl.models import check_vocabularies, view_of

    tokenizer = context.tokenizer()  # first, for it is small: a student that is not there is told at once
    recipe = context.recipe
    if is_apart(recipe):
        return _prepare_student(context)
    teacher = context.load_model(context.base_teacher_source(), recipe.teacher)
    if recipe.student.from_teacher:
        import torch

        section = recipe.student
        made = cut_layers(teacher, section.cut) if section.cut else drop_layers(teacher, section.drop or ())
        student = made.to(getattr(torch, section.dtype))
        student.save_pretrained(context.path / "student-initial")
        tokenizer.save_pretrained(context.path / "student-initial")
    else:
        student = context.load_student(context.student_source())
        check_vocabularies(tokenizer, teacher_tokenizer(context))
    of_student, of_teacher = view_of(student), view_of(teacher)
    check_vocabularies(of_student.head().vocab_size, of_teacher.head().vocab_size)
    further = tokens_of_student_alone(context)
    shared = max(index for index in tokenizer.get_vocab().values() if index not in further)
    largest = max([shared, *further])
    if shared >= of_teacher.vocabulary or largest >= of_student.vocabulary:
        role, view, index = (
            ("student", of_student, largest) if largest >= of_student.vocabulary else ("teacher", of_teacher, shared)
        )
        raise ValueError(
            f"tokenizer: it has token ids up to {index}, the {role} embeds {view.vocabulary}; take the tokenizer that "
            "the models were trained with, or resize their embeddings"
        )
    if further:
        shown = ", ".join(map(repr, list(further.values())[:3]))
        context.say(f"The student has {len(further)} tokens that the teacher lacks ({shown}); no sample may use them.")
    sizes = {"teacher": num_parameters(teacher), "student": num_parameters(student)}
    layers = f"{of_student.num_layers} of {of_teacher.num_layers} layers"
    return {
        "parameters": sizes,
        "teacher_source": context.base_teacher_source(),
        "note": f"Teacher {millions(sizes['teacher'])}, student {millions(sizes['student'])} parameters"
        + (f" ({layers})." if recipe.student.from_teacher else "."),
    }


def _prepare_student(context: Context) -> Mapping[str, Any]:
    """Find the student, and ask whoever runs the teacher whether it is there and speaks the same tokens."""
    from pocl.models import check_vocabularies, view_of

    recipe = context.recipe
    student = context.load_student(context.student_source())
    with teacher_engine(context) as engine:
        engine.fingerprint()
        if recipe.teacher.server is None:
            check_vocabularies(context.tokenizer(), teacher_tokenizer(context))
            check_vocabularies(view_of(student).head().vocab_size, engine.vocabulary)
    sizes = {"student": num_parameters(student)}
    where = recipe.teacher.server or "vLLM"
    return {
        "parameters": sizes,
        "teacher_source": context.base_teacher_source(),
        "note": f"Teacher {recipe.teacher.model} at {where}, student {millions(sizes['student'])} parameters.",
    }


def teacher_tokenizer(context: Context) -> Any:
    """The tokenizer that the teacher's weights were trained with, of the same revision."""
    from pocl.models import load_tokenizer

    source, section = context.base_teacher_source(), context.recipe.teacher
    with naming_folder(source):
        return load_tokenizer(source, revision=section.revision, trust_remote_code=section.trust_remote_code)


def tokens_of_student_alone(context: Context) -> dict[int, str]:
    """By id; none where the student is cut from the teacher, and none known where that is on a server."""
    from pocl.models import further_tokens

    if context.recipe.student.from_teacher or context.recipe.teacher.server is not None:
        return {}
    return further_tokens(context.tokenizer(), teacher_tokenizer(context))


def num_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())  # tied weights are one parameter, counted once


def millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def prepare_data(context: Context) -> Mapping[str, Any]:
    """Read, split and check the examples; those without a prompt or a response are dropped and counted."""
    from pocl.models import check_no_further_token

    counts: dict[str, int] = {}
    reports: dict[str, str] = {}
    source = read_source(context.recipe)
    # a ranking may do without a teacher
    further = tokens_of_student_alone(context) if "models" in context.summaries else {}
    for split, examples in split_examples(context.recipe, source, say=context.say).items():
        kept = examples
        if len(examples):
            report = context.store_rows(split, examples)
            check_no_further_token(context.rows(split), further)
            check_lengths(context, split, context.rows(split))
            reports[split] = str(report)
            context.say(f"{split}: {report}")
            if is_corpus(examples.column_names):
                counts[split] = write_blocks(context, split)
                continue
            made = np.isin(arrow_column(examples, "id"), arrow_column(context.rows(split), "sample_id"))
            kept = examples if made.all() else examples.select(np.flatnonzero(made))
        counts[split] = len(kept)
        write_parquet(kept, context.path / "data" / f"{split}.parquet")
        if split == "train":  # the same rows with all their columns, which the ranking carries on
            _write_source(context, source, arrow_column(kept, "id").to_pylist())
    stages = context.recipe.curriculum.num_stages
    if counts["train"] < stages:
        raise ValueError(
            f"{counts['train']} training samples cannot fill the {stages} stages of curriculum.num_stages: "
            "use fewer stages or more data"
        )
    note = ", ".join(f"{counts[split]} for {split}" for split in SPLITS)
    return {"counts": counts, "reports": reports, "note": f"{note}; equal prompts stay on one side."}


def _write_source(context: Context, source: Rows, ids: Sequence[int]) -> None:
    from pocl.data.whole_rows import write_whole_rows

    with replacing(context.path / "data" / "train-source.parquet") as path:
        missing = write_whole_rows(source, list(ids), str(path))
    if missing:
        context.say(f"train: the ranking goes without {', '.join(missing)}, empty dicts, which Parquet cannot hold")


def read_source(recipe: Recipe) -> Rows:
    """The rows of `data.source` as they are; opens files or the hub."""
    data = recipe.data
    return _open(data.source, data.split, data.trust_remote_code)


def split_examples(
    recipe: Recipe, source: Rows | None = None, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Dataset]:
    """The examples of train, validation and test, as the recipe's data section says; reads files or the hub.

    Args:
        recipe: what to do.
        source: what `read_source` gave; opened when left out.
        say: is told, for every source, which columns made the rows and which were left out.

    Returns:
        What `load_examples` gives. An `id` of `train` is a row of `source`.

    Raises:
        ValueError: unreadable or empty data (see `pocl.data.load_examples`), or nothing left to train on.
    """
    from pocl.data.reading import to_examples

    def read(name: str, rows: Rows, limit: int | None = None) -> Dataset:
        found, report = to_examples(rows, limit=limit)
        if is_corpus(found.column_names):
            check_corpus(recipe, rows.name)
        say(f"{name}: {report}")
        return found

    data = recipe.data
    whole = read("source", read_source(recipe) if source is None else source)
    named = {
        "validation": (data.validation, data.validation_split, data.num_validation),
        "test": (data.test, data.test_split, data.num_test),
    }
    held_out = {name: size for name, (source, _, size) in named.items() if source is None}
    texts = values_of(whole, "text" if is_corpus(whole.column_names) else "prompt")
    parts = hold_out(texts, list(held_out.values()), seed=recipe.seed)
    chosen = dict(zip(held_out, parts, strict=False))
    for name, part in chosen.items():
        if held_out[name] and not len(part):
            raise ValueError(
                f"data.num_{name} is {held_out[name]}, but no prompt of {len(whole)} samples has so few equals that it "
                f"could be held out; name other data in data.{name}, or set data.num_{name} to 0"
            )
    found = {"train": whole.select(np.sort(parts[-1][: data.num_train]))}
    for name, (other, split, size) in named.items():
        if other is None:
            found[name] = whole.select(chosen[name])
        elif size == 0:
            found[name] = whole.select([])
        else:
            found[name] = read(name, _open(other, split, data.trust_remote_code), size)
    return found


def _open(source: str, split: str, trust_remote_code: bool) -> Rows:
    from pocl.data.sources import open_rows

    own = embedded_rows(source)
    data: Any = source if own is None else own
    # A single file has one split, and `datasets` calls it train.
    split = "train" if Path(source).is_file() else split
    return open_rows(data, split, trust_remote_code=trust_remote_code)
