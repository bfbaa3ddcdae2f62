"""The cache of likely tokens: what float64 says, in little memory, restartable to the byte."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pocl.data import Collator
from pocl.engines import LocalEngine
from pocl.engines.top_k import top_log_probs
from pocl.teacher import HiddenStateCache, TopKCache
from pocl.teacher import stored as stored_module
from pocl.teacher.store import Store, plan_shards
from pocl_kernels import Head
from pocl_kernels.reference import logits as logits_of

from .conftest import samples


def build(path: Path, teacher: Any, rows: Any, **kwargs: Any) -> TopKCache:
    return TopKCache.build(path, teacher, rows, disable_tqdm=True, **({"batch_tokens": 64, "top_k": 8} | kwargs))


def shards(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("shard-*.safetensors")}


@pytest.mark.parametrize(
    "head", [{}, {"bias": True}, {"scale": 0.3, "softcap": 4.0}, {"dtype": torch.bfloat16}], ids=str
)
@pytest.mark.parametrize("k", [1, 7, 300])
def test_likeliest_tokens_are_those_of_float64_in_any_chunks(head: dict[str, Any], k: int) -> None:
    options = dict(head)
    dtype = options.pop("dtype", torch.float32)
    bias = torch.randn(300).to(dtype) if options.pop("bias", False) else None
    hidden, whole = torch.randn(21, 16).to(dtype), Head(torch.randn(300, 16).to(dtype), bias, **options)
    expected = logits_of(hidden, whole).log_softmax(-1).topk(k)
    for rows, columns in ((512, 16_384), (4, 7), (21, 300)):
        ids, log_probs = top_log_probs(hidden, whole, k, rows=rows, columns=columns)
        assert (ids.dtype, log_probs.dtype) == (torch.int32, torch.float32)
        torch.testing.assert_close(log_probs.double(), expected.values, rtol=1e-5, atol=1e-5)
        assert torch.equal(
            logits_of(hidden, whole).gather(1, ids.long()).argsort(1, descending=True)[:, 0], torch.zeros(21)
        )
        assert all(len(set(row)) == k for row in ids.tolist())


class Largest(TorchDispatchMode):
    """The most numbers that one new tensor has held."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and not func.is_view:
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_logits_of_a_whole_vocabulary_are_never_made() -> None:
    hidden, head = torch.randn(50, 4), Head(torch.randn(2_000, 4))
    with Largest() as largest:
        top_log_probs(hidden, head, 5, rows=10, columns=100)
    assert largest.numbers == 10 * 100


def test_logits_that_are_not_finite_are_refused() -> None:
    hidden = torch.randn(6, 4)
    hidden[3] = torch.nan
    with pytest.raises(ValueError, match="logits of row 3 are not finite"):
        top_log_probs(hidden, Head(torch.randn(50, 4)), 5, rows=2)


def test_a_batch_is_given_what_the_online_teacher_says(tmp_path: Path, online: Any, rows: Any) -> None:
    cache = build(tmp_path / "c", online, rows)
    chosen = [*rows[20:27], *rows[::-7]]
    expected = (online.hidden_states(Collator(0)(chosen)) @ online.head.weight.T).double().log_softmax(-1).topk(8)
    ids, log_probs = cache.rows(chosen)
    torch.testing.assert_close(log_probs.double(), expected.values, rtol=1e-5, atol=1e-5)
    assert (ids == expected.indices).double().mean() > 0.99  # but for tokens that are equally likely
    assert cache.num_tokens == sum(len(row["labels"]) - 2 for row in rows)
    assert cache.mean_tail() == pytest.approx(float(1 - cache.rows(rows)[1].exp().sum(-1).mean()), abs=1e-6)
    assert [part.shape for part in cache.rows([{**rows[0], "labels": [-100] * len(rows[0]["labels"])}])] == [(0, 8)] * 2


def test_size_is_eight_bytes_an_entry(tmp_path: Path, online: Any) -> None:
    rows = samples(400)
    build(tmp_path / "c", online, rows, batch_tokens=8192, top_k=64)
    size = sum(path.stat().st_size for path in (tmp_path / "c").glob("shard-*.safetensors"))
    assert TopKCache.estimate_bytes(rows, 64) == 512 * sum(len(row["labels"]) - 2 for row in rows)
    assert size - 16 * len(rows) == pytest.approx(TopKCache.estimate_bytes(rows, 64), rel=0.01)
    assert not (tmp_path / "c" / "head.safetensors").exists()


def test_a_build_that_was_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, online: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_module, "plan_shards", lambda data, tokens: plan_shards(data, 40))
    build(tmp_path / "whole", online, rows)
    write, killed = Store.write_shard, tmp_path / "killed"

    def stops_at_third(self: Store, index: int, *args: Any) -> None:
        if index == 2:
            (self.folder / ".shard-00002.safetensors.1.tmp").write_bytes(b"half")
            time.sleep(3600)
        write(self, index, *args)

    with monkeypatch.context() as patch:  # the child keeps what it was born with
        patch.setattr(Store, "write_shard", stops_at_third)
        process = multiprocessing.get_context("fork").Process(target=build, args=(killed, online, rows))
        process.start()
    try:
        deadline = time.monotonic() + 60
        while not (killed / ".shard-00002.safetensors.1.tmp").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()
    assert len(shards(killed)) == 2
    with pytest.raises(ValueError, match=r"is unfinished; \(re\)start TopKCache.build"):
        TopKCache.open(killed)
    build(killed, online, rows)
    assert shards(killed) == shards(tmp_path / "whole")
    assert len(shards(killed)) > 3
    TopKCache.open(killed, teacher=online.model, dataset=rows, verify=True)


def test_another_kind_or_size_of_cache_is_refused_by_name(
    tmp_path: Path, online: Any, rows: Any, make_tiny_model: Callable[..., Any]
) -> None:
    build(tmp_path / "c", online, rows)
    with pytest.raises(ValueError, match=r"another kind \(hidden states or top-k\)"):
        HiddenStateCache.open(tmp_path / "c")
    with pytest.raises(ValueError, match="the cache of another top_k"):
        build(tmp_path / "c", online, rows, top_k=9)
    with pytest.raises(ValueError, match="the cache of another teacher"):
        TopKCache.open(tmp_path / "c", teacher=make_tiny_model(seed=2))
    HiddenStateCache.build(tmp_path / "h", online, rows, disable_tqdm=True)
    with pytest.raises(ValueError, match=r"another kind \(hidden states or top-k\)"):
        TopKCache.open(tmp_path / "h")
    for k in (0, 1_001):
        with pytest.raises(ValueError, match=f"top_k must be between 1 and the 1000 tokens of the vocabulary, got {k}"):
            build(tmp_path / "d", online, rows, top_k=k)
    with pytest.raises(ValueError, match="teacher must be a model, an OnlineTeacher or an engine .* got str"):
        build(tmp_path / "d", "teacher", rows)


def test_the_engine_of_this_process_says_one_thing_in_three_forms(online: Any, rows: Any) -> None:
    engine = LocalEngine(online.model, batch_tokens=40)
    hidden = engine.hidden_states(rows)
    log_probs = (hidden @ online.head.weight.T).double().log_softmax(-1)
    labels = torch.cat([torch.tensor(row["labels"])[2:] for row in rows])
    own = engine.log_probs_of(rows)
    assert [len(each) for each in own] == [len(row["labels"]) - 2 for row in rows]
    torch.testing.assert_close(
        torch.cat(own).double(), log_probs.gather(1, labels[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(engine.top_k(rows, 3)[1].double(), log_probs.topk(3).values, rtol=1e-5, atol=1e-5)
