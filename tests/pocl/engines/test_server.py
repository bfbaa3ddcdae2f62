"""A teacher on a server: what it says is stored as it was said, and a server that cannot be trusted is refused."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl.engines import ServerEngine, ServerError
from pocl.generation import GenerationSettings
from pocl.teacher import HiddenStateCache, TopKCache
from pocl.teacher import stored as stored_module
from pocl.teacher.store import plan_shards

from ..teacher.conftest import samples
from .small_server import SmallServer, serving


@pytest.fixture
def server() -> Iterator[SmallServer]:
    with serving() as made:
        yield made


@pytest.fixture
def engine(server: SmallServer, shared_tokenizer: Any) -> ServerEngine:
    return asking(server, shared_tokenizer)


def asking(server: SmallServer, tokenizer: Any, **options: Any) -> ServerEngine:
    return ServerEngine(server.url, "big", tokenizer=tokenizer, **{"retries": 2, "backoff": 0.01, **options})


def expected(server: SmallServer, rows: Any, k: int) -> Any:
    before = torch.tensor([token for row in rows for token in row["input_ids"][1:-1]])
    return server.table[before].topk(k)


def build(path: Path, engine: ServerEngine, rows: Any, **options: Any) -> TopKCache:
    return TopKCache.build(path, engine, rows, **{"top_k": 7, "disable_tqdm": True, **options})


def test_a_cache_holds_what_the_server_says(tmp_path: Path, server: SmallServer, engine: ServerEngine) -> None:
    rows = samples(40)
    server.pause = 0.01
    cache = build(tmp_path / "c", engine, rows)
    ids, log_probs = cache.rows(rows)
    found = expected(server, rows, 7)
    assert torch.equal(ids.long(), found.indices)
    torch.testing.assert_close(log_probs, found.values)
    assert 8 <= server.most_busy <= 16
    assert cache.index["engine"] == "server"
    first = torch.cat(engine.log_probs_of(rows))
    own = torch.tensor(
        [
            float(server.table[a, b])
            for row in rows
            for a, b in zip(row["input_ids"][1:], row["input_ids"][2:], strict=False)
        ]
    )
    torch.testing.assert_close(first, own)
    asked = len(server.asked)
    build(tmp_path / "c", asking(server, engine.tokenizer), rows)
    assert len(server.asked) - asked == 3, "what is there is not asked for again; the model is recognised"


def test_answers_are_token_ids_up_to_the_end(server: SmallServer, engine: ServerEngine) -> None:
    settings = GenerationSettings(max_new_tokens=6)
    found = engine.answers([[5, 6], [9]], settings, eos_token_ids=[1], sample_ids=[0, 1])
    token = int(server.table[6].argmax())
    assert found[0][0] == token
    assert engine.answers([[5, 6]], settings, eos_token_ids=[token], sample_ids=[0]) == [[]]
    with pytest.raises(ValueError, match="no_repeat_ngram_size is a rule that servers do not know"):
        engine.answers([[5]], GenerationSettings(no_repeat_ngram_size=3), eos_token_ids=[1], sample_ids=[0])


WRONG = {
    "max_logprobs": (
        ValueError,
        r"greater than max allowed: 5.*start the server with --max-logprobs 7 .* or lower top_k",
    ),
    "fewer": (ValueError, r"gives \d log-probabilities where 7 were asked for; start it with --max-logprobs 7"),
    "other_tokenizer": (ValueError, r"another tokenizer than the student: token \d+ is '.w\d+' there and 'w\d+' here"),
    "shifted": (ValueError, "log-probabilities of prompts that are shifted by one token"),
    "one_off": (ValueError, r"tells nothing of token 1 of sample \d+: they are shifted by one token"),
    "nan": (ValueError, r"token 1 of sample \d+: a log-probability is not finite"),
    "tempered": (ValueError, r"not those of the next token at temperature 1: they are .* nats from"),
    "logits": (ValueError, r"its numbers are no log-probabilities: the largest is .*sum to"),
    "no_prompt_logprobs": (ValueError, r"log-probabilities of none tokens of sample \d+.*must .* know prompt_logprobs"),
    "writes_nothing": (ValueError, "gives no log-probabilities of what it writes"),
    "no_json": (ServerError, r"answers /v1/completions with no JSON object \(<html>a proxy</html>\)"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_server_that_answers_wrongly_is_refused_in_words(
    how: str, tmp_path: Path, server: SmallServer, engine: Any
) -> None:
    server.how = how
    kind, message = WRONG[how]
    with pytest.raises(kind, match=message):
        build(tmp_path / "c", engine, samples(6))
    assert not list(tmp_path.glob("c/shard-*.safetensors"))


def test_what_a_busy_server_asks_for_is_respected(tmp_path: Path, server: SmallServer, shared_tokenizer: Any) -> None:
    rows = samples(5)
    engine = asking(server, shared_tokenizer, in_flight=1)
    server.refuse_next = [(429, {"Retry-After": "1"}), (503, {})]
    server.hang_up_next = 0
    started = time.monotonic()
    ids, _ = build(tmp_path / "c", engine, rows).rows(rows)
    assert 1 <= time.monotonic() - started < 20
    assert torch.equal(ids.long(), expected(server, rows, 7).indices)
    assert server.most_busy == 1
    server.refuse_next = [(503, {})] * 3
    with pytest.raises(ServerError, match=r"still busy or broken after all attempts \(HTTP 503.* goes on from there"):
        engine.top_k(rows, 7)


def test_a_build_goes_on_when_its_server_comes_back(
    tmp_path: Path, server: SmallServer, shared_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_module, "plan_shards", lambda data, tokens: plan_shards(data, 40))
    rows, engine = samples(20), asking(server, shared_tokenizer, in_flight=2)
    answer = engine._choice
    left = [12]

    def dies(*args: Any, **details: Any) -> Any:
        left[0] -= 1
        server.hang_up_next = 99 if left[0] < 0 else 0
        return answer(*args, **details)

    monkeypatch.setattr(engine, "_choice", dies)
    with pytest.raises(ServerError, match=r"cannot be reached .* Whole shards of what it said are kept"):
        build(tmp_path / "c", engine, rows)
    server.hang_up_next = 0
    kept = len(list(tmp_path.glob("c/shard-*.safetensors")))
    assert kept > 0
    asked = len(server.asked)
    cache = build(tmp_path / "c", asking(server, shared_tokenizer), rows)
    assert torch.equal(cache.rows(rows)[0].long(), expected(server, rows, 7).indices)
    assert len(server.asked) - asked < len(rows) + 4, "finished shards are not asked for again"


def test_another_model_under_the_same_name_is_noticed(
    tmp_path: Path, server: SmallServer, shared_tokenizer: Any
) -> None:
    rows = samples(6)
    build(tmp_path / "c", asking(server, shared_tokenizer), rows)
    server.reseed(9)
    with pytest.raises(ValueError, match=r"has another model under the name 'big' than when .* was begun"):
        build(tmp_path / "c", asking(server, shared_tokenizer), rows)
    other = ServerEngine(server.url, "other", tokenizer=shared_tokenizer)
    with pytest.raises(ValueError, match="the cache of another teacher"):
        build(tmp_path / "c", other, rows)


def test_padding_of_the_teachers_vocabulary_goes_to_the_tail(server: SmallServer, engine: ServerEngine) -> None:
    server.how = "padded"
    rows = samples(3)
    ids, log_probs = engine.top_k(rows, 4)
    assert set(ids[:, -1].tolist()) == {-1}
    assert torch.equal(ids[:, 0].long(), expected(server, rows, 1).indices[:, 0])
    assert bool((log_probs[:, -1] == -torch.inf).all())


def test_what_a_server_cannot_do_is_said_before_it_is_asked(
    tmp_path: Path, server: SmallServer, engine: ServerEngine, monkeypatch: pytest.MonkeyPatch, shared_tokenizer: Any
) -> None:
    rows = samples(3)
    with pytest.raises(ValueError, match=r"a server gives no hidden states; store the likeliest tokens"):
        HiddenStateCache.build(tmp_path / "c", engine, rows)
    with pytest.raises(ValueError, match=r"has no model 'small'; it has 'big', 'other'"):
        ServerEngine(server.url, "small", tokenizer=shared_tokenizer).top_k(rows, 3)
    with pytest.raises(
        ValueError, match=r"sample 5 has 128 tokens, and the context of the teacher, in the engine server, is 127"
    ):
        build(tmp_path / "c", engine, [{"sample_id": 5, "input_ids": [9] * 128, "labels": [9] * 128}])
    for url, message in (
        ("localhost:8000", "server must be a URL such as http://localhost:8000"),
        ("http://me:secret@host", "URL without user, password or query: keys come from the environment"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            ServerEngine(url, "big", tokenizer=shared_tokenizer)
        assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="in_flight must be at least 1, got 0"):
        asking(server, shared_tokenizer, in_flight=0)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="the environment variable NO_SUCH_KEY, which is not set"):
        asking(server, shared_tokenizer, api_key_env="NO_SUCH_KEY")
    slow = asking(server, shared_tokenizer, timeout=0.1, retries=0)
    slow._find_model()
    server.pause = 1.0
    with pytest.raises(ServerError, match="does not answer within 0.1 s; ask fewer at a time"):
        slow.top_k(rows, 3)
    with pytest.raises(ServerError, match=r"cannot be reached \(NewConnectionError\); start it, or correct the URL"):
        ServerEngine("http://127.0.0.1:9", "big", tokenizer=shared_tokenizer, retries=0).top_k(rows, 3)


def test_a_key_goes_to_the_server_and_nowhere_else(
    tmp_path: Path, server: SmallServer, shared_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "a-secret-key")
    engine, rows = asking(server, shared_tokenizer, api_key_env="MY_KEY", retries=0), samples(4)
    build(tmp_path / "c", engine, rows)
    assert server.keys == {"Bearer a-secret-key"}
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"a-secret" in file.read_bytes()]
    server.refuse_next = [(503, {})]
    with pytest.raises(ServerError) as caught:
        engine.top_k(rows, 7)
    assert "***" in str(caught.value)
    assert "a-secret" not in str(caught.value)
    server.refuse_next = [(401, {})] * 9
    with pytest.raises(ServerError, match=r"wants another key \(HTTP 401\); set api_key_env"):
        engine.top_k(rows, 7)
