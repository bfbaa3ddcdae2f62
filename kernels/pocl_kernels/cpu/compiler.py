"""Compiles the row kernels with the machine's C compiler, once, and loads them.

The sources are this package's own files plus the code printed from a divergence's definition. A shared library is
kept in a folder that only the user can write (``$POCL_CACHE``, default ``~/.cache/pocl/kernels``), named by the hash
of everything that shaped it; a folder or a library that somebody else owns or can write is refused. Without a
compiler, or with ``POCL_CPU_COMPILER=none``, :func:`load` returns None and the eager path serves.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from pocl_kernels.scalar import GIVEN, Program, name_of

SOURCES = Path(__file__).parent
FLAGS = (
    "-O3",
    "-std=c11",
    "-fPIC",
    "-shared",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
C_SYNTAX = {
    "const": "({0}f)",
    "add": "({} + {})",
    "sub": "({} - {})",
    "mul": "({} * {})",
    "div": "({} / {})",
    "neg": "(-{})",
    "lt": "({} < {})",
    "eq": "({} == {})",
    "where": "({} ? {} : {})",
    "exp": "f_exp({})",
    "log": "f_log({})",
    "abs": "fabsf({})",
}

DOUBLE_SYNTAX = C_SYNTAX | {"const": "({0})", "exp": "exp({})", "log": "log({})", "abs": "fabs({})"}
AT_HAND = GIVEN | {"exp l": "q", "exp r": "p"}


def divergence_source(program: Program) -> str:
    """C source of the divergence row kernel for one traced definition."""
    row, body = program.render(
        C_SYNTAX,
        lambda name, expression: f"const float {name} = {expression};",
        given=AT_HAND,
    )
    given = [f"const float {name_of(node)} = uniform[{i}];" for i, node in enumerate(program.uniforms)]
    text = (SOURCES / "divergence_rows.c").read_text("utf-8")
    text = text.replace("/*ROW*/", "\n    ".join(given + row))
    return text.replace("/*BODY*/", "\n            ".join(body))


def sparse_source(program: Program) -> str:
    """C source of the row kernel of sparse teachers: the definition in double and in single precision."""
    text = (SOURCES / "sparse_rows.c").read_text("utf-8")
    doubles = [f"const double {name_of(node)} = uniform[{i}];" for i, node in enumerate(program.uniforms)]
    row, body = program.render(DOUBLE_SYNTAX, lambda name, x: f"const double {name} = {x};", given=AT_HAND)
    text = text.replace("/*OUTCOME*/", "\n    ".join(doubles + row + body))
    floats = [f"const float {name_of(node)} = (float)uniforms[{i}];" for i, node in enumerate(program.uniforms)]
    row, body = program.render(C_SYNTAX, lambda name, x: f"const float {name} = {x};", given=AT_HAND)
    text = text.replace("/*ROW*/", "\n    ".join(floats + row))
    return text.replace("/*ENTRY*/", "\n            ".join(body))


def cross_entropy_source() -> str:
    """C source of the cross-entropy row kernel."""
    return (SOURCES / "cross_entropy_rows.c").read_text("utf-8")


@functools.cache
def compiler() -> tuple[str, ...] | None:
    """The C compiler's command: ``$POCL_CPU_COMPILER``, ``$CC``, cc, gcc or clang; None if there is none or it is
    "none".
    """
    wanted = (os.environ.get("POCL_CPU_COMPILER") or os.environ.get("CC") or "").strip()
    if wanted == "none":
        return None
    # One path with spaces in it, or several words such as CC="ccache gcc".
    for program, *options in [[wanted], wanted.split()] if wanted else [["cc"], ["gcc"], ["clang"]]:
        if path := shutil.which(program):
            return path, *options
    if wanted:
        message = f"the C compiler {wanted!r} is not there, so the slower eager path serves"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return None


@functools.lru_cache(maxsize=256)
def load(source: str, function: str) -> Callable[..., None] | None:
    """The compiled ``function`` of ``source``, from the cache or made now; None without a working compiler."""
    command = compiler()
    if command is None:
        return None
    text = (SOURCES / "prelude.h").read_text("utf-8") + source
    key = hashlib.sha256("\0".join((text, *FLAGS, *command, _machine())).encode()).hexdigest()[:24]
    try:
        library = cache_folder() / f"{function}-{key}.so"
        if not library.exists():
            _compile(command, text, library)
        _refuse_what_others_can_write(library)
        result = getattr(ctypes.CDLL(str(library)), function)
    except (subprocess.SubprocessError, OSError) as error:  # no working compiler, no space, no right to run from here
        detail = getattr(error, "stderr", "") or str(error)
        warnings.warn(
            f"{' '.join(command)} could not compile or load the CPU kernels, so the slower eager path serves "
            f"(POCL_CPU_COMPILER=none silences this): {detail[-500:]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    result.restype = None
    return result


def cache_folder() -> Path:
    """Folder of the compiled kernels, made with mode 0700."""
    root = os.environ.get("POCL_CACHE")
    folder = Path(root) if root else Path.home() / ".cache" / "pocl"
    folder = folder / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _refuse_what_others_can_write(folder)
    return folder


def _refuse_what_others_can_write(path: Path) -> None:
    """A library is code that runs as this user: it and its folder must be the user's own.

    Raises:
        PermissionError: the path belongs to somebody else, or others than its owner can write to it.
    """
    if not hasattr(os, "geteuid"):  # not POSIX: access lists, which the bits do not show
        return
    status = path.stat()
    if status.st_uid != os.geteuid():
        why = f"belongs to user {status.st_uid}, and this process runs as {os.geteuid()}"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why = f"can be written by others (mode {stat.S_IMODE(status.st_mode):o}); chmod go-w takes that right away"
    else:
        return
    raise PermissionError(f"{path} {why}: no code is loaded from there. Set POCL_CACHE to a folder of your own")


def _compile(command: Sequence[str], text: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        source, result = Path(scratch) / "kernel.c", Path(scratch) / "kernel.so"
        source.write_text(text, "utf-8")
        native = "-mcpu=native" if platform.machine().lower() in ("arm64", "aarch64", "ppc64le") else "-march=native"
        arguments = [*command, *FLAGS, native, str(source), "-o", str(result), "-lm"]
        subprocess.run(arguments, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
        os.replace(result, library)  # several processes may race: each writes its own file, the last rename wins


@functools.cache
def _machine() -> str:
    # -march=native code must not be found by another kind of processor that shares the home folder.
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = ""
    return f"{platform.machine()} {platform.processor()} {features}"
