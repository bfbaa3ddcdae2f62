"""One process at a time in a folder: refused in words, released however a process ends, taken over when it is gone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pocl.run_lock import LOCK, STALE_AFTER, FolderInUseError, only_user, user_of

HOLD = """
import sys, time
{before}
from pathlib import Path
from pocl.run_lock import only_user
with only_user(Path(sys.argv[1])):
    print("held", flush=True)
    {then}
"""


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A factory: another process that works in a folder by the time the call returns."""
    processes: list[subprocess.Popen[str]] = []

    def start(folder: Path, then: str = "time.sleep(60)", before: str = "") -> subprocess.Popen[str]:
        words = [sys.executable, "-c", HOLD.format(then=then, before=before), str(folder)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_second_process_is_refused_with_who_is_there(tmp_path: Path, hold: Any) -> None:
    process = hold(tmp_path / "run")
    message = rf"in use by process {process.pid} on host .* since 20"
    with pytest.raises(FolderInUseError, match=message), only_user(tmp_path / "run"):
        pytest.fail("two at once")
    assert user_of(tmp_path / "run")["pid"] == process.pid


def test_a_folder_is_free_after_work_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    for _ in range(2):
        with only_user(tmp_path / "run"), pytest.raises(FolderInUseError), only_user(tmp_path / "run"):
            pytest.fail("two at once")
    assert list((tmp_path / "run").iterdir()) == []
    assert user_of(tmp_path / "run") is None


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, hold: Any, sign: signal.Signals) -> None:
    process = hold(tmp_path)
    process.send_signal(sign)
    process.wait()
    assert user_of(tmp_path) is None
    with only_user(tmp_path):
        assert user_of(tmp_path)["pid"] == os.getpid()


def test_a_child_that_outlives_a_killed_process_does_not_hold_its_lock(tmp_path: Path, hold: Any) -> None:
    process = hold(tmp_path, "import os\n    print(os.fork() or time.sleep(5), flush=True); time.sleep(60)")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    with only_user(tmp_path):
        os.kill(child, 0)  # it lives
    os.kill(child, signal.SIGKILL)


@pytest.fixture
def no_system_lock(monkeypatch: pytest.MonkeyPatch) -> str:
    """This process finds no `flock`, as on Windows; words that do the same to another one."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    return "sys.modules['fcntl'] = None"


@pytest.mark.parametrize("windows", [False, True])
def test_without_the_systems_lock_the_process_decides(
    tmp_path: Path, hold: Any, no_system_lock: str, monkeypatch: pytest.MonkeyPatch, windows: bool
) -> None:
    monkeypatch.setattr("pocl.run_lock._WINDOWS", windows)
    process = hold(tmp_path, before=no_system_lock)
    message = rf"in use by process {process.pid} on host"
    with pytest.raises(FolderInUseError, match=message), only_user(tmp_path):
        pytest.fail("two at once")
    process.kill()
    process.wait()
    assert user_of(tmp_path) is None
    for _ in range(2):
        with only_user(tmp_path), pytest.raises(FolderInUseError), only_user(tmp_path):
            pytest.fail("two at once")
    assert list(tmp_path.iterdir()) == []


def foreign(folder: Path, seconds_ago: float) -> None:
    """The lock of a process on another machine, whose system's lock does not reach here."""
    record = {"host": "elsewhere", "boot": "other", "pid": 1, "since": "2026-01-01 00:00:00"}
    (folder / LOCK).write_text(json.dumps(record))
    os.utime(folder / LOCK, times=(time.time() - seconds_ago,) * 2)


def test_another_machine_is_believed_alive_while_it_gives_signs(tmp_path: Path) -> None:
    foreign(tmp_path, STALE_AFTER / 2)
    with pytest.raises(FolderInUseError, match="process 1 on host elsewhere"), only_user(tmp_path):
        pytest.fail("two at once")
    foreign(tmp_path, STALE_AFTER * 2)
    with only_user(tmp_path):
        assert user_of(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_lock_that_says_nothing_belongs_to_nobody_once_it_is_old(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    os.utime(tmp_path / LOCK, times=(time.time() - 60,) * 2)
    with only_user(tmp_path):
        assert user_of(tmp_path)["pid"] == os.getpid()


def test_of_many_that_find_a_dead_lock_one_takes_it(tmp_path: Path, hold: Any) -> None:
    dead = hold(tmp_path)
    dead.kill()
    dead.wait()
    words = [sys.executable, "-c", HOLD.format(then="sys.stdin.read()", before=""), str(tmp_path)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    started = [subprocess.Popen(words, text=True, **pipes) for _ in range(6)]
    end = time.monotonic() + 120
    while sum(process.poll() is None for process in started) > 1 and time.monotonic() < end:
        time.sleep(0.05)  # whoever has it keeps it until all others have been there, however slow they start
    ends = [(process.communicate(), process.returncode) for process in started]
    assert sorted(code for _, code in ends) == [0, 1, 1, 1, 1, 1]
    assert all("in use by process" in error for (_, error), code in ends if code)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_who_waits_for_a_new_file_does_not_keep_its_lock_from_its_maker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six that found a dead lock kept the new one from its maker by turns, who went on without: two were at work."""
    import fcntl

    maker = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    waits = []

    def sleep(seconds: float) -> None:
        fcntl.flock(maker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(maker, fcntl.LOCK_UN)
        waits.append(seconds)

    monkeypatch.setattr("pocl.run_lock.time.sleep", sleep)
    try:
        with pytest.raises(FolderInUseError), only_user(tmp_path):
            pass
    finally:
        os.close(maker)
    assert waits


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_nobody_goes_on_without_the_lock_of_the_file_he_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocl.run_lock._try_lock", lambda handle: "busy")
    monkeypatch.setattr("pocl.run_lock.time.sleep", lambda seconds: None)
    with pytest.raises(FolderInUseError), only_user(tmp_path):
        pass
