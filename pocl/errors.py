"""What the command line says of an exception, whichever library raised it, and where its traceback is kept.

An error of pocl's own says what to do already. Of any other the user learns what was being done, what the library said,
and what helps; the traceback goes into a file.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

LOG = "error.log"
OWN = ("pocl", "pocl_kernels")

_MEMORY = (
    "There is too little memory: lower training.batch_size and raise training.gradient_accumulation_steps by the same "
    "factor, lower data.max_length or ranking.max_new_tokens, or set training.activation_checkpointing to true."
)
_GOES_ON = "What is finished is kept: the same command goes on from there."
_BY_ERRNO = {
    errno.ENOSPC: f"The disk is full: free some of it. {_GOES_ON}",
    errno.EDQUOT: f"Your share of the disk is used up: free some of it. {_GOES_ON}",
    errno.EACCES: "You may not write or read there: choose another folder with --output, or change its permissions.",
    errno.EPERM: "You may not write or read there: choose another folder with --output, or change its permissions.",
    errno.EROFS: "The disk can only be read: choose another folder with --output.",
    errno.ENOTDIR: "A file lies where a folder is needed: choose another folder with --output.",
    errno.EEXIST: "A file lies where a folder is needed: choose another folder with --output.",
    errno.EMFILE: "Too many files are open: raise the limit with ulimit -n 4096.",
}


def tell(error: Exception, command: str, folders: Sequence[Path] = ()) -> None:
    """Print an error in words on the standard error stream, and keep its traceback.

    `POCL_DEBUG=1` in the environment prints the traceback too.

    Args:
        error: what was raised.
        command: what the user called.
        folders: the run folder, if one is known. It gets the traceback, `error.log`, unless it is refused: it may be
            somebody else's.
    """
    from rich.console import Console
    from rich.markup import escape

    from pocl.run_folder import RECIPE, RunFolderError
    from pocl.run_lock import FolderInUseError

    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(f"[red]Error:[/red] {escape(in_words(error))}")
    if os.environ.get("POCL_DEBUG"):
        say(escape("".join(traceback.format_exception(error))))
    refused = isinstance(error, RunFolderError | FolderInUseError)
    folder = next((folder for folder in folders if (folder / RECIPE).is_file() and not refused), None)
    if folder is not None or not is_own(error):
        kept = keep_traceback(error, command, folder)
        if kept is not None and not is_own(error):
            say(f"The traceback is in {escape(str(kept))}")


def in_words(error: BaseException) -> str:
    """One message for the user, of one or more lines."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        advice = _BY_ERRNO.get(error.errno, "")
        return f"{error.strerror}{where}" + (f"\n{advice}" if advice else "")
    if is_own(error):
        return str(error)
    library, kind = type(error).__module__.partition(".")[0], type(error).__name__
    raised_in = _raised_in(error)
    name = kind if library in ("builtins", raised_in) else f"{library}.{kind}"
    doing = "".join(f"{note}, " for note in getattr(error, "__notes__", ()))
    said = " ".join(str(error).split())
    text = f"{doing}{raised_in or 'Python'} raised {name}" + (f": {_shortened(said)}" if said else "")
    return f"{text}\n{_advice(error, said)}"


def is_own(error: BaseException) -> bool:
    """Whether pocl raised it, in words for the user."""
    kinds = (ValueError, OSError, ModuleNotFoundError, FloatingPointError)
    return isinstance(error, kinds) and _raised_in(error) in (*OWN, "")


def exit_code(error: BaseException) -> int:
    """2 where the user can mend the call, the recipe, data, models, folder or disk; 1 where a run failed.

    A run fails by too little memory, by a loss that is not finite, or by an error that pocl does not know.
    """
    of_system = isinstance(error, OSError) and error.errno in (*_BY_ERRNO, errno.ENOENT, errno.EISDIR)
    return 2 if of_system or (is_own(error) and not isinstance(error, FloatingPointError)) else 1


def keep_traceback(error: BaseException, command: str, folder: Path | None) -> Path | None:
    """Write the traceback to a file, and return its path; None where nothing can be written.

    Args:
        error: what was raised.
        command: what the user called.
        folder: of a run; without one, the file lies among the temporary ones.
    """
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {command}\n\n{''.join(traceback.format_exception(error))}"
    rank = int(os.environ.get("RANK", "0"))
    name = LOG if rank == 0 else f"error-{rank}.log"
    try:
        if folder is not None:
            (folder / name).write_text(text, encoding="utf-8")
            return folder / name
        handle, path = tempfile.mkstemp(prefix="pocl-error-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        return Path(path)
    except OSError:  # a disk that is full: what failed first is what to tell
        return None


def _advice(error: BaseException, said: str) -> str:
    if isinstance(error, MemoryError) or "out of memory" in said.lower() or "can't allocate memory" in said.lower():
        return _MEMORY
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"A package is missing: pip install {error.name.partition('.')[0]}"
    if isinstance(error, ImportError):
        return "A package is missing or too old; pip install --upgrade 'pocl[train]' installs what pocl needs."
    return f"pocl does not know this error; please report it with the traceback. {_GOES_ON}"


def _raised_in(error: BaseException) -> str:
    """The top-level package whose code raised it; empty for one without a traceback."""
    last = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        last = frame
    return "" if last is None else str(last.f_globals.get("__name__", "")).partition(".")[0]


def _shortened(text: str, length: int = 600) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
