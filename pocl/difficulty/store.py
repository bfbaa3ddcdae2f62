"""Scores on disk: one Parquet file a shard, written whole or not at all, and a manifest that says what they belong to.

manifest.json               fingerprints of model and tokenizer, and the settings that decide the scores
shards/00000.parquet        its own samples' mark in the schema's metadata, page checksums inside
scores.parquet              all shards in order, written once the last one is there
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pocl.run_folder import differences

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MARK = b"pocl_samples"
_PARQUET = {"compression": "zstd", "write_page_checksum": True}

logger = logging.getLogger(__name__)


class StoreError(ValueError):
    """The folder holds scores of something else, or nobody can tell of what; the message says what to do."""


class ShardStore:
    """The folder of one scoring run.

    Args:
        folder: made when missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.shards = self.folder / "shards"
        self.table_path = self.folder / "scores.parquet"

    def open(self, run: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """Claims the folder for a run, or recognises the run it belongs to.

        Args:
            run: what decides the scores and must be equal whenever the folder is used.
            found: what this run found out (rows that fit) and later ones keep to.

        Returns:
            What was found out by the run that made the folder.

        Raises:
            StoreError: the folder belongs to another model, tokenizer or settings; names them. Or its manifest is
                damaged.
        """
        path = self.folder / "manifest.json"
        self.shards.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                known, kept = dict(stored["run"]), dict(stored["found"])
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{path} is not readable ({type(error).__name__}: {error}), so nobody can tell what the scores "
                    f"beside it belong to: choose another output_dir, or remove {self.folder} to score again"
                ) from None
            if changed := differences(known, json.loads(json.dumps(run))):
                listing = "\n  ".join(changed)
                raise StoreError(
                    f"{self.folder} holds scores of another run:\n  {listing}\n"
                    "Choose another output_dir, or remove this one to score again"
                )
            return kept
        content = {"run": dict(run), "found": dict(found)}
        _write(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))
        return content["found"]

    def load(self, index: int, mark: str) -> pa.Table | None:
        """The scores of a shard, None if they are not there or cannot be read.

        Raises:
            StoreError: they are of other samples.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            logger.warning("%s is not readable (%s): this shard is scored again", path, error)
            return None
        stored = (table.schema.metadata or {}).get(_MARK, b"").decode()
        if stored != mark:
            raise StoreError(
                f"{path} was scored from other samples than those that shard {index} of the data has now: the data, "
                "its order or its template has changed. Choose another output_dir, or remove this one to score again"
            )
        return table

    def save(self, index: int, mark: str, table: pa.Table) -> None:
        """Writes a shard, whole or not at all.

        Raises:
            OSError: no space is left; what was written before stays.
        """
        marked = table.replace_schema_metadata({_MARK: mark.encode()})
        _write(self._path(index), lambda file: pq.write_table(marked, file, **_PARQUET))

    def finish(self, num_shards: int) -> None:
        """Writes all shards in order as one table to `scores.parquet`.

        Raises:
            ValueError: an id occurs in two shards, or there is no sample at all.
        """

        def write(file: Any) -> None:
            writer, ids = None, []
            for table in self._tables(num_shards):
                ids.append(table["sample_id"].to_numpy())
                writer = writer or pq.ParquetWriter(file, table.schema, **_PARQUET)
                writer.write_table(table)
            if writer is not None:
                writer.close()
            check_ids(ids)

        _write(self.table_path, write)

    def read(self) -> pa.Table:
        """The finished table."""
        return pq.read_table(self.table_path, page_checksum_verification=True)

    def _tables(self, num_shards: int) -> Iterator[pa.Table]:
        for index in range(num_shards):
            yield pq.read_table(self._path(index), page_checksum_verification=True).replace_schema_metadata(None)

    def _path(self, index: int) -> Path:
        return self.shards / f"{index:05d}.parquet"


class MemoryStore:
    """The same without a folder: nothing is kept beyond the run."""

    def __init__(self) -> None:
        self._tables: dict[int, pa.Table] = {}

    def open(self, run: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """What was found."""
        return dict(found)

    def load(self, index: int, mark: str) -> pa.Table | None:
        """None: nothing is there before it was computed."""
        return None

    def save(self, index: int, mark: str, table: pa.Table) -> None:
        """Keeps the table."""
        self._tables[index] = table

    def finish(self, num_shards: int) -> None:
        """Checks the ids, as `ShardStore.finish` does."""
        check_ids([self._tables[index]["sample_id"].to_numpy() for index in range(num_shards)])

    def read(self) -> pa.Table:
        """All shards in order as one table."""
        return pa.concat_tables([self._tables[i] for i in sorted(self._tables)])


def add_ids(ids: Iterable[int], seen: set[int]) -> None:
    """Adds sample ids to `seen`.

    Raises:
        ValueError: one of them is there already.
    """
    for sample_id in ids:
        if sample_id in seen:
            raise ValueError(
                f"sample id {sample_id} occurs more than once; an id names one sample: number the rows anew"
            )
        seen.add(sample_id)


def check_ids(ids: Sequence[NDArray[np.int64]]) -> None:
    """Refuses the sample ids of all shards together.

    Raises:
        ValueError: there are none, or one occurs more than once.
    """
    found, counts = np.unique(np.concatenate(ids) if ids else [], return_counts=True)
    if not len(found):
        raise ValueError(f"no sample is left to score: none of {len(ids)} shards has one with a response")
    if (counts > 1).any():
        raise ValueError(
            f"{int((counts > 1).sum())} sample ids occur more than once, the first is {found[counts > 1][0]}; "
            "an id names one sample: number the rows anew"
        )


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    """Lets `write` fill a file beside `path`, then puts it in its place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"no space left to write {path.name} into {path.parent} ({os.strerror(error.errno)}); what was written "
                "before is kept: make room and run the same command again",
            ) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
