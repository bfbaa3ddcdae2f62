"""A scoring run that is cut off, damaged, streamed or shared among processes ends in the same bytes."""

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import pocl.difficulty.measure as measure_module
import pocl.difficulty.store as store_module
from pocl.data import load_examples
from pocl.difficulty import score
from pocl.difficulty.processes import Processes
from pocl.difficulty.scoring import Scorer
from pocl.difficulty.store import ShardStore, StoreError
from pocl.generation import GenerationSettings

SETTINGS = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Any]) -> Any:
    return make_tiny_model(seed=3)


@pytest.fixture
def examples(tiny_pairs: list[dict[str, str]]) -> Dataset:
    return load_examples(tiny_pairs)


def _score(model: Any, tokenizer: Any, data: Any, folder: Path | None, **options: Any) -> Dataset:
    options = {"template": "plain", "generation": SETTINGS, "shard_size": 7, "progress": False, **options}
    return score(model, tokenizer, data, output_dir=folder, **options)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}


@pytest.fixture
def whole(model: Any, tiny_tokenizer: Any, examples: Dataset, tmp_path: Path) -> dict[str, bytes]:
    """The files of a run that nothing disturbed."""
    _score(model, tiny_tokenizer, examples, tmp_path / "whole")
    return _bytes(tmp_path / "whole")


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Ctrl-C while the shard after `calls` finished ones is in the works."""
    original, count = Scorer.__call__, [0]

    def call(self: Scorer, *args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] > calls:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    monkeypatch.setattr(Scorer, "__call__", call)


def test_a_folder_and_memory_give_the_same_table(
    model: Any, tiny_tokenizer: Any, examples: Dataset, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    stored = Dataset.from_parquet(str(tmp_path / "whole" / "scores.parquet"), cache_dir=str(tmp_path / "cache"))
    assert stored.to_dict() == _score(model, tiny_tokenizer, examples, None).to_dict()
    assert len(whole) == 8  # 48 samples in shards of 7, and the table


@pytest.mark.parametrize("finished", [0, 1, 4, 6])
def test_an_interrupted_run_goes_on_with_the_next_shard_and_ends_in_the_same_bytes(
    model: Any,
    tiny_tokenizer: Any,
    examples: Dataset,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    finished: int,
) -> None:
    with monkeypatch.context() as patch:
        _interrupt_after(patch, finished)
        with pytest.raises(KeyboardInterrupt):
            _score(model, tiny_tokenizer, examples, tmp_path / "cut")
    assert len(_bytes(tmp_path / "cut")) == finished
    calls: list[int] = []
    original = Scorer.__call__
    monkeypatch.setattr(Scorer, "__call__", lambda self, *a, **o: calls.append(1) or original(self, *a, **o))
    _score(model, tiny_tokenizer, examples, tmp_path / "cut")
    assert len(calls) == 7 - finished
    assert _bytes(tmp_path / "cut") == whole


def test_a_damaged_shard_is_scored_again_and_said(
    model: Any,
    tiny_tokenizer: Any,
    examples: Dataset,
    tmp_path: Path,
    whole: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "whole"
    truncated, flipped = folder / "shards" / "00002.parquet", folder / "shards" / "00004.parquet"
    truncated.write_bytes(truncated.read_bytes()[:-20])
    content = bytearray(flipped.read_bytes())
    content[40] ^= 1
    flipped.write_bytes(bytes(content))
    _score(model, tiny_tokenizer, examples, folder)
    assert _bytes(folder) == whole
    assert caplog.text.count("is not readable") == 2


def test_a_stream_is_scored_like_a_table(
    model: Any, tiny_tokenizer: Any, examples: Dataset, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    _score(model, tiny_tokenizer, examples.to_iterable_dataset(), tmp_path / "stream")
    assert _bytes(tmp_path / "stream") == whole


def test_rows_that_fit_are_kept_from_the_first_run(
    model: Any, tiny_tokenizer: Any, examples: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots: list[int] = []
    engine = measure_module.SlotEngine
    spy = lambda *args, **options: slots.append(options["slots"]) or engine(*args, **options)  # noqa: E731
    monkeypatch.setattr(measure_module, "SlotEngine", spy)
    for fits in (3, 5):
        monkeypatch.setattr("pocl.difficulty.scoring.rows_that_fit", lambda *_, fits=fits, **__: fits)
        _score(model, tiny_tokenizer, examples.select(range(10)), tmp_path)
        (tmp_path / "shards" / "00000.parquet").unlink()
    assert slots == [3, 3, 3]  # two shards in the first run, one in the second


@pytest.mark.usefixtures("whole")
def test_a_folder_of_another_run_is_refused_with_what_changed(
    model: Any, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, examples: Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    with pytest.raises(
        ValueError, match=r"scores of another run:\n  model.weights: .*\n  answers.settings.max_new_tokens: 8 in"
    ):
        _score(make_tiny_model(seed=4), tiny_tokenizer, examples, folder, generation=GenerationSettings(9))
    with pytest.raises(ValueError, match=r"batches.shard_size: 7 in the folder, 8 now"):
        _score(model, tiny_tokenizer, examples, folder, shard_size=8)
    changed = load_examples([{**row, "response": row["response"] + " w1"} for row in examples.to_list()][::-1])
    with pytest.raises(ValueError, match=r"00000.parquet was scored from other samples"):
        _score(model, tiny_tokenizer, changed, folder)


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"stem": False}, "batches.stem: True in the folder, False now"),
        ({"max_batch_tokens": 512}, "batches.max_batch_tokens: 4096 in the folder, 512 now"),
        ({"max_length": 100}, "rows.max_length: 512 in the folder, 100 now"),
        ({"max_prompt_length": 100}, "rows.max_prompt_length: 256 in the folder, 100 now"),
        ({"template": "alpaca"}, "rows.template: 'plain' in the folder, 'alpaca' now"),
        ({"batch_size": 2}, "answers.rows: None in the folder, 2 now"),
        ({"backend": "transformers"}, "answers.backend: 'slots' in the folder, 'transformers' now"),
        ({"answers": False, "generation": None}, "answers: {.*} in the folder, None now"),
        ({"generation": GenerationSettings(8, no_repeat_ngram_size=3)}, "answers.settings.no_repeat_ngram_size: 0 in"),
        ({"generation": GenerationSettings(8, do_sample=True)}, "answers.settings.do_sample: False in the folder"),
        ({"generation": GenerationSettings(8, seed=1)}, "answers.settings.seed: 0 in the folder, 1 now"),
    ],
)
def test_every_setting_that_decides_a_score_is_part_of_the_fingerprint(
    model: Any, tiny_tokenizer: Any, examples: Dataset, tmp_path: Path, options: dict[str, Any], changed: str
) -> None:
    with pytest.raises(ValueError, match=rf"scores of another run:\n  {changed}"):
        _score(model, tiny_tokenizer, examples, tmp_path / "whole", **options)


@pytest.mark.usefixtures("whole")
def test_models_and_tokenizer_are_part_of_the_fingerprint(
    model: Any, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, examples: Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    with pytest.raises(ValueError, match=r"run:\n  teacher: None in the folder"):
        _score(model, tiny_tokenizer, examples, folder, teacher=make_tiny_model(seed=4))
    turned = make_tiny_model(seed=3, rope_parameters={"rope_theta": 500.0, "rope_type": "default"})  # equal weights
    with pytest.raises(
        ValueError, match=r"run:\n  model.config.rope_parameters.rope_theta: 10000.0 in the folder, 500"
    ):
        _score(turned, tiny_tokenizer, examples, folder)
    tiny_tokenizer.add_tokens(["another"])
    with pytest.raises(ValueError, match=r"run:\n  tokenizer: "):
        _score(model, tiny_tokenizer, examples, folder)


@pytest.mark.usefixtures("whole")
def test_samples_of_other_ids_or_references_are_others_even_with_equal_tokens(
    model: Any, tiny_tokenizer: Any, examples: Dataset, tmp_path: Path
) -> None:
    renumbered = examples.remove_columns("id").add_column("id", [i + 1 for i in examples["id"]])
    with pytest.raises(ValueError, match=r"00000.parquet was scored from other samples"):
        _score(model, tiny_tokenizer, renumbered, tmp_path / "whole")
    unknown, other = (
        load_examples([{"prompt": "w1", "completion": f"w2 {word}"}]) for word in ("unknown", "unheard")
    )  # both are <unk> to the tokenizer, but not to ROUGE-L
    _score(model, tiny_tokenizer, unknown, tmp_path / "one")
    with pytest.raises(ValueError, match=r"00000.parquet was scored from other samples"):
        _score(model, tiny_tokenizer, other, tmp_path / "one")


@pytest.mark.parametrize("content", ['{"run": ', "{}", "[]", '{"run": 1, "found": {}}', "\xff"])
def test_a_manifest_that_cannot_be_read_is_refused_with_what_to_do(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(StoreError, match=rf"manifest.json is not readable .* remove {tmp_path} to score again"):
        ShardStore(tmp_path).open({"model": 1}, {})


def test_scores_that_were_removed_are_scored_again(
    model: Any, tiny_tokenizer: Any, examples: Dataset, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    _score(model, tiny_tokenizer, examples, tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "shards")
    _score(model, tiny_tokenizer, examples, tmp_path / "one")
    assert _bytes(tmp_path / "one") == whole


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def test_a_full_disk_stops_cleanly_and_keeps_what_is_written(
    number: int,
    model: Any,
    tiny_tokenizer: Any,
    examples: Dataset,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, folder = os.fsync, tmp_path / "full"

    def full(descriptor: int) -> None:
        if (folder / "shards" / "00002.parquet").exists():
            raise OSError(number, os.strerror(number))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "fsync", full)
        with pytest.raises(OSError, match=r"no space left to write 00003.parquet .* what was written before is kept"):
            _score(model, tiny_tokenizer, examples, folder)
    assert [p.name for p in sorted((folder / "shards").iterdir())] == [f"0000{i}.parquet" for i in range(3)]
    _score(model, tiny_tokenizer, examples, folder)
    assert _bytes(folder) == whole


# -------------------------------------------------------------------------------------------------------- processes


def test_two_and_four_processes_write_the_bytes_of_one(
    model: Any,
    tiny_tokenizer: Any,
    examples: Dataset,
    tmp_path: Path,
    whole: dict[str, bytes],
    start_processes: Callable[..., list[Any]],
) -> None:
    for size in (2, 4):
        processes = start_processes(lambda: _score(model, tiny_tokenizer, examples, tmp_path / str(size)), size)  # noqa: B023
        for process in processes:
            process.join(timeout=120)
        assert [process.exitcode for process in processes] == [0] * size
        assert _bytes(tmp_path / str(size)) == whole


def test_an_error_of_the_first_process_ends_all(
    model: Any,
    tiny_tokenizer: Any,
    examples: Dataset,
    tmp_path: Path,
    whole: dict[str, bytes],
    start_processes: Callable[..., list[Any]],
) -> None:
    def work() -> None:
        with pytest.raises(ValueError, match=r"batches.shard_size: 7 in the folder, 8 now"):
            _score(model, tiny_tokenizer, examples, tmp_path / "whole", shard_size=8)

    for process in (processes := start_processes(work, 2)):
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]


def test_several_processes_need_a_folder(
    model: Any, tiny_tokenizer: Any, examples: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "current", classmethod(lambda cls: cls(rank=1, size=2)))
    with pytest.raises(ValueError, match="output_dir is needed to share the work among 2 processes"):
        _score(model, tiny_tokenizer, examples, None)


def test_a_killed_process_is_taken_up_and_ends_in_the_same_bytes(
    model: Any,
    tiny_tokenizer: Any,
    examples: Dataset,
    tmp_path: Path,
    whole: dict[str, bytes],
    start_processes: Callable[..., list[Any]],
) -> None:
    folder = tmp_path / "killed"
    (process,) = start_processes(lambda: _score(model, tiny_tokenizer, examples, folder))
    deadline = time.monotonic() + 60
    while len(_bytes(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 2 <= len(_bytes(folder)) < len(whole)
    _score(model, tiny_tokenizer, examples, folder)
    assert _bytes(folder) == whole
