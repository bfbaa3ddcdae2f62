"""Work shared by forked processes, its results in the order of the jobs.

Process number p of n does the jobs p, p + n, p + 2n, ... and sends what it made through a pipe of its own. A full pipe
makes it wait, so no results pile up; a broken one ends it, so nobody is left behind when the first process is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
_MOST = 32  # by default


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: int | None) -> int:
    """The number of processes to use: `workers`, or as many as there are cores.

    Raises:
        ValueError: `workers` is below 1.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}; leave it out to use every core")
    return workers or min(usable_cores(), _MOST)


def in_order(work: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int | None = None) -> Iterator[Result]:
    """Does jobs in several processes and yields the results in their order.

    Where processes cannot be forked safely (anywhere but on Linux), in a process that may have no children (a worker of
    a data loader), and with one worker, this process does them.

    Args:
        work: does a job; every process has its own copy of all that it refers to.
        jobs: what to do.
        workers: number of processes; as many as there are cores when left out.

    Raises:
        Exception: what a job raised; of several the one of the first job.
        RuntimeError: a process was killed.
    """
    count = min(check_workers(workers), len(jobs))
    if count < 2 or not sys.platform.startswith("linux") or multiprocessing.current_process().daemon:
        with _tokenizers_single_threaded():
            for job in jobs:
                yield work(job)
        return
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_serve, args=(work, jobs[number::count], number, pipes), daemon=True)
        for number in range(count)
    ]
    try:
        with warnings.catch_warnings():  # of threads, which no child goes on with
            warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
            for process in processes:
                process.start()
        for _, sender in pipes:
            sender.close()
        for number in range(len(jobs)):
            yield _receive(pipes[number % count][0], processes[number % count])
    finally:
        for receiver, sender in pipes:
            receiver.close()
            sender.close()
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _receive(receiver: Any, process: Any) -> Any:
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a worker process ended with exit code {process.exitcode}, for want of memory perhaps; use fewer workers "
            "(workers=1, data.workers 1)"
        ) from None
    if error is not None:
        raise error
    return result


def _serve(work: Callable[[Any], Any], jobs: Sequence[Any], number: int, pipes: Sequence[Any]) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is told as well, and ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other, (receiver, sender) in enumerate(pipes):
        receiver.close()
        if other != number:
            sender.close()
    sender = pipes[number][1]
    with contextlib.suppress(BrokenPipeError), _tokenizers_single_threaded():
        try:
            for job in jobs:
                sender.send((work(job), None))
        except BrokenPipeError:
            raise
        except Exception as error:
            sender.send((None, _portable(error)))
    sender.close()


def _portable(error: Exception) -> Exception:
    """An error that survives the pipe and says the same."""
    if isinstance(error, ValueError):
        return ValueError(str(error))
    return OSError(*error.args) if isinstance(error, OSError) else RuntimeError(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _tokenizers_single_threaded() -> Iterator[None]:
    """The tokenizers' own threads stay asleep: the cores are busy, and a process with threads does not fork well."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
