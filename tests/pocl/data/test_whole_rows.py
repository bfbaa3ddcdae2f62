"""Whole rows as Parquet: what comes back is what the rows held, or text that reads as the same rows."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from pocl.data import load_examples
from pocl.data.sources import Rows, open_rows
from pocl.data.whole_rows import write_whole_rows

USER = {"role": "user", "content": "w1"}
ANSWER = {"role": "assistant", "content": "w2"}


def written(rows: Rows, ids: list[int], folder: Path) -> list[dict[str, Any]]:
    assert write_whole_rows(rows, ids, folder / "rows.parquet") == []
    found: list[dict[str, Any]] = pq.read_table(folder / "rows.parquet").to_pylist()
    return found


@pytest.fixture
def mixed() -> list[dict[str, Any]]:
    """Rows over several batches with all that JSON can hold."""
    rows: list[dict[str, Any]] = []
    for i in range(2100):
        row = {"messages": [USER, ANSWER], "number": i, "half": i / 2, "flag": i % 2 == 0, "empty": {}, "nothing": None}
        row |= {
            "grade": "high" if i == 1500 else i,
            "either": 1 if i < 1200 else 0.5,
            "tags": [] if i < 1100 else ["a"],
        }
        row |= {
            "calls": [{"arguments": {f"key {i % 3}": i}}],
            "sizes": [{"x": 1 if i < 1000 else 0.5}],
            "large": 2**70 if i == 7 else i,
        }
        rows.append(row | ({"late": "x"} if i > 2000 else {}))
    return rows


@pytest.mark.parametrize("in_file", [False, True])
def test_columns_that_arrow_holds_as_they_are_keep_their_types(
    in_file: bool, mixed: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    rows = open_rows(tmp_path / "rows.jsonl" if in_file else mixed, "train")
    ids = [*range(0, 1000, 7), 1500, 2050, 2099]
    found = written(rows, ids, tmp_path)
    assert len(found) == len(ids)
    for row, number in zip(found, ids, strict=True):
        given = {"late": None, **mixed[number]}
        for name in ("messages", "number", "half", "flag", "nothing", "tags", "late"):
            assert row[name] == given[name]
        assert row["either"] == float(given["either"])
        assert row["grade"] == str(given["grade"])
        assert row["large"] == (str(2**70) if number == 7 else given["large"] if 7 not in ids else str(given["large"]))
        assert json.loads(row["calls"]) == given["calls"]
        assert row["sizes"] == json.dumps(given["sizes"])
        assert json.loads(row["empty"]) == {}


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f"}]}]}, {"messages": [USER, ANSWER], "tools": [{}]}],
        [{"messages": [USER, {**ANSWER, "tool_calls": [{"a": {"b": 1}}]}]}] + [{"messages": [USER, ANSWER]}] * 1500,
        [{"prompt": "a", "completion": {"b": 1}}, {"prompt": "c", "completion": 4}, {"prompt": 0, "completion": "x"}],
        [{"messages": [USER, {**ANSWER, "tool_calls": [{"a": {"b": None}}]}]}],
        [{"prompt": "a", "completion": {"b": 1}}] * 1000 + [{"prompt": "a", "completion": {"c": 1}}],
        [{"prompt": "a", "completion": 10**30}, {"prompt": "b", "completion": False}],
        [
            {"instruction": "a", "output": "b", "history": [["c", "d"]], "system": "e"},
            {"prompt": [USER], "completion": 1},
        ],
        [{"prompt": "a", "completion": "b", "chat_template_kwargs": {"x": True}}, {"prompt": "a", "completion": "c"}],
    ],
)
def test_whole_rows_are_read_as_the_rows_they_were(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    written(open_rows(rows, "train"), list(range(len(rows))), tmp_path)
    assert load_examples(tmp_path / "rows.parquet").to_list() == load_examples(rows).to_list()


def test_key_order_and_nulls_do_not_make_text_of_turns(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"content": "w1", "role": "user"}, ANSWER]},
        {"messages": [USER, {**ANSWER, "content": None}]},
    ]
    rows += [{"messages": []}]
    assert written(open_rows(rows, "train"), [0, 1, 2], tmp_path) == rows


def test_other_values_keep_arrows_types(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "day": datetime.date(2024, 5, 1)}]
    assert written(open_rows(rows, "train"), [0], tmp_path) == rows


def test_rows_of_a_table_keep_its_types(tmp_path: Path) -> None:
    table = Dataset.from_list([{"prompt": str(i), "deep": [{"x": i, "y": None}], "lost": {}} for i in range(5)])
    rows = open_rows(table, "train")
    assert write_whole_rows(rows, [4, 1], tmp_path / "rows.parquet") == ["lost"]
    stored = pq.read_table(tmp_path / "rows.parquet")
    assert stored["deep"].to_pylist() == [[{"x": 4, "y": None}], [{"x": 1, "y": None}]]
    assert pa.types.is_list(stored["deep"].type)
