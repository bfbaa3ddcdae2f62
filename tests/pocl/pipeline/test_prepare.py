"""Reading and splitting data as the recipe says."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pocl.pipeline.context import Context, read_parquet, source_fingerprint, write_parquet
from pocl.pipeline.prepare import prepare_models, split_examples, teacher_tokenizer
from pocl.recipe import build_recipe


def write_pairs(path: Path, count: int, mark: str = "") -> Path:
    rows = ({"prompt": f"{mark}question {i}", "completion": f"answer {i}"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def split(data: dict[str, object]) -> dict[str, list[str]]:
    made = split_examples(build_recipe({"student": {"cut": 2}, "data": data}))
    return {name: list(part["prompt"]) for name, part in made.items()}


def test_held_out_parts_come_from_the_source_where_no_other_is_named(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", 40)
    parts = split({"source": str(source), "num_validation": 5, "num_test": 7, "num_train": 20})
    assert {name: len(part) for name, part in parts.items()} == {"train": 20, "validation": 5, "test": 7}
    assert len({prompt for part in parts.values() for prompt in part}) == 32


def test_the_held_out_parts_do_not_depend_on_how_much_is_trained_on(tmp_path: Path) -> None:
    data = {"source": str(write_pairs(tmp_path / "pairs.jsonl", 40)), "num_validation": 5, "num_test": 7}
    few, many = split({**data, "num_train": 8}), split(data)
    assert few["test"] == many["test"]
    assert few["validation"] == many["validation"]
    assert set(few["train"]) < set(many["train"])


def test_named_parts_are_read_whole_and_the_source_is_left_whole(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", 10)
    test = write_pairs(tmp_path / "test.jsonl", 9, "other ")
    parts = split({"source": str(source), "test": str(test), "num_test": 4, "num_validation": 2})
    assert parts["test"] == [f"other question {i}" for i in range(4)]
    assert len(parts["train"]) == 8


def test_no_validation_gives_an_empty_part(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", 10)
    values = {"source": str(source), "num_validation": 0, "num_test": 2}
    recipe = build_recipe({"student": {"cut": 2}, "data": values, "curriculum": {"start": "last"}})
    parts = split_examples(recipe)
    assert len(parts["validation"]) == 0
    write_parquet(parts["validation"], tmp_path / "empty.parquet")
    assert read_parquet(tmp_path / "empty.parquet").column_names == parts["validation"].column_names


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="has columns prompt; needed are"):
        split({"source": str(tmp_path / "pairs.jsonl")})


def test_the_data_step_says_which_columns_made_the_rows_and_which_did_not(tmp_path: Path) -> None:
    rows = [{"instruction": f"a {i}", "output": "b", "category": "c"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"source": str(tmp_path / "rows.jsonl"), "num_validation": 2, "num_test": 2}
    said: list[str] = []
    split_examples(build_recipe({"student": {"cut": 2}, "data": values}), say=said.append)
    assert said == ["source: rows made of instruction, output; left out: category"]


def test_equal_prompts_that_leave_nothing_to_hold_out_are_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 64)
    with pytest.raises(ValueError, match="data.num_validation is 4, but no prompt of 64 samples has so few equals"):
        split({"source": str(tmp_path / "rows.jsonl"), "num_validation": 4, "num_test": 4})


def test_fingerprints_of_sources_follow_content_version_or_name(tmp_path: Path) -> None:
    first, second = write_pairs(tmp_path / "a.jsonl", 3), write_pairs(tmp_path / "b.jsonl", 3)
    assert source_fingerprint(str(first)) == source_fingerprint(str(second))
    write_pairs(second, 4)
    assert source_fingerprint(str(first)) != source_fingerprint(str(second))
    assert source_fingerprint("org/model", "v1") == "org/model@v1"
    assert "chatterbot-corpus" in source_fingerprint("embedded")


def test_the_teachers_tokenizer_is_of_the_revision_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name, **kw: asked.append((name, kw)))
    for teacher in ({"model": "some/teacher", "revision": "abc"}, {"model": str(tmp_path), "revision": "abc"}):
        recipe = build_recipe({"student": "some/student", "teacher": teacher})
        teacher_tokenizer(Context(recipe, tmp_path, Console()))
    assert asked == [
        ("some/teacher", {"revision": "abc", "trust_remote_code": False}),
        (str(tmp_path), {"trust_remote_code": False}),
    ]


def test_a_tokenizer_with_more_ids_than_the_models_embed_is_refused(tmp_path: Path, tiny_teacher_folder: Path) -> None:
    values = {"student": {"cut": 1}, "teacher": str(tiny_teacher_folder), "output": str(tmp_path)}
    context = Context(build_recipe(values), tmp_path, Console(quiet=True))
    prepare_models(context)
    context.tokenizer().add_tokens([f"new{i}" for i in range(2000)])
    with pytest.raises(ValueError, match="token ids up to"):
        prepare_models(context)
