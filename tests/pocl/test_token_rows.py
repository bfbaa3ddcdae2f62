"""What a look at every token row finds, in a list and in a data set alike, and what it refuses."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pocl.data import Collator
from pocl.data.token_rows import Extreme, summarize
from pocl.trainer.loading import PackedCollator

datasets = pytest.importorskip("datasets")

ROWS = [
    {"sample_id": 7, "input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"sample_id": 3, "input_ids": [9, 4], "labels": [9, 4]},
    {"sample_id": 4, "input_ids": [2, 11, 3, 1, 2], "labels": [-100] * 5},
]


def test_a_summary_names_the_extreme_samples_and_counts_what_is_predicted() -> None:
    summary = summarize(ROWS)
    assert (summary.count, summary.num_labels) == (3, 3)  # the first token of a row is never predicted
    assert summary.longest == Extreme(5, 4)
    assert summary.longest_prompt == Extreme(2, 7)
    assert summary.largest_id == Extreme(11, 4)


@pytest.mark.parametrize("columns", [{}, {"extra": "text"}, {"attention_mask": None}])
def test_lists_data_sets_selections_and_tensors_of_the_same_rows_have_the_same_summary(columns: dict[str, Any]) -> None:
    rows = [
        row | ({"attention_mask": [1] * len(row["input_ids"])} if "attention_mask" in columns else columns)
        for row in ROWS
    ]
    expected = summarize(ROWS)
    table = datasets.Dataset.from_list(rows)
    shuffled = datasets.Dataset.from_list(rows[::-1]).select([2, 1, 0])
    tensors = [
        {n: torch.tensor(v) if isinstance(v, list) else np.int32(v) if n == "sample_id" else v for n, v in row.items()}
        for row in rows
    ]
    for same in (rows, table, shuffled, table.with_format("torch"), tensors):
        assert summarize(same) == expected
    made = table.with_transform(lambda batch: batch)  # rows are what the transform gives, not what the table holds
    assert summarize(made) == expected


def test_every_part_of_the_content_has_a_hash_of_its_own() -> None:
    before = summarize(ROWS)
    for column, part in (("sample_id", "order"), ("input_ids", "tokens"), ("labels", "labels")):
        rows: Any = copy.deepcopy(ROWS)
        if column == "sample_id":
            rows[1][column] = 30
        else:
            rows[1][column][1] = 6
        after = summarize(rows)
        differing = {n for n in ("order", "tokens", "labels") if getattr(before, n) != getattr(after, n)}
        assert differing == {part}
    moved = [
        ROWS[0],
        {**ROWS[1], "input_ids": [9], "labels": [9]},
        {**ROWS[2], "input_ids": [4, *ROWS[2]["input_ids"]]},
    ]
    moved[2]["labels"] = [4] + [-100] * 5
    assert summarize(moved).tokens != before.tokens  # the same tokens, cut at another place


def broken(change: dict[str, Any]) -> list[dict[str, Any]]:
    return [ROWS[0], {n: v for n, v in {**ROWS[1], **change}.items() if v is not ...}]


WRONG = {
    "no tokens": ({"input_ids": [], "labels": []}, r"row 1 \(sample_id 3\) has no tokens; leave it out"),
    "a label too few": ({"labels": [9]}, "has 2 input_ids and 1 labels; give one label a token"),
    "padding": ({"attention_mask": [1, 0]}, "attention_mask of 2 with 1 zeros; give rows without padding"),
    "a mask of another length": ({"attention_mask": [1]}, "attention_mask of 1 with 0 zeros"),
    "a negative id": ({"input_ids": [9, -1]}, r"token ids -1 to 9 and labels down to 4"),
    "a negative label": ({"labels": [9, -1]}, "only the label -100 is"),
    "no whole numbers": ({"input_ids": [9, 4.5]}, r"input_ids must be a list of integers, got \[9.*4\.5\]"),
    "null": ({"labels": None}, "labels must be a list of integers, got None"),
    "a text": ({"input_ids": "ab"}, "input_ids must be a list of integers, got ab"),
    "nested": ({"input_ids": [[9, 4]], "labels": [[9, 4]]}, "must be a list of integers"),
    "a name for a number": ({"sample_id": "third"}, "sample_id of row 1 is 'third'; it must be a number"),
    "no labels": ({"labels": ...}, r"lacks labels \(it has sample_id, input_ids\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_is_wrong_is_named_in_a_list_and_in_a_table(name: str) -> None:
    change, message = WRONG[name]
    rows = broken(change)
    with pytest.raises(ValueError, match=message):
        summarize(rows)
    with pytest.raises(ValueError, match=message.replace("row 1", "row 0")):  # alone, as a column has one type
        summarize(datasets.Dataset.from_list(rows[1:]))


@pytest.mark.parametrize("collate", [Collator(0), PackedCollator()], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["no tokens", "a label too few", "padding", "a mask of another length", "no labels"])
def test_padded_or_packed_a_wrong_row_is_refused_in_the_same_words(name: str, collate: Callable[..., Any]) -> None:
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        collate(broken(change))
    with pytest.raises(ValueError, match="rows is empty"):
        collate([])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((row for row in ROWS), "train must be a list of token rows .* got a generator; .*list\\(train\\)"),
        ({"train": ROWS, "test": ROWS}, r"train is a dict of train, test; pass one of them, train\[...\]"),
        ([], "train has no rows"),
        (None, "got a NoneType"),
        ("train.jsonl", "got a str"),
        ([[1, 2]], "row 0 is a list; a row is a dict with sample_id, input_ids, labels"),
    ],
    ids=["stream", "splits", "empty", "nothing", "path", "bare ids"],
)
def test_what_is_no_list_of_token_rows_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarize(rows, "train")


def test_labels_that_were_shifted_already_are_recognised() -> None:
    ids = list(range(3, 30))
    shifted = [{"sample_id": 0, "input_ids": ids, "labels": [-100] * 9 + ids[10:] + [-100]}]
    with pytest.raises(ValueError, match="labels are those of the next token, shifted already"):
        summarize(shifted)
    one_token = [5] * 20  # equals its successor, and is right
    assert summarize([{"sample_id": 0, "input_ids": one_token, "labels": one_token}]).num_labels == 19
