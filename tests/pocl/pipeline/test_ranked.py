"""The ranked table: the rows of the data with all they hold, and what the ranking says of each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from pocl.data.whole_rows import storable
from pocl.pipeline import run
from pocl.pipeline.context import read_parquet, write_parquet
from pocl.pipeline.training import RANKING_COLUMNS, names_beside_ranking
from pocl.recipe import build_recipe


def conversation(number: int, row: dict[str, str]) -> dict[str, Any]:
    """A row with turns, columns of its own, and a column that the ranking has too."""
    turns = [("system", "w1"), ("user", row["instruction"]), ("assistant", "" if number == 3 else row["output"])]
    return {
        "id": f"row-{number}",
        "messages": [{"role": role, "content": text} for role, text in turns],
        "category": "even" if number % 2 == 0 else None,
        "rank": number + 0.5,
    }


def as_file(rows: list[dict[str, Any]], folder: Path) -> Path:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def as_several_files(rows: list[dict[str, Any]], folder: Path) -> Path:
    (folder / "data").mkdir()
    for part, start in enumerate(range(0, len(rows), 10)):
        Dataset.from_list(rows[start : start + 10]).to_parquet(folder / "data" / f"train-{part}-of-5.parquet")
    return folder / "data"


def as_splits_on_disk(rows: list[dict[str, Any]], folder: Path) -> Path:
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(folder / "data")
    return folder / "data"


@pytest.fixture
def rank(tmp_path: Path, tiny_model_folder: Path) -> Callable[..., dict[str, list[Any]]]:
    """A function: rank a source in two parts and return the columns of the table."""

    def work(source: Path) -> dict[str, list[Any]]:
        data = {"source": str(source), "template": "plain", "max_length": 64, "max_prompt_length": 32}
        values = {
            "output": str(tmp_path / "run"),
            "student": str(tiny_model_folder),
            "data": data | {"num_validation": 4, "num_test": 6},
            "ranking": {"max_new_tokens": 4},
            "curriculum": {"num_stages": 2},
        }
        run(build_recipe(values), until="ranking")
        return read_parquet(tmp_path / "run" / "ranking" / "ranked.parquet").to_dict()

    return work


@pytest.mark.parametrize("save", [as_file, as_several_files, as_splits_on_disk])
def test_ranked_rows_are_the_rows_of_the_data_whole(
    save: Callable[..., Path],
    rank: Callable[..., dict[str, list[Any]]],
    tmp_path: Path,
    tiny_pairs: list[dict[str, str]],
) -> None:
    rows = [conversation(number, row) for number, row in enumerate(tiny_pairs)]
    ranked = rank(save(rows, tmp_path))
    count = len(ranked["sample_id"])
    assert 48 - 4 - 6 - 1 <= count <= 48 - 4 - 6
    assert 3 not in ranked["sample_id"]  # it has no answer
    for i, number in enumerate(ranked["sample_id"]):
        assert ranked["messages"][i] == rows[number]["messages"]
        assert ranked["messages"][i][-1] == {"role": "assistant", "content": tiny_pairs[number]["output"]}
        own = {name: ranked[name][i] for name in ("id", "category", "source_rank")}
        assert list(own.values()) == [rows[number][name] for name in ("id", "category", "rank")]
    assert sorted(ranked["rank"]) == list(range(1, count + 1))
    assert set(ranked) - {"id", "messages", "category", "source_rank"} <= RANKING_COLUMNS | {
        "rank_rouge_l",
        "rank_cross_entropy",
    }


def test_a_ranked_table_can_be_ranked_again(
    rank: Callable[..., dict[str, list[Any]]], tmp_path: Path, tiny_pairs: list[dict[str, str]]
) -> None:
    write_parquet(
        Dataset.from_list([{**row, "rank": 1, "source_rank": 2} for row in tiny_pairs]), tmp_path / "a.parquet"
    )
    ranked = rank(tmp_path / "a.parquet")
    assert set(ranked["source_source_rank"]) == {1}
    assert set(ranked["source_rank"]) == {2}


def test_columns_of_the_data_never_take_a_name_of_the_rankings() -> None:
    columns = ["prompt", "response", "subset", "source_subset", "rank_bm25", "student_response"]
    assert list(names_beside_ranking(columns).values()) == [
        "prompt",
        "response",
        "source_source_subset",
        "source_subset",
        "source_rank_bm25",
        "source_student_response",
    ]


def test_columns_that_parquet_has_no_form_for_are_left_out(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "a", "extra": {}, "deep": [{"x": {}, "y": 1}], "nothing": None, "l": []}])
    kept = storable(rows)
    assert kept.column_names == ["prompt", "nothing", "l"]
    write_parquet(kept, tmp_path / "kept.parquet")
