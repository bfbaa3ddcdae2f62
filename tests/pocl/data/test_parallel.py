"""Work shared by processes: the same results in the same order, errors of the first job, and nobody left behind."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pocl.data.parallel import check_workers, in_order


def runs(process: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_results_come_in_the_order_of_the_jobs_for_any_number_of_workers(workers: int) -> None:
    def late(number: int) -> tuple[int, bytes]:
        time.sleep(0.002 * (number % 3 == 0))
        return number, bytes(70_000)  # more than a pipe holds

    assert [found for found, _ in in_order(late, range(7), workers=workers)] == list(range(7))
    assert list(in_order(late, [], workers=workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_of_the_first_job_that_fails_is_raised_behind_the_results_before_it(workers: int) -> None:
    def work(number: int) -> int:
        if number >= 3:
            raise ValueError(f"job {number} is bad")
        return number

    results = in_order(work, range(8), workers=workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="job 3 is bad"):
        next(results)


def test_an_error_of_any_kind_comes_through_in_words() -> None:
    def work(number: int) -> int:
        raise KeyError("no such thing")

    with pytest.raises(RuntimeError, match="KeyError: 'no such thing'"):
        list(in_order(work, range(4), workers=2))


def test_a_worker_that_is_killed_is_told() -> None:
    def work(number: int) -> int:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(RuntimeError, match="exit code -9.*use fewer workers"):
        list(in_order(work, range(4), workers=2))


def test_workers_end_with_whoever_stops_listening() -> None:
    results: Any = in_order(lambda _: (os.getpid(), bytes(1 << 20)), range(100), workers=2)
    workers = {next(results)[0], next(results)[0]}
    results.close()
    assert not any(map(runs, workers))


def test_workers_end_with_a_killed_parent(start_processes: Any, tmp_path: Path) -> None:
    def work() -> None:
        for worker, _ in in_order(lambda _: (os.getpid(), bytes(1 << 20)), range(100), workers=2):
            (tmp_path / str(worker)).touch()
            if len(list(tmp_path.iterdir())) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    (parent,) = start_processes(work)
    parent.join()
    deadline = time.monotonic() + 20
    while any(runs(int(worker.name)) for worker in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_number_of_workers_is_checked() -> None:
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        check_workers(0)
    assert check_workers(None) >= 1
