"""The cache of hidden states: exact, restartable, and never of the wrong teacher or data."""

import multiprocessing
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from pocl.data import Collator
from pocl.models import view_of
from pocl.models.fingerprint import model_fingerprint
from pocl.teacher import HiddenStateCache, choose_teacher
from pocl.teacher import stored as stored_module
from pocl.teacher.store import Store, plan_shards
from pocl.trainer.loading import PackedCollator

from .conftest import samples


def build(path: Path, online: Any, rows: Any, **kwargs: Any) -> HiddenStateCache:
    return HiddenStateCache.build(path, online, rows, disable_tqdm=True, **({"batch_tokens": 64} | kwargs))


def test_cached_states_are_the_online_ones_in_any_batch(tmp_path: Path, online: Any, rows: Any) -> None:
    cache = build(tmp_path / "c", online, rows)
    for chosen in (rows[:4], rows[20:27], rows[::-7], rows[3:4]):
        batch = Collator(0)(chosen)
        torch.testing.assert_close(cache.hidden_states(batch), online.hidden_states(batch), rtol=1e-5, atol=1e-5)
        assert torch.equal(cache.rows(chosen), cache.hidden_states(batch))
        packed = PackedCollator()(chosen)
        assert torch.equal(cache.hidden_states(packed), cache.hidden_states(batch))
        torch.testing.assert_close(online.hidden_states(packed), online.hidden_states(batch), rtol=1e-5, atol=1e-5)
    assert torch.equal(cache.head.weight, online.head.weight)


def test_a_table_of_rows_is_planned_and_found_as_a_list_of_them(tmp_path: Path, online: Any, rows: Any) -> None:
    rows = [*rows, rows[4] | {"sample_id": 90}, {"sample_id": 91, "input_ids": [5, 6], "labels": [-100, -100]}]
    table = Dataset.from_list(rows)
    assert plan_shards(table, 50) == plan_shards(rows, 50)
    assert plan_shards(table.select([3, 1, 2]), 50) == plan_shards([rows[3], rows[1], rows[2]], 50)
    cache = build(tmp_path / "c", online, rows[:20])
    cache.check_contains(table.select(range(20)))
    for others in (rows, table):
        with pytest.raises(ValueError, match=r"10 of 32 samples are not in it \(sample_id 20, 21, 22, 23, 24, "):
            cache.check_contains(others)


def test_a_row_longer_than_the_teachers_context_is_named(tmp_path: Path, online: Any, rows: Any) -> None:
    context = view_of(online.model).context
    assert context is not None
    ids = [5] * (context + 1)
    rows.append({"sample_id": 77, "input_ids": ids, "labels": ids})
    with pytest.raises(ValueError, match=f"sample 77 has {context + 1} tokens, .* is {context}; make rows with"):
        build(tmp_path / "c", online, rows)
    assert not (tmp_path / "c").exists()


def test_size_is_the_label_tokens_and_nothing_more(tmp_path: Path, online: Any) -> None:
    rows = samples(3000)
    tokens = sum(len(row["labels"]) - 2 for row in rows)
    cache = build(tmp_path / "c", online, rows, dtype=torch.bfloat16, batch_tokens=8192)
    size = sum(path.stat().st_size for path in (tmp_path / "c").glob("shard-*.safetensors"))
    assert cache.num_tokens == tokens
    assert HiddenStateCache.estimate_bytes(rows, 32, torch.bfloat16) == tokens * 32 * 2
    # keys and counts weigh 16 bytes a sample, which is 1 % or less from H = 100 on at this length of answers
    assert size - 16 * len(rows) == pytest.approx(tokens * 32 * 2, rel=0.01)


def test_bfloat16_is_the_rounded_float32(tmp_path: Path, online: Any, rows: Any) -> None:
    exact, rounded = build(tmp_path / "a", online, rows), build(tmp_path / "b", online, rows, dtype=torch.bfloat16)
    assert torch.equal(rounded.rows(rows), exact.rows(rows).bfloat16())


