"""What is skipped, resumed, redone and refused."""

from pathlib import Path
from typing import Any

import pytest

from pocl.difficulty.processes import Processes
from pocl.pipeline.engine import Step, duration, fingerprints, run_steps
from pocl.run_folder import RunFolder, RunFolderError, differences, fingerprint, write_text


class Log:
    """Steps `a` -> `b` that write a file each and note that they ran; a context and a console that do nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran, self.summaries = folder, [], {}
        self.fail: str | None = None

    def release(self) -> None: ...

    def print(self, *args: Any, **kwargs: Any) -> None: ...

    def steps(self, a: int = 1, b: int = 1) -> list[Step]:
        def work(name: str) -> Any:
            def run(context: Any) -> dict[str, str]:
                self.ran.append(name)
                write_text(self.folder / name / "partial", "x")
                if self.fail == name:
                    raise KeyboardInterrupt
                write_text(self.folder / name / "whole", "result")
                return {"note": name}

            return run

        return [
            Step("a", "", work("a"), ["a"], settings={"x": a}),
            Step("b", "", work("b"), ["b"], needs=["a"], settings={"y": b}),
        ]

    def go(self, *, change: bool = False, **settings: int) -> list[str]:
        self.ran.clear()
        folder = RunFolder(self.folder, change=change)
        run_steps(self.steps(**settings), self, folder, self, Processes.current())  # type: ignore[arg-type]
        return list(self.ran)


def test_finished_steps_are_skipped_and_their_summaries_kept(tmp_path: Path) -> None:
    log = Log(tmp_path)
    assert log.go() == ["a", "b"]
    log.summaries.clear()
    assert log.go() == []
    assert log.summaries == {"a": {"note": "a"}, "b": {"note": "b"}}


def test_a_step_that_was_cut_off_keeps_what_it_wrote_and_runs_again(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.fail = "b"
    with pytest.raises(KeyboardInterrupt):
        log.go()
    assert (tmp_path / "b" / "partial").exists()
    assert not RunFolder(tmp_path).is_finished("b", fingerprints(log.steps())["b"])
    log.fail = None
    assert log.go() == ["b"]


def test_a_full_disk_is_told_as_the_step_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(context: Any) -> dict[str, str]:
        # from now on nothing can be written, the manifest neither
        monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        raise OSError(28, "no space left to write the scores: make room")

    log, folder = Log(tmp_path), RunFolder(tmp_path)
    with pytest.raises(OSError, match="make room"):
        run_steps([Step("a", "", work, ["a"])], log, folder, log, Processes.current())  # type: ignore[arg-type]


def test_leftovers_of_other_settings_are_removed(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.fail = "b"
    with pytest.raises(KeyboardInterrupt):
        log.go(b=1)
    write_text(tmp_path / "b" / "stale", "of the old settings")
    log.fail = None
    assert log.go(b=2) == ["b"]
    assert not (tmp_path / "b" / "stale").exists()


def test_a_missing_or_truncated_output_makes_its_step_run_again(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.go()
    (tmp_path / "a" / "whole").write_text("res")
    assert log.go() == ["a"]
    (tmp_path / "b" / "whole").unlink()
    assert log.go() == ["b"]
    (tmp_path / "b" / "notes of the user").write_text("kept")
    assert log.go() == []


def test_finished_work_of_other_settings_is_refused_and_redone_only_on_request(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.go()
    with pytest.raises(RunFolderError, match="step 'b' of other inputs:\n  y: 1 in the folder, 2 now"):
        log.go(b=2)
    assert (tmp_path / "b" / "whole").exists()
    assert log.go(b=2, change=True) == ["b"]
    assert log.go(a=3, b=2, change=True) == ["a", "b"]


def test_the_fingerprint_of_a_step_covers_all_it_builds_on(tmp_path: Path) -> None:
    log = Log(tmp_path)
    base, other = fingerprints(log.steps()), fingerprints(log.steps(a=2))
    assert base["a"] != other["a"]
    assert base["b"] != other["b"]
    assert fingerprints(log.steps(b=2))["a"] == base["a"]
    assert fingerprint({"x": 1, "y": 2}) == fingerprint({"y": 2, "x": 1})


def test_a_folder_of_another_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    recipe = {"name": "a", "output": "here", "training": {"batch_size": 8, "weight_decay": 0.0}}
    RunFolder(tmp_path).claim(recipe)
    RunFolder(tmp_path).claim({**recipe, "output": "a moved folder is the same run"})
    changed = {**recipe, "training": {"batch_size": 16, "weight_decay": 0.0}}
    with pytest.raises(RunFolderError, match="another recipe:\n  training.batch_size: 8 in the folder, 16 now\n"):
        RunFolder(tmp_path).claim(changed)
    RunFolder(tmp_path, change=True).claim(changed)
    RunFolder(tmp_path).claim(changed)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match="not the folder of a run"):
        RunFolder(tmp_path).claim({"name": "a"})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "manifest.json").write_text('{"steps": ')
    with pytest.raises(RunFolderError, match="not readable"):
        RunFolder(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_text(file, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_differences_name_nested_keys_and_missing_ones() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}, "d": 3}) == [
        "a.c: 2 in the folder, None now",
        "d: None in the folder, 3 now",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (42, "42 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_people_read_no_digests_and_no_rounding_errors() -> None:
    mark = "0123456789abcdef"
    assert differences({"a": [0.1, 0.8999999999999999]}, {"a": [0.0, 1.0]}) == [
        "a: [0.1, 0.9] in the folder, [0.0, 1.0] now"
    ]
    assert differences({"test": None}, {"test": mark}) == ["test: None in the folder, a file now"]
    assert differences({"test": mark}, {"test": mark[::-1]}) == [
        "test: what lies there has changed since the folder was made"
    ]
