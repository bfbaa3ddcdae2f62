"""Walking over a mapped file leaves none of it in memory, and loses nothing of it."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from pocl.data.mapped import MappedPages
from pocl.data.rows import map_rows, write_rows
from pocl.data.tables import slices, write_parquet_table

ROWS, WIDTH = 40_000, 512  # 80 MB
WHOLE = ROWS * WIDTH * 4 / 2**20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are given back on Linux alone")


def mapped_mib() -> float:
    """The pages of files in this process' resident memory."""
    found = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of token rows on disk, the number of a row its only token."""

    def batches() -> Iterator[pa.RecordBatch]:
        for first in range(0, ROWS, 1000):
            numbers = np.arange(first, first + 1000)
            ids = pa.FixedSizeListArray.from_arrays(np.repeat(numbers, WIDTH).astype(np.int32), WIDTH)
            yield pa.record_batch({"id": numbers, "ids": ids.cast(pa.list_(pa.int32()))})

    path = tmp_path_factory.mktemp("mapped") / "rows.arrow"
    write_rows(path, next(batches()).schema, batches())
    return path


@pytest.mark.parametrize("order", ["all", "some", "shuffled"])
def test_a_walk_over_a_mapped_table_keeps_no_more_than_a_few_slices(file: Path, order: str) -> None:
    table = map_rows(file)
    if order != "all":
        chosen = np.arange(0, ROWS, 2)
        table = table.select(np.random.default_rng(0).permutation(chosen)[:4000] if order == "shuffled" else chosen)
    before, most, seen = mapped_mib(), 0.0, []
    for part in slices(table, 1000):
        rows = part.combine_chunks()
        ids = rows["ids"].chunk(0).flatten().to_numpy().reshape(-1, WIDTH)
        assert (ids == rows["id"].to_numpy()[:, None]).all()
        seen += rows["id"].to_pylist()
        most = max(most, mapped_mib())
    assert seen == table["id"][:]
    if order != "shuffled":
        assert most < before + WHOLE / 3, "which a walk without giving back exceeds"


def test_what_was_given_back_is_there_when_it_is_read_again(file: Path) -> None:
    table = map_rows(file)
    held = table.data.table.column("ids").chunk(3).flatten()
    before, first = mapped_mib(), held.to_pylist()
    pages = MappedPages(table.data.table)
    assert sum(table.data.table.column("ids").chunk(3).flatten().to_numpy().sum() for _ in range(1)) > 0
    pages.give_back()
    assert mapped_mib() <= before
    assert held.to_pylist() == first


def test_tables_in_memory_are_left_alone() -> None:
    table = Dataset.from_dict({"a": list(range(100_000))})
    MappedPages(table.data.table).give_back()
    assert table["a"][:] == list(range(100_000))


def test_a_parquet_file_of_a_selection_has_its_rows_and_types(tmp_path: Path) -> None:
    table = Dataset.from_dict({"a": list(range(50)), "b": [[str(i)] * i for i in range(50)]})
    write_parquet_table(table.select(range(1, 50, 3)), tmp_path / "table.parquet")
    again = Dataset.from_parquet(str(tmp_path / "table.parquet"), cache_dir=str(tmp_path))
    assert again.features == table.features
    assert again.to_list() == table.select(range(1, 50, 3)).to_list()


def test_slices_of_wide_rows_are_small() -> None:
    table = Dataset.from_dict({"text": ["x" * 2**20] * 80})
    assert max(map(len, slices(table))) <= 32
