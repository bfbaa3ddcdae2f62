"""Pages of mapped files, given back to the system when what lies in them has been read.

Reading a mapped table from end to end leaves all of its file in the resident memory of the process, which then looks as
large as the data. The pages are copies of what the file holds: without them, what is read again is fetched again.
"""

from __future__ import annotations

import ctypes
import sys
from bisect import bisect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # MADV_DONTNEED of Linux


class MappedPages:
    """The parts of this process' memory in which a table lies that are files, mapped to be read.

    Args:
        table: an Arrow table; kept, so that what is mapped stays so.
    """

    def __init__(self, table: Any) -> None:
        self._table = table
        self._areas = sorted(set(_areas_of(table))) if sys.platform.startswith("linux") else []

    def give_back(self) -> None:
        """Let the system have the pages. Nothing is lost, and Arrow arrays of the table stay as they are."""
        for start, stop in self._areas:
            _advise()(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(_DONTNEED))


@cache
def _advise() -> Any:
    return ctypes.CDLL(None).madvise


def _areas_of(table: Any) -> Iterator[tuple[int, int]]:
    """Start and end of each mapped file that a buffer of the table lies in."""
    files = _mapped_files()
    starts = [start for start, _ in files]
    for column in table.columns:
        for chunk in column.chunks:
            address = next((buffer.address for buffer in chunk.buffers() if buffer is not None and buffer.size), 0)
            place = bisect(starts, address) - 1
            if place >= 0 and address < files[place][1]:
                yield files[place]


def _mapped_files() -> list[tuple[int, int]]:
    """What is mapped from files and cannot be written: there a page is never more than a copy of the file's."""
    found = []
    for line in _MAPS.read_text(errors="replace").splitlines() if _MAPS.is_file() else ():
        area, rights, _, _, inode, *_ = line.split()
        if rights.startswith("r--") and inode != "0":
            start, stop = (int(address, 16) for address in area.split("-"))
            found.append((start, stop))
    return sorted(found)
