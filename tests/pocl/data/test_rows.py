"""Token rows: the same bits for any number of workers, kept where asked, and found again by what decides them."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pocl.data import encoding, load_examples, rows, tokenize
from pocl.data.encoding import RowMaker
from pocl.data.tables import arrow_table, slice_of, slices, values_of


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows.in_chunks, "__kwdefaults__", {**rows.in_chunks.__kwdefaults__, "size": 5})
    monkeypatch.setattr(encoding, "_BATCH", 2)


def pairs(count: int, mark: str = "") -> Any:
    answers = [" ".join(f"w{j}" for j in range(i % 7)) for i in range(count)]  # every seventh has none
    return load_examples([{"prompt": f"w{i} {mark}", "completion": answers[i]} for i in range(count)])


def test_the_number_of_workers_does_not_show(shared_tokenizer: Any, tmp_path: Path) -> None:
    found = []
    for workers in (1, 2, 3):
        made, report = tokenize(pairs(33), shared_tokenizer, workers=workers, progress=False)
        maker = RowMaker(pairs(33), shared_tokenizer, workers=workers, progress=False)
        rows.write_rows(tmp_path / "rows.arrow", maker.schema, maker.batches())
        assert rows.map_rows(tmp_path / "rows.arrow").to_dict() == made.to_dict()
        found.append((report, (tmp_path / "rows.arrow").read_bytes()))
    assert found[0] == found[1] == found[2]
    assert found[0][0].empty_responses == 5


def test_rows_are_made_once_for_the_same_examples_tokenizer_and_options(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    batches = RowMaker.batches

    def counted(self: RowMaker) -> Any:
        made.append(1)
        return batches(self)

    monkeypatch.setattr(RowMaker, "batches", counted)

    def ask(examples: Any, **options: Any) -> Any:
        before = len(made)
        found = tokenize(examples, tiny_tokenizer, cache_dir=tmp_path, progress=False, **options)
        return len(made) - before, found[0].to_dict(), found[1]

    first = ask(pairs(12))
    plain, report = tokenize(pairs(12), tiny_tokenizer, progress=False)
    assert first == (1, plain.to_dict(), report)
    assert ask(pairs(12)) == (0, *first[1:])
    assert ask(pairs(12), workers=2)[0] == 0
    chosen = pairs(14).select([*range(12)])  # the same rows, however they lie
    assert ask(chosen)[0] == 0
    assert [ask(pairs(12, "w1"))[0], ask(pairs(11))[0], ask(pairs(12), max_length=8, max_prompt_length=4)[0]] == [
        1,
        1,
        1,
    ]
    tiny_tokenizer.add_tokens(["w1 w2"])
    assert ask(pairs(12))[0] == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_bad_rows_leave_no_file(shared_tokenizer: Any, tmp_path: Path) -> None:
    empty = load_examples([{"prompt": "w0", "completion": ""}])
    with pytest.raises(ValueError, match="no sample is left"):
        tokenize(empty, shared_tokenizer, cache_dir=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="workers must be at least 1, got -1"):
        tokenize(pairs(3), shared_tokenizer, workers=-1, progress=False)


@pytest.mark.parametrize("order", [None, [5, 1, 3, 0], [2, 2, 9]])
def test_slices_and_columns_are_those_of_the_selected_rows(order: list[int] | None) -> None:
    whole = Dataset.from_dict({"a": list(range(10)), "b": [str(i) for i in range(10)]})
    chosen = whole if order is None else whole.select(order)
    assert list(values_of(chosen, "b")) == chosen["b"][:]
    assert [row for table in slices(chosen, 3) for row in table.to_pylist()] == chosen.to_list()
    assert arrow_table(chosen).to_pydict() == chosen.to_dict()
    assert slice_of(chosen, 1, 2).to_pydict() == chosen.select([1, 2]).to_dict()
