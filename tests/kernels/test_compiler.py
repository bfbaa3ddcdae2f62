"""The compiled rows: made once, kept where only the user can write, and never needed."""

import os
import stat
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import pocl_kernels
from pocl_kernels.cpu import backend, compiler
from pocl_kernels.divergences import JSD, ForwardKL
from pocl_kernels.scalar import trace
from tests.kernels.cases import assert_close, make_case, oracle, solve

SOURCE = "void answer(int *out) { *out = 42; }"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no memory of what was compiled before."""
    monkeypatch.setenv("POCL_CACHE", str(tmp_path))
    for function in (compiler.load, compiler.compiler):
        function.cache_clear()
    yield tmp_path / "kernels"
    for function in (compiler.load, compiler.compiler):
        function.cache_clear()


@pytest.fixture
def with_compiler(cache: Path) -> Path:
    if compiler.compiler() is None:
        pytest.skip("this machine has no C compiler")
    return cache


def test_a_kernel_is_compiled_once_and_found_again(with_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler.load(SOURCE, "answer")
    (library,) = with_compiler.iterdir()
    compiler.load.cache_clear()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", never)
    assert first is not None
    assert compiler.load(SOURCE, "answer") is not None
    assert [library] == list(with_compiler.iterdir())


def test_another_source_is_another_library(with_compiler: Path) -> None:
    for source in (SOURCE, SOURCE.replace("42", "43")):
        assert compiler.load(source, "answer") is not None
    assert len(list(with_compiler.iterdir())) == 2


def test_parameters_of_a_divergence_do_not_recompile() -> None:
    sources = {compiler.divergence_source(trace(JSD(beta))) for beta in (0.1, 0.5, 0.9)}
    assert len(sources) == 1
    assert compiler.divergence_source(trace(ForwardKL())) not in sources


def test_a_schedule_of_temperatures_compiles_nothing_new(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not engine.compiled:
        pytest.skip("nothing is compiled")
    solve(engine, make_case(6, 67), divergence="jsd", ce_weight=0.3)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", never)
    for step, rows in enumerate((6, 3, 7, 1)):
        case = make_case(rows, 67 + step)
        solve(engine, case, divergence=JSD(0.2 + 0.1 * step), temperature=1 + 0.3 * step, ce_weight=0.1 * step)


def test_the_cache_is_the_users_alone(with_compiler: Path) -> None:
    compiler.load(SOURCE, "answer")
    assert stat.S_IMODE(os.stat(with_compiler).st_mode) == 0o700


@pytest.mark.parametrize("what", ["folder", "library"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_what_others_can_write_is_refused_and_the_eager_rows_serve(with_compiler: Path, what: str, mode: int) -> None:
    assert compiler.load(SOURCE, "answer") is not None
    (library,) = with_compiler.iterdir()
    os.chmod(with_compiler if what == "folder" else library, mode)
    compiler.load.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"(?s)eager path serves.*mode {mode:o}.*chmod go-w.*POCL_CACHE"):
        assert compiler.load(SOURCE, "answer") is None


@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_belongs_to_somebody_else_is_refused(
    with_compiler: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiler.load(SOURCE, "answer") is not None
    (library,) = with_compiler.iterdir()
    theirs = with_compiler if what == "folder" else library
    compiler.load.cache_clear()
    real = Path.stat

    def status(path: Path, **options: Any) -> os.stat_result:
        found = real(path, **options)
        return os.stat_result((*found[:4], found.st_uid + 1, *found[5:])) if path == theirs else found

    monkeypatch.setattr(Path, "stat", status)
    with pytest.warns(RuntimeWarning, match="(?s)eager path serves.*belongs to user"):
        assert compiler.load(SOURCE, "answer") is None


@pytest.mark.parametrize("value", ["none", "no-such-compiler"])
def test_without_a_compiler_the_eager_rows_serve(cache: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCL_CPU_COMPILER", value)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert compiler.compiler() is None
    assert [value in str(warning.message) for warning in said] == ([] if value == "none" else [True])
    assert compiler.load(SOURCE, "answer") is None
    case = make_case(12, 67, bias=True)
    assert_close(solve(pocl_kernels.fused_linear_divergence, case), oracle(case), 2e-6)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("place", ["/proc/nope", "a file"])
def test_without_a_place_for_libraries_the_eager_rows_serve(
    place: str, tmp_path: Path, with_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("POCL_CACHE", str(tmp_path / place))  # an absolute path stays as it is
    with pytest.warns(RuntimeWarning, match="eager path serves"):
        assert compiler.load(SOURCE, "answer") is None


@pytest.mark.parametrize("form", ["several words", "a path with spaces", "an open 'quote"])
def test_the_compiler_may_be_a_command_or_a_path(
    with_compiler: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (program,) = compiler.compiler() or ("",)
    compiler.compiler.cache_clear()
    link = tmp_path / form
    link.symlink_to(program)
    monkeypatch.setenv("POCL_CPU_COMPILER", f"env {program}" if form == "several words" else str(link))
    assert compiler.load(SOURCE, "answer") is not None


@pytest.mark.parametrize(
    "script", ["echo unknown flag >&2; exit 1", "exit 0", "echo not a library > $(echo $* | sed 's/.*-o //; s/ .*//')"]
)
def test_a_broken_compiler_is_a_warning_and_no_error(
    cache: Path, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "cc"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("POCL_CPU_COMPILER", str(broken))
    case = make_case(12, 67, bias=True)
    with pytest.warns(RuntimeWarning, match="could not compile or load.*eager path.*POCL_CPU_COMPILER=none"):
        result = solve(pocl_kernels.fused_linear_divergence, case)
    assert_close(result, oracle(case), 2e-6)


def test_a_compiler_that_hangs_is_a_warning_and_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: Any, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 120)

    monkeypatch.setenv("POCL_CPU_COMPILER", "sh")
    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.warns(RuntimeWarning, match="could not compile"):
        assert compiler.load(SOURCE, "answer") is None


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_rows(engine: Any, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for rows in (1, 2, 7, 24):
            case = make_case(rows, 257, bias=True)
            case = case.replace(labels=case.labels.clamp_min(0))
            call = dict(divergence="jsd", ce_weight=0.3, temperature=2.0)
            assert_close(solve(engine, case, **call), oracle(case, **call), 2e-6)
            ce = engine.cross_entropy(case.student_hidden, case.student_head, case.labels)
            assert float(ce) == pytest.approx(float(oracle(case, **call).cross_entropy), rel=2e-6)
    finally:
        torch.set_num_threads(before)


def test_a_forked_child_makes_its_own_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        case = make_case(8, 67)
        expected = solve(pocl_kernels.fused_linear_divergence, case, wanted=()).loss
        assert backend._pool.cache_info().currsize >= 1 or compiler.compiler() is None
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # no assertion of the child's may reach pytest
            try:
                # Products of matrices with more than one thread hang in a forked child whatever runs them.
                torch.set_num_threads(1)
                same = torch.equal(solve(pocl_kernels.fused_linear_divergence, case, wanted=()).loss, expected)
                os.write(write, b"1" if same and backend._pool.cache_info().currsize <= 1 else b"0")
            finally:
                os._exit(0)
        os.close(write)
        assert os.read(read, 1) == b"1"
        os.close(read)
        os.waitpid(child, 0)
    finally:
        torch.set_num_threads(before)
