"""Systems that are not this one: what POSIX alone has is asked for, never taken for granted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pocl.devices import accelerator
from pocl_kernels import fused_linear_divergence

# Every module of pocl sees `os`, `signal` and `sys` as they are on Windows; the libraries, which look for themselves,
# see this system. A text file of pocl's that is read or written in the system's own encoding is an error.
WINDOWS = """
import builtins, os, signal, sys, warnings

class Less:
    def __init__(self, module, lacks, **other):
        self.__dict__.update(other, _module=module, _lacks=lacks)
    def __getattr__(self, name):
        if name in self._lacks.split():
            raise AttributeError(name)
        return getattr(self._module, name)

here = builtins.__import__
there = {
    "os": Less(os, "fork register_at_fork pread pwrite geteuid getuid sched_getaffinity statvfs O_CLOEXEC", name="nt",
               supports_fd=set()),
    "signal": Less(signal, "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGSTOP"),
    "sys": Less(sys, "", platform="win32"),
}

def import_there(name, globals=None, locals=None, fromlist=(), level=0):
    if not (globals and str(globals.get("__name__")).startswith("pocl")):
        return here(name, globals, locals, fromlist, level)
    if name in ("fcntl", "resource", "pwd", "grp", "termios"):
        raise ImportError(name)
    return there.get(name) or here(name, globals, locals, fromlist, level)

builtins.__import__ = import_there
warnings.filterwarnings("error", category=EncodingWarning, module=r"pocl(_kernels)?([.]|$)")
from pocl.cli import main
main()
"""


@pytest.mark.slow
def test_a_whole_recipe_needs_nothing_that_posix_alone_has(recipe: Path, tmp_path: Path) -> None:
    words = ["distill", str(recipe)]
    environment = os.environ | {"PYTHONWARNDEFAULTENCODING": "1", "POCL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", WINDOWS, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    assert not list((tmp_path / "run").glob(".lock*"))


def test_apples_gpu_is_left_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert accelerator() is None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda:0"))
    assert accelerator() == torch.device("cuda:0")


def test_tensors_on_apples_gpu_are_refused_in_words() -> None:
    class Elsewhere(torch.Tensor):
        device = torch.device("mps")

    hidden, head = (torch.randn(rows, 4).as_subclass(Elsewhere) for rows in (2, 8))
    with pytest.raises(ValueError, match="MPS has no float64, .* move the tensors to the CPU"):
        fused_linear_divergence(hidden, head, hidden, head)
