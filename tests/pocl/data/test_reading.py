"""Where rows come from: files of every type, folders, tables, lists and streams give the same examples."""

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl.data import conversation_of, load_examples
from pocl.data.reading import to_examples
from pocl.data.sources import open_rows
from pocl.data.whole_rows import write_whole_rows


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def csv_text(rows: list[dict[str, str]]) -> str:
    return "\n".join([",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)])


def arrow_file(rows: list[dict[str, str]], path: Path) -> None:
    table = Dataset.from_list(rows).data.table
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[list[dict[str, str]], Path], object]] = {
    "pairs.jsonl": lambda rows, path: path.write_text(lines(rows)),
    "pairs.jsonl.gz": lambda rows, path: path.write_bytes(gzip.compress(lines(rows).encode())),
    "pairs.jsonl.zst": lambda rows, path: path.write_bytes(zstd(lines(rows).encode())),
    "array.json": lambda rows, path: path.write_text(json.dumps(rows)),
    "array.jsonl": lambda rows, path: path.write_text(json.dumps(rows)),
    "indented.json": lambda rows, path: path.write_text("\n" + json.dumps(rows, indent=2)),
    "indented-objects.json": lambda rows, path: path.write_text("\n".join(json.dumps(r, indent=1) for r in rows)),
    "blank-lines.jsonl": lambda rows, path: path.write_text(lines(rows).replace("\n", "\r\n\r\n")),
    "bom.jsonl": lambda rows, path: path.write_bytes(b"\xef\xbb\xbf" + lines(rows).encode()),
    "pairs.csv": lambda rows, path: path.write_text(csv_text(rows)),
    "pairs.csv.gz": lambda rows, path: path.write_bytes(gzip.compress(csv_text(rows).encode())),
    "pairs.parquet": lambda rows, path: Dataset.from_list(rows).to_parquet(path),
    "pairs.arrow": arrow_file,
    "saved": lambda rows, path: Dataset.from_list(rows).save_to_disk(path),
    "folder/train.jsonl": lambda rows, path: path.write_text(lines(rows)),
    "folder/train.jsonl.zst": lambda rows, path: path.write_bytes(zstd(lines(rows).encode())),
    "folder/train.parquet": lambda rows, path: Dataset.from_list(rows).to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_type_of_file_gives_the_rows_of_the_list_also_as_a_stream(
    name: str, tmp_path: Path, tiny_pairs: list[dict[str, str]]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    WRITERS[name](tiny_pairs, path)
    source = path.parent if name.startswith("folder") else path
    whole = load_examples(tiny_pairs).to_list()
    assert [row["id"] for row in whole] == list(range(48))
    assert [row["response"] for row in whole] == [row["output"] for row in tiny_pairs]
    assert load_examples(source).to_list() == whole
    stream = load_examples(source, limit=9, streaming=True)
    assert list(stream) == list(stream) == load_examples(str(source), limit=9).to_list() == whole[:9]


def test_tables_lists_and_mappings_of_splits_give_the_same(tiny_pairs: list[dict[str, str]]) -> None:
    whole = load_examples(tiny_pairs).to_list()
    table = Dataset.from_list(tiny_pairs)
    for source in (table, table.with_format("numpy"), table.to_iterable_dataset(), iter(tiny_pairs)):
        assert load_examples(source).to_list() == whole
    assert load_examples({"train": table, "test": table}, split="test").to_list() == whole
    assert list(load_examples(tiny_pairs, streaming=True)) == whole


@pytest.mark.parametrize("in_memory", [0, 60_000, 1 << 30])
def test_examples_are_the_same_in_memory_and_in_a_file(
    in_memory: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pocl.data.reading._IN_MEMORY", in_memory)
    rows = [{"prompt": f"question {i}", "completion": "é" * (i % 7)} for i in range(2500)]
    found = load_examples(rows)
    assert bool(found.cache_files) == (in_memory < 1 << 30)
    assert found["id"][:] == list(range(2500))
    assert found["response"][:] == [row["completion"] for row in rows]
    assert found.select([2499, 3])["prompt"][:] == ["question 2499", "question 3"]


def test_text_files_are_corpora_of_a_document_a_line(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("one line\n\n  \nanother\u2028line\r\n")
    (tmp_path / "corpus.jsonl").write_text(lines([{"text": "one line"}, {"text": "another\u2028line"}]))
    for name in ("corpus.txt", "corpus.jsonl"):
        rows = load_examples(tmp_path / name).to_list()
        assert rows == [
            {"id": 0, "prompt": "", "response": "", "text": "one line"},
            {"id": 1, "prompt": "", "response": "", "text": "another\u2028line"},
        ]


# ------------------------------------------------------------------------------------------ what Arrow would change


CALLS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}
    for call in (
        {"function": {"name": "f", "arguments": {"city": "Rome", "deep": [{"x": None}]}}},
        {"function": {"name": "g", "arguments": {"day": 3}}},
        {"function": {"name": "g", "arguments": {"day": "three"}}},
    )
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("in_file", [False, True])
def test_tool_calls_keep_their_own_arguments_and_types(in_file: bool, streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "calls.jsonl").write_text(lines(CALLS))
    rows = load_examples(tmp_path / "calls.jsonl" if in_file else CALLS, streaming=streaming)
    for row, source in zip(rows, CALLS, strict=True):
        calls = conversation_of(row).turns[-1]["tool_calls"]
        assert calls == source["messages"][-1]["tool_calls"]
        assert json.loads(row["response"]) == calls[0]


def test_keys_that_arrow_fills_with_null_are_left_out() -> None:
    table = Dataset.from_list([{"messages": row["messages"]} for row in CALLS[:2]])
    for row, source in zip(load_examples(table), CALLS, strict=False):
        (call,) = conversation_of(row).turns[-1]["tool_calls"]
        expected = {"city": "Rome", "deep": [{}]} if call["function"]["name"] == "f" else {"day": 3}
        assert call["function"]["arguments"] == expected
        assert set(conversation_of(row).turns[0]) == set(source["messages"][0])


def test_dates_stay_the_text_that_they_are_and_numbers_stay_unquoted(tmp_path: Path) -> None:
    answers = ["2024-05-01 00:00:00", "2024-05-01", 4, 0, -1.5, False, "007", [1, "a"], {"b": None}, 10**30]
    rows = [{"prompt": "q", "completion": answer} for answer in answers]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    expected = ["2024-05-01 00:00:00", "2024-05-01", "4", "0", "-1.5", "False", "007", '[1, "a"]', '{"b": null}']
    assert load_examples(tmp_path / "a.jsonl")["response"][:] == [*expected, "1" + "0" * 30]
    assert load_examples(rows)["response"][:] == [*expected, "1" + "0" * 30]
    (tmp_path / "a.csv").write_text("prompt,completion\nq,007\nq,1.50\nq,NA\nq,true\nq,\n")
    assert load_examples(tmp_path / "a.csv")["response"][:] == ["007", "1.50", "NA", "true", ""]


def test_a_column_may_be_null_or_absent_for_ten_megabytes(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"instruction": "q" * 900, "input": None, "output": "a" * 100}] * 12_000
    rows.append({"instruction": "q", "input": "late", "output": "a", "system": "later"})
    (tmp_path / "late.jsonl").write_text(lines(rows))
    for source in (tmp_path / "late.jsonl", rows):
        last = load_examples(source)[12_000]
        assert (last["prompt"], last["response"]) == ("later\n\nq\n\nlate", "a")


def test_names_of_classes_are_read_and_not_their_numbers() -> None:
    from datasets import ClassLabel

    features = Features({"prompt": Value("string"), "completion": ClassLabel(names=["no", "yes"])})
    table = Dataset.from_list([{"prompt": "a", "completion": 1}, {"prompt": "b", "completion": None}], features)
    assert load_examples(table)["response"][:] == ["yes", ""]


def test_half_a_character_is_refused_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "\\ud83d", "completion": "b"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: it holds half a character \('\\ud83d'\)"):
        load_examples(tmp_path / "a.jsonl")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALL = st.fixed_dictionaries({"name": st.text(), "arguments": st.dictionaries(st.text(max_size=3), JSON, max_size=3)})
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.none() | st.text()},
    optional={"tool_calls": st.lists(CALL, max_size=2), "name": st.text(), "reasoning_content": st.none() | st.text()},
)
ROW = st.one_of(
    st.fixed_dictionaries({"prompt": st.text(), "completion": JSON}, optional={"other": JSON}),
    st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4)}, optional={"tools": st.lists(CALL, max_size=2)}),
    st.fixed_dictionaries({"instruction": st.text(), "output": JSON}, optional={"system": st.none() | st.text()}),
)


