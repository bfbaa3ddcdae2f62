"""One process at a time in a run folder, on storage that several machines share too.

The file `.lock` says who is at work: host, process, since when. The system's lock on it (`flock`) ends with its
process, however that ends, and decides wherever it reaches: on one machine always. Between machines whose file system
keeps such locks to itself, a sign of life decides: the holder touches the file every few seconds, and its age is read
off the file system's own clock, so that clocks which differ do no harm. Windows has no such lock: there the number of
the process decides, and that a file which somebody has open cannot be removed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

LOCK = ".lock"
SIGN_OF_LIFE = 20.0  # seconds between two
STALE_AFTER = 120.0  # seconds without one, on another machine
_WINDOWS = os.name == "nt"
_WRITING = 5.0  # seconds that a new file may be empty before its maker is taken for dead

_held: set[int] = set()  # file descriptors; a forked child must not keep its parent's lock alive
_watches_forks = False


class FolderInUseError(ValueError):
    """Another process works in the folder; the message says which."""


@contextlib.contextmanager
def only_user(folder: Path) -> Iterator[None]:
    """Be the only process that works in `folder`, which is made if it is not there.

    A lock whose process is gone is taken over.

    Raises:
        FolderInUseError: another process works there: names it, its host and since when.
        ValueError: no such folder can be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ValueError(f"output: the folder {folder} cannot be made ({why}); choose another with --output") from error
    path = folder / LOCK
    handle = _acquire(path)
    _register(handle)
    done = threading.Event()
    shown = handle if os.utime in os.supports_fd else path
    pulse = threading.Thread(target=_show_life, args=(shown, done), name="pocl-lock", daemon=True)
    pulse.start()
    try:
        yield
    finally:
        done.set()
        pulse.join()
        with contextlib.suppress(OSError):  # a folder that is gone, a disk that went read-only
            if _is_at(handle, path) and not _WINDOWS:
                path.unlink()
        _held.discard(handle)
        os.close(handle)
        if _WINDOWS:
            _remove_closed(path)


def user_of(folder: Path) -> dict[str, Any] | None:
    """Who works in a folder: `host`, `pid`, `since`; None if nobody does."""
    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        lock = _try_lock(handle)
        return None if lock != "busy" and _is_stale(handle, path, lock) else _read(handle)
    finally:
        os.close(handle)


def in_use_by(folder: Path) -> str | None:
    """Who works in a folder, in words; None if nobody does."""
    user = user_of(folder)
    return None if user is None else _in_use(folder / LOCK, user)


def _acquire(path: Path) -> int:
    looks = 0
    for _ in range(40):
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            made = True
        except FileExistsError:
            try:
                handle = os.open(path, os.O_RDWR)
            except FileNotFoundError:  # its holder has just left
                continue
            made = False
        dead = waits = False
        try:
            if made:
                if not _wait_for_lock(handle):  # never without it: whoever has it would find a dead holder's name
                    raise FolderInUseError(_in_use(path, {}))
                _write(handle)
                return handle
            lock = _try_lock(handle)
            if lock == "busy" or not _is_stale(handle, path, lock):
                looks += 1  # several: somebody may just be writing who he is, or only look, as we do
                if looks > 3 and (record := _read(handle)):
                    raise FolderInUseError(_in_use(path, record))
                waits = True
            else:
                dead = _is_at(handle, path)
            if dead and not _WINDOWS:
                _bury(path)
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if waits:  # without the file: many who look in turn would keep its lock from its maker
            time.sleep(0.1)
        if dead and _WINDOWS:
            with contextlib.suppress(OSError):
                _bury(path)
    raise FolderInUseError(_in_use(path, {}))


def _bury(path: Path) -> None:
    """Remove a dead lock. Renamed first: of several who find the same one, one makes the next."""
    grave = path.with_name(f"{LOCK}-{uuid.uuid4().hex}")
    path.rename(grave)
    grave.unlink()


def _remove_closed(path: Path) -> None:
    """Remove a lock where somebody who looks at it for a moment keeps it from being removed."""
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
            return
        time.sleep(0.05)


def _in_use(path: Path, record: dict[str, Any]) -> str:
    who = "another process"
    if record:
        who = f"process {record.get('pid')} on host {record.get('host')} since {record.get('since')}"
    return (
        f"{path.parent} is in use by {who}; wait until it ends or stop it, or choose another folder with --output. "
        f"If no such process runs any more, remove {path}"
    )


def _try_lock(handle: int) -> Literal["ours", "busy", "none"]:
    """Take the system's lock; `none`: this file system, or this system, has none."""
    try:
        import fcntl
    except ImportError:
        return "none"
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "busy"
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        return "none"
    return "ours"


def _wait_for_lock(handle: int) -> bool:
    """Of a file just made: whoever looked at it before it said anything lets go of it at once. Whether they did."""
    for _ in range(200):
        if _try_lock(handle) != "busy":
            return True
        time.sleep(0.02)
    return False


def _is_stale(handle: int, path: Path, lock: str) -> bool:
    """Whether the process that wrote the file is gone; `lock` is what trying the system's lock gave, not `busy`."""
    record = _read(handle)
    if not record:
        return _age(handle, path) > _WRITING
    here = _machine()
    if record.get("boot") == here["boot"] != "":
        return lock == "ours" or not _is_alive(record["pid"])  # one kernel: it would not give us a living one's lock
    if record.get("host") == here["host"]:
        return lock == "ours" or here["boot"] != "" or not _is_alive(record["pid"])  # another boot: started anew since
    return _age(handle, path) > STALE_AFTER


def _is_alive(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))


def _age(handle: int, path: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{LOCK}-") as probe:
        return os.stat(probe.name).st_mtime - os.fstat(handle).st_mtime


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _machine() -> dict[str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {"host": socket.gethostname(), "boot": boot.read_text("utf-8").strip() if boot.is_file() else ""}


def _read(handle: int) -> dict[str, Any]:
    os.lseek(handle, 0, os.SEEK_SET)
    text = os.read(handle, 4096)
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _write(handle: int) -> None:
    record = {**_machine(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "command": sys.argv[:3]}
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(record).encode())
    os.fsync(handle)


def _show_life(file: int | Path, done: threading.Event) -> None:
    while not done.wait(SIGN_OF_LIFE):
        with contextlib.suppress(OSError):
            os.utime(file)


def _register(handle: int) -> None:
    global _watches_forks
    if not _watches_forks and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)
        _watches_forks = True
    _held.add(handle)


def _forget() -> None:
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()
