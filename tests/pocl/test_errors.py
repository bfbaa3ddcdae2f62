"""Whatever is raised, the command line says what happened and what to do; the traceback lies in a file."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from pocl.cli import _guarded
from pocl.errors import LOG, in_words, is_own, keep_traceback
from pocl.rouge import rouge_l
from pocl.run_folder import RECIPE, RunFolderError


def raised(work: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever it is
        work()
    return caught.value


def shell() -> None:
    raise RuntimeError("w5")


FOREIGN = {
    "of torch": (
        lambda: torch.ones(2, 3) @ torch.ones(2, 3),
        r"raised RuntimeError: mat1 and mat2 .*\npocl does not know this error; please report it",
    ),
    "of the standard library": (lambda: json.loads("{"), r"json raised JSONDecodeError: Expecting .*\npocl does not"),
    "a key": (lambda: {}["x"], "raised KeyError: 'x'"),
    "without words": (lambda: (_ for _ in ()).throw(StopIteration), "raised StopIteration\npocl does not know"),
    "memory": (lambda: (_ for _ in ()).throw(MemoryError()), "raised MemoryError\nThere is too little memory: lower"),
    "memory of a GPU": (
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        r"raised torch\.OutOfMemoryError: CUDA out of memory\. Tried .*\nThere is too little memory: lower training",
    ),
    "long": (lambda: (_ for _ in ()).throw(RuntimeError("x " * 9999)), r"RuntimeError: (x ){290,300}.*\.\.\.\n"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_error_of_another_library_is_named_with_what_helps(name: str) -> None:
    work, message = FOREIGN[name]
    error = raised(work)
    assert not is_own(error)
    assert re.search(message, in_words(error))
    error.add_note("In the step 'ranking'")
    assert in_words(error).startswith("In the step 'ranking', ")


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "The disk is full"), (errno.EACCES, "--output"), (errno.EROFS, "--output"), (errno.ENOENT, "")],
)
def test_errors_of_the_system_say_what_and_where_without_numbers(number: int, advice: str) -> None:
    text = in_words(OSError(number, "Said by the system", "/some/file"))
    assert text.startswith("Said by the system: /some/file")
    assert advice in text
    assert "Errno" not in text


def test_words_of_pocls_own_stay_as_they_are() -> None:
    error = raised(lambda: rouge_l(["a"], []))
    assert is_own(error)
    assert in_words(error) == str(error)
    assert is_own(raised(lambda: rouge_l(["a"], ["a"], words="x")))
    assert not is_own(raised(lambda: rouge_l([1], [2])))  # a mistake of ours, not a word to the user


def guarded(error: Exception, *folders: Path) -> None:
    def work(console: Any) -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        _guarded(work, "pocl distill recipe.yaml", folders)
    assert ended.value.exit_code == 1 + is_own(error)


def test_the_traceback_lies_in_the_run_folder_and_is_pointed_to(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / RECIPE).write_text("name: x\n")
    guarded(raised(shell), tmp_path)
    told = capsys.readouterr().err
    assert "Error: " in told
    assert f"The traceback is in {tmp_path / LOG}" in told
    assert "Traceback (most recent" not in told
    kept = (tmp_path / LOG).read_text()
    assert "pocl distill recipe.yaml" in kept
    assert kept.rstrip().endswith("RuntimeError: w5")
    guarded(raised(lambda: rouge_l(["a"], [])), tmp_path)
    assert "traceback is in" not in capsys.readouterr().err  # the words are enough
    assert "rouge_l" in (tmp_path / LOG).read_text()


def test_a_folder_that_is_no_run_or_is_refused_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    guarded(raised(shell), tmp_path)
    assert not list(tmp_path.iterdir())
    path = Path(capsys.readouterr().err.split("The traceback is in ")[1].strip())
    assert "RuntimeError: w5" in path.read_text()
    path.unlink()
    (tmp_path / RECIPE).write_text("name: x\n")
    guarded(RunFolderError("belongs to another recipe"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [RECIPE]


def test_asked_for_the_traceback_is_shown(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCL_DEBUG", "1")
    (tmp_path / RECIPE).write_text("name: x\n")
    guarded(raised(shell), tmp_path)
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_where_nothing_can_be_written_the_words_come_all_the_same(tmp_path: Path) -> None:
    assert keep_traceback(RuntimeError("x"), "pocl", tmp_path / "not there") is None


def test_the_words_cost_no_heavy_import() -> None:
    code = "import sys, pocl.errors; print({'torch', 'rich', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