def test_samples_are_found_by_content_and_stored_once(tmp_path: Path, online: Any, rows: Any) -> None:
    twice = rows + [{**row, "sample_id": 500 + row["sample_id"]} for row in rows]
    cache = build(tmp_path / "c", online, twice)
    assert cache.num_tokens == sum(len(row["labels"]) - 2 for row in rows)
    assert torch.equal(cache.rows(twice[30:33]), cache.rows(rows[:3]))
    relabelled = [{**rows[0], "labels": [-100, *rows[0]["labels"][:1], -100, *rows[0]["labels"][3:]]}]
    assert not cache.contains(relabelled)
    other = [{**rows[0], "input_ids": [9, *rows[0]["input_ids"][1:]]}]
    with pytest.raises(ValueError, match=r"another data set.*1 of 1 samples are not in it \(sample_id 0\)"):
        cache.rows(other)


def test_rows_without_labels_take_nothing(tmp_path: Path, online: Any, rows: Any) -> None:
    cache = build(tmp_path / "c", online, rows)
    filler = {**rows[0], "labels": [-100] * len(rows[0]["labels"])}
    assert cache.rows([filler]).shape == (0, 32)
    assert torch.equal(cache.rows([filler, rows[1]]), cache.rows([rows[1]]))
    with pytest.raises(ValueError, match="no row with a label"):
        build(tmp_path / "d", online, [filler])


def test_a_build_that_was_cut_off_goes_on_and_gives_the_same_bits(
    tmp_path: Path, online: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_module, "plan_shards", lambda data, tokens: plan_shards(data, 40))
    whole = build(tmp_path / "whole", online, rows)
    calls: list[int] = []
    write = Store.write_shard

    def dies(self: Store, index: int, *args: Any) -> None:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(index)
        write(self, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "cut", online, rows)
    with pytest.raises(ValueError, match="unfinished"):
        HiddenStateCache.open(tmp_path / "cut")
    (tmp_path / "cut" / ".shard-00009.safetensors.1.tmp").write_bytes(b"half")
    monkeypatch.setattr(
        Store, "write_shard", lambda self, index, *args: (calls.append(index), write(self, index, *args))
    )
    resumed = build(tmp_path / "cut", online, rows)
    assert sorted(calls) == list(range(resumed.index["num_shards"]))
    assert not [path.name for path in (tmp_path / "cut").iterdir() if path.suffix in (".tmp", ".lock")]
    assert torch.equal(resumed.rows(rows), whole.rows(rows))


