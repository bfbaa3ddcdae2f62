"""Digests: the same for the same content, read once for a file that has not changed, and never believed beyond that."""

import os
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

from pocl import digests
from pocl.digests import content_fingerprint
from pocl.run_folder import write_text


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the files that were read through, every one of which counts as large."""
    found: list[str] = []
    read = digests._read

    def counted(path: str) -> str:
        found.append(Path(path).name)
        return read(path)

    monkeypatch.setattr(digests, "_read", counted)
    monkeypatch.setattr(digests, "_LARGE", 1)
    monkeypatch.setenv("POCL_CACHE", str(tmp_path / "cache"))
    return found


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`launch(path)` is the fingerprint that a new process would find, long after the file's time stamps."""

    def start(path: Path, *, later: float = 60.0) -> str:
        digests._known.cache_clear()
        with monkeypatch.context() as patch:
            now = time.time()
            patch.setattr(time, "time", lambda: now + later)
            return content_fingerprint(path)

    return start


def test_content_fingerprints_see_contents_not_places(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_text(tmp_path / name / "weights.bin", "a" * (3 << 20))
    assert content_fingerprint(tmp_path / "one") == content_fingerprint(tmp_path / "two")
    middle = "a" * (3 << 19) + "b" + "a" * ((3 << 19) - 1)  # a merged adapter: same size, same ends
    for changed in ("a" * (3 << 20) + "b", "b" + "a" * ((3 << 20) - 1), "a" * ((3 << 20) - 1) + "b", middle):
        write_text(tmp_path / "two" / "weights.bin", changed)
        assert content_fingerprint(tmp_path / "one") != content_fingerprint(tmp_path / "two")


def test_one_process_reads_a_file_that_has_not_changed_once(tmp_path: Path, reads: list[str]) -> None:
    file = tmp_path / "weights.bin"
    write_text(file, "a")
    first = content_fingerprint(file)
    assert content_fingerprint(file) == first
    assert reads == ["weights.bin"]
    write_text(file, "b")
    assert content_fingerprint(file) != first


def test_a_second_launch_reads_nothing(tmp_path: Path, reads: list[str], launch: Callable[..., str]) -> None:
    for name in ("a", "b"):
        write_text(tmp_path / "model" / f"{name}.safetensors", name)
    first = launch(tmp_path / "model")
    assert sorted(reads) == ["a.safetensors", "b.safetensors"]
    assert launch(tmp_path / "model") == first
    os.symlink(tmp_path / "model", tmp_path / "link")  # a snapshot of the hub's cache is a folder of links
    assert launch(tmp_path / "link") == first
    assert len(reads) == 2


@pytest.mark.parametrize("change", ["in_place", "replaced", "in_place_with_its_old_time", "longer"])
def test_a_changed_file_is_noticed(tmp_path: Path, change: str, launch: Callable[..., str]) -> None:
    file = tmp_path / "weights.bin"
    write_text(file, "aaaa")
    before, stat = launch(file), file.stat()
    time.sleep(0.02)  # more than one tick of the time stamps
    if change == "replaced":
        write_text(file, "aaab")
    else:
        with file.open("r+") as stream:
            stream.write("aaaabbbb" if change == "longer" else "aaab")
    if change != "in_place":
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert launch(file) != before


def test_a_file_written_a_moment_ago_is_read_again(
    tmp_path: Path, reads: list[str], launch: Callable[..., str]
) -> None:
    file = tmp_path / "weights.bin"
    write_text(file, "a")
    launch(file, later=0.5)
    launch(file, later=0.5)
    assert len(reads) == 2  # another write within the same tick would leave the same time stamps


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Callable[..., str]
) -> None:
    file = tmp_path / "weights.bin"
    write_text(file, "a")
    read = digests._read

    def read_and_change(path: str) -> str:
        found = read(path)
        time.sleep(0.02)
        file.write_text("b")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(digests, "_read", read_and_change)
        before = launch(file)
    assert launch(file) != before


def test_rereading_can_be_asked_for(
    tmp_path: Path, reads: list[str], launch: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.bin"
    write_text(file, "a")
    launch(file)
    monkeypatch.setenv("POCL_REREAD", "1")
    launch(file)
    assert len(reads) == 2
    monkeypatch.setenv("POCL_REREAD", "0")
    launch(file)
    assert len(reads) == 2


@pytest.mark.parametrize("note", ["", "[1]", '{"path": 3}', '{"digest": '])
def test_a_damaged_note_is_written_again(
    tmp_path: Path, reads: list[str], launch: Callable[..., str], note: str
) -> None:
    file = tmp_path / "weights.bin"
    write_text(file, "a")
    first = launch(file)
    (found,) = (tmp_path / "cache" / "digests").iterdir()
    found.write_text(note)
    assert launch(file) == first
    assert len(reads) == 2
    assert launch(file) == first
    assert len(reads) == 2


def test_a_cache_folder_that_cannot_be_written_costs_a_reading_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Callable[..., str]
) -> None:
    file = tmp_path / "weights.bin"
    write_text(file, "a")
    monkeypatch.setenv("POCL_CACHE", str(file / "no folder"))
    assert launch(file) == launch(file)


def test_many_readers_at_once_leave_whole_notes(tmp_path: Path, reads: list[str], launch: Callable[..., str]) -> None:
    for number in range(20):
        write_text(tmp_path / "model" / f"{number}.bin", str(number) * 100)
    first = launch(tmp_path / "model")
    digests._known.cache_clear()
    with ThreadPool(4) as pool:
        assert set(pool.map(content_fingerprint, [tmp_path / "model"] * 12)) == {first}
    assert len(reads) == 20
    assert not [path for path in (tmp_path / "cache" / "digests").iterdir() if path.suffix != ".json"]