@settings(max_examples=40)
@given(rows=st.lists(ROW, min_size=1, max_size=4))
def test_any_rows_are_read_from_a_list_as_from_a_file(rows: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "a.jsonl").write_text(lines(rows), encoding="utf-8")
        (path / "a.json").write_text(json.dumps(rows, indent=2))
        found = [load_examples(source).to_list() for source in (rows, path / "a.jsonl", path / "a.json")]
        assert found[0] == found[1] == found[2]
        write_whole_rows(open_rows(rows, "train"), list(range(len(rows))), path / "a.parquet")
        assert load_examples(Dataset(pq.read_table(path / "a.parquet"))).to_list() == found[0]
    for row, given_row in zip(found[0], rows, strict=True):
        if row["response"] and "messages" in given_row:
            kept = conversation_of(row).turns
            for turn, given_turn in zip(kept, given_row["messages"], strict=False):
                assert turn.get("tool_calls") == (given_turn.get("tool_calls") or None)


# ------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([{"question": "a", "answer": "b"}], {}, "columns question, answer; needed .* Rename `question` to `prompt`"),
        ("./no-such-file.jsonl", {}, "does not exist"),
        ("no-such-file.jsonl.zst", {}, "does not exist"),
        ([{"prompt": "a", "completion": "b"}], {"limit": 0}, "limit must be at least 1, got 0"),
        ([], {}, "no examples in list"),
        ([{"prompt": "a"}], {}, "list has columns prompt; needed are `messages`"),
        ([{"prompt": None, "completion": "a"}, "text"], {}, "list, row 2: it is str, and a row must be a dict"),
        ({"prompt": ["a"], "completion": ["b"]}, {}, r"a dict of columns; .*Dataset.from_dict\(source\)"),
        (pandas.DataFrame({"prompt": ["a"]}), {}, r"source is a DataFrame; .*Dataset.from_pandas\(frame\)"),
        (3, {}, "source is a int; give a hub id"),
        ("./data/*.jsonl", {}, "does not exist; .* a pattern is not followed, name the folder"),
        ({"train": [{"prompt": "a"}]}, {"split": "dev"}, "split 'dev' is not in the mapping; it has train"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_unreadable_sources_say_what_is_wrong(
    source: Any, options: dict[str, Any], message: str, streaming: bool
) -> None:
    with pytest.raises(ValueError, match=message):
        list(load_examples(source, streaming=streaming, **options))


def test_a_file_of_unknown_type_names_the_readable_types(tmp_path: Path) -> None:
    for name in ("pairs.xlsx", "pairs.parquet.gz", "pairs"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match=r"readable types: .jsonl"):
            load_examples(tmp_path / name)


_LINE = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a.jsonl is empty \(0 bytes\)"),
        ("a.parquet", "", r"a.parquet is empty \(0 bytes\)"),
        ("a.jsonl", "\n  \n", r"no examples in .*a.jsonl"),
        (
            "a.jsonl",
            _LINE * 9 + _LINE[:25],
            "a.jsonl cannot be read: line 10 is no JSON, or was cut off .*column.*mend",
        ),
        ("a.jsonl", _LINE + "\n" + "{bad\n" + _LINE, "a.jsonl cannot be read: line 3 is no JSON"),
        ("a.jsonl", _LINE[:15], "line 1 is no JSON"),
        ("a.jsonl", '{"prompt": ' + "[" * 99_999 + "]" * 99_999 + "}\n", "line 1 is nested too deeply"),
        ("a.jsonl", '{"prompt": ' + "9" * 9_999 + "}\n", "line 1 holds a number of more digits than Python reads"),
        ("folder/notes.md", "x", "folder holds no file that can be read; readable types: .jsonl"),
        ("a.jsonl", _LINE + "1\n", "line 2 is a number, not an object; write one object a line"),
        ("a.jsonl", _LINE + '{"a": 1}, {"b": 2}\n', "line 2 is no JSON"),
        ("a.jsonl", '"a"\n"b"\n', "line 1 is a string, not an object"),
        ("a.json", f"[{_LINE}, 3]", "element 2 is a number, not an object"),
        ("a.json", f"[\n{_LINE},\n" + "{bad}]", "line 4 is no JSON"),
        ("a.json", f"[{_LINE},{_LINE}", "the array that begins in line 1 has no end; the file was cut off"),
        ("a.json", f"[{_LINE}]\n{_LINE}", "something stands behind the end of the array, in line 3"),
        ("a.json", '{\n "prompt": "a",\n "completion": "b"\n', "line 1 is no JSON, or was cut off"),
        ("a.json", json.dumps({"data": [{"prompt": "a"}]}), "lie inside `data`: write that list alone into the file"),
        ("a.csv", "prompt,completion\na,b\nc,d,e,f\n", "line 3 has 4 values, and the header names 2 columns"),
        ("a.csv", "prompt,completion\na,b\nc\n", "line 3 has 1 values"),
        ("a.csv", 'prompt,completion\na,b\n"c,d\ne,f\n', "line 3 is no CSV, or a quotation mark is missing"),
        ("a.csv", "prompt,prompt\na,b\n", "the header names 'prompt' more than once"),
        ("a.csv", "prompt;completion\na;b\n", "with commas between the columns"),
        ("folder/train.jsonl", _LINE[:25], "train.jsonl cannot be read: line 1 is no JSON"),
        ("folder/train.jsonl", "", "train.jsonl is empty"),
        ("a.jsonl", _LINE.encode() + '{"prompt": "é"}\n'.encode("latin-1"), "line 2 is not UTF-8 .byte 0xe9.*LATIN1"),
        ("a.csv", "prompt,completion\né,b\n".encode("latin-1"), "line 2 is not UTF-8 .*iconv -f LATIN1 -t UTF-8"),
        ("a.txt", "a\né\n".encode("latin-1"), "line 2 is not UTF-8"),
        ("a.jsonl", _LINE.encode("utf-16"), "UTF-16.*iconv -f UTF-16 -t UTF-8"),
        ("a.csv", "prompt,completion\n".encode("utf-16-le"), "UTF-16"),
        ("a.jsonl.gz", gzip.compress(_LINE.encode() * 99, mtime=0)[:40], "compressed data is damaged or cut off"),
        ("a.jsonl.gz", _LINE, "compressed data is damaged or cut off"),
        ("a.jsonl.zst", zstd(_LINE.encode() * 999)[:30], "compressed data is damaged or cut off"),
        ("a.parquet", "no table", "a.parquet cannot be read: .*magic bytes"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(
    name: str, content: str | bytes, message: str, streaming: bool, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    source = tmp_path / name if "/" not in name else tmp_path / "folder"
    with pytest.raises(ValueError, match=message):
        list(load_examples(source, streaming=streaming))


def test_damage_far_into_a_file_is_named_by_its_line(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a", "completion": "é" * 400}, ensure_ascii=False) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 6000 + "{bad}\n" + line)
    (tmp_path / "a.json").write_text("[" + line + ("," + line) * 5999 + ",{bad}]")
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(ValueError, match="line 6001 is no JSON"):
            load_examples(tmp_path / name)
    (tmp_path / "a.jsonl").write_bytes((line * 6000).encode() + b'{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match="line 6001 is not UTF-8"):
        load_examples(tmp_path / "a.jsonl")


def test_a_value_of_many_blocks_is_read_whole(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "ab\n" * 1_500_000}, {"prompt": "b", "completion": "c"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert load_examples(tmp_path / "a.json")["response"][:] == [row["completion"] for row in rows]


def test_a_disk_without_room_for_the_loader_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.exceptions import DatasetGenerationError

    def full(*_: Any, **__: Any) -> None:
        raise DatasetGenerationError from OSError(28, "No space left on device")

    Dataset.from_list([{"prompt": "a", "completion": "b"}]).to_parquet(tmp_path / "pairs.parquet")
    monkeypatch.setattr("datasets.load_dataset", full)
    with pytest.raises(OSError, match="No space left"):
        load_examples(tmp_path / "pairs.parquet")


def test_a_missing_split_names_the_splits_there_are(tmp_path: Path, tiny_pairs: list[dict[str, str]]) -> None:
    for name in ("pairs.jsonl", "pairs.parquet", "folder/train.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        WRITERS[name if name in WRITERS else "pairs.jsonl"](tiny_pairs, path)
        source = path.parent if name.startswith("folder") else path
        with pytest.raises(ValueError, match=r"split 'test' is not in .*; it has train"):
            load_examples(source, split="test")


def test_text_files_of_the_hub_are_read_here_and_not_by_arrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    (tmp_path / "train.jsonl").write_text(lines(CALLS))
    builder = datasets.load_dataset_builder(str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda name, **_: builder)
    for streaming in (False, True):
        rows = load_examples("someone/calls", streaming=streaming)
        assert conversation_of(next(iter(rows))).turns == conversation_of(load_examples(CALLS)[0]).turns


def test_the_report_says_which_columns_made_the_rows_and_which_did_not() -> None:
    rows = [
        {"instruction": "a", "input": "", "output": "b", "category": "x"},
        {"prompt": "a", "completion": "b", "source": "y"},
        {"messages": [{"role": "user", "content": "a"}, *[{"role": "assistant", "content": "b"}] * 2]},
        {"messages": [*CALLS[0]["messages"], {"role": "user", "content": "c"}], "tools": []},
    ]
    _, report = to_examples(open_rows(rows, "train"))
    assert str(report) == (
        "rows made of instruction, input, output, prompt, completion, messages, tools; left out: category, source; "
        "1 turns after the last answer left out"
    )


def test_files_of_another_type_in_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(_LINE)
    (tmp_path / "more.csv").write_text("prompt,completion\nc,d\n")
    (tmp_path / "README.md").write_text("x")
    found, report = to_examples(open_rows(tmp_path, "train"))
    assert found["response"][:] == ["b"]
    assert str(report) == "rows made of prompt, completion; files of another type, not read: more.csv"


def test_rows_of_pandas_and_numpy_are_read_as_pythons(tiny_pairs: list[dict[str, str]]) -> None:
    rows = [{"prompt": np.str_("a"), "completion": np.int64(3), "images": np.array([]), "source": np.float32(0.5)}]
    assert load_examples(rows)["response"][:] == ["3"]
    turns = np.array([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert load_examples([{"messages": turns}])["response"][:] == ["b"]
    frame = pandas.DataFrame(tiny_pairs)
    assert load_examples(frame.to_dict("records")).to_list() == load_examples(tiny_pairs).to_list()


def test_turns_as_a_dict_of_lists_are_turns() -> None:
    row = {"messages": {"role": ["user", "assistant"], "content": ["a", "b"], "name": [None, "x"]}}
    assert conversation_of(load_examples([row])[0]).turns[1] == {"role": "assistant", "content": "b", "name": "x"}


def test_a_nested_feature_of_a_table_is_read_like_the_list() -> None:
    turn = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
    parts = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "a"), ("assistant", "b"))
    ]
    table = Dataset.from_list([{"messages": parts}], features=Features({"messages": List(turn)}))
    assert load_examples(table).to_list() == load_examples([{"messages": parts}]).to_list()