@pytest.mark.parametrize("part", ["shard-00000", "head"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_corrupted_shard_is_named_and_written_again_on_request(
    damage: str, part: str, tmp_path: Path, online: Any, rows: Any
) -> None:
    cache = build(tmp_path / "c", online, rows)
    good = cache.rows(rows)
    path = tmp_path / "c" / f"{part}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    {"cut": lambda: path.write_bytes(content[:-9]), "flipped": lambda: path.write_bytes(content), "gone": path.unlink}[
        damage
    ]()
    with pytest.raises(ValueError, match=rf"{part}\.safetensors is corrupted.*repair=True"):
        HiddenStateCache.open(tmp_path / "c", verify=True)
    repaired = build(tmp_path / "c", online, rows, repair=True)
    assert torch.equal(repaired.rows(rows), good)
    assert torch.equal(repaired.head.weight, online.head.weight)
    HiddenStateCache.open(tmp_path / "c", verify=True)


def test_a_file_of_the_cache_that_cannot_be_read_is_named(tmp_path: Path, online: Any, rows: Any) -> None:
    build(tmp_path / "c", online, rows)
    (tmp_path / "c" / "index.json").write_text('{"format": ')
    with pytest.raises(ValueError, match=r"index\.json is corrupted; remove it"):
        HiddenStateCache.open(tmp_path / "c")


def test_a_cache_of_something_else_is_refused_by_name(
    tmp_path: Path, online: Any, rows: Any, make_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    build(tmp_path / "c", online, rows, tokenizer=tiny_tokenizer, template="alpaca")
    HiddenStateCache.open(
        tmp_path / "c", teacher=online.model, tokenizer=tiny_tokenizer, template="alpaca", dataset=rows
    )
    with pytest.raises(ValueError, match="another teacher"):
        HiddenStateCache.open(tmp_path / "c", teacher=make_tiny_model(seed=2))
    with pytest.raises(ValueError, match="another template"):
        HiddenStateCache.open(tmp_path / "c", template="chat")
    with pytest.raises(ValueError, match="another tokenizer"):
        HiddenStateCache.open(
            tmp_path / "c", tokenizer=type("T", (), {"get_vocab": lambda s: {"a": 1}, "all_special_tokens": []})()
        )
    with pytest.raises(ValueError, match="another data set"):
        HiddenStateCache.open(tmp_path / "c", dataset=samples(3, seed=5))
    with pytest.raises(ValueError, match="another teacher, another data set"):
        build(tmp_path / "c", make_tiny_model(seed=2), samples(3, seed=5))
    with pytest.raises(ValueError, match="holds no cache"):
        HiddenStateCache.open(tmp_path / "nothing")


def test_too_small_a_disk_is_said_before_anything_is_written(
    tmp_path: Path, online: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(OSError, match=r"needs .* GB in .*, and 0\.00 GB are free"):
        build(tmp_path / "c", online, rows)
    assert not (tmp_path / "c").exists()


def test_a_cache_goes_to_worker_processes(tmp_path: Path, online: Any, rows: Any) -> None:
    cache = build(tmp_path / "c", online, rows)
    cache.rows(rows[:2])
    assert torch.equal(pickle.loads(pickle.dumps(cache)).rows(rows[:5]), cache.rows(rows[:5]))


def test_processes_share_the_work_and_take_over_from_a_dead_one(
    tmp_path: Path, online: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_module, "plan_shards", lambda data, tokens: plan_shards(data, 40))
    write = Store.write_shard

    def start(pause: float) -> Any:
        def slowly(self: Store, *args: Any) -> None:
            time.sleep(pause)
            write(self, *args)

        with monkeypatch.context() as patch:  # the child keeps what it was born with
            patch.setattr(Store, "write_shard", slowly)
            process = multiprocessing.get_context("fork").Process(target=build, args=(tmp_path / "c", online, rows))
            process.start()
        return process

    first, second = start(3600), start(0.05)
    try:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "c").glob("shard-*.json"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.kill()
        second.join(60)
        assert second.exitcode == 0
    finally:
        first.kill()
        second.kill()
    cache = HiddenStateCache.open(tmp_path / "c", verify=True)
    batch = Collator(0)(rows)
    torch.testing.assert_close(cache.hidden_states(batch), online.hidden_states(batch), rtol=1e-5, atol=1e-5)


def test_the_choice_follows_passes_disk_and_policy_and_says_why() -> None:
    assert choose_teacher(20, 10**9, 10**12).cached
    for choice in (
        choose_teacher(1, 10**9, 10**12),
        choose_teacher(20, 10**12, 10**12),
        choose_teacher(20, 1, 10**9, on_policy=True),
    ):
        assert not choice.cached
        assert choice.reason.startswith("online: ")


def test_a_model_is_known_by_its_weights_and_by_what_it_computes_with_them(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model(seed=1)
    mark = model_fingerprint(model)
    model.config.pad_token_id = 7  # as a tokenizer without padding makes people do
    model.config._name_or_path = "elsewhere"
    assert model_fingerprint(model) == mark
    model.config.rms_norm_eps = 0.5
    assert model_fingerprint(model) != mark
    other = make_tiny_model(seed=2)
    assert model_fingerprint(other) != mark
