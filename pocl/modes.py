"""Who may read what was written: libraries write by way of private files (mode 0600), whatever the umask says."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def follow_umask(path: Path) -> None:
    """Let a file, or a folder with all that is in it, be read and written by those whom the umask lets in.

    A mode is only ever widened. What belongs to somebody else, or is not there, is left as it is.
    """
    given = _mode_of_new_files(path if path.is_dir() else path.parent)
    for place in [path, *(path.rglob("*") if path.is_dir() else ())]:
        with contextlib.suppress(OSError):
            if place.is_symlink():
                continue
            mode = place.stat().st_mode & 0o7777
            wanted = mode | given | ((given & 0o444) >> 2 if place.is_dir() else 0)
            if wanted != mode:
                place.chmod(wanted)


def _mode_of_new_files(folder: Path) -> int:
    """Found out by a file, as the umask cannot be asked without being changed, for all threads."""
    probe = folder / f".{uuid.uuid4().hex}"
    try:
        handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except OSError:
        return 0
    try:
        return os.fstat(handle).st_mode & 0o666
    finally:
        os.close(handle)
        probe.unlink(missing_ok=True)
