"""vLLM and its server, really: the same answers, scores and states as transformers', and servers that go and come."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pocl.cli import app
from pocl.difficulty import score
from pocl.embedded import cut_layers, question_answer_pairs
from pocl.engines import LocalEngine, ServerEngine, VLLMEngine
from pocl.evaluate import evaluate
from pocl.generation import GenerationSettings
from pocl.teacher import HiddenStateCache, TopKCache
from pocl.teacher import stored as stored_module
from pocl.teacher.store import plan_shards

from .conftest import MODEL, Server

GREEDY = GenerationSettings(max_new_tokens=16, no_repeat_ngram_size=6)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def test_ranking_and_evaluation_are_those_of_transformers(model: Any, teacher: Path, tokenizer: Any, rows: Any) -> None:
    options: dict[str, Any] = {"generation": GREEDY, "progress": False}
    with VLLMEngine(teacher, dtype="float32", max_model_len=128) as engine:
        mine = score(model, tokenizer, rows, engine=engine, **options)
        judged = evaluate(model, tokenizer, rows, engine=engine, **options)
        sampled = GenerationSettings(max_new_tokens=8, do_sample=True, seed=4)
        prompts, ends = (
            [row["input_ids"][: row["prompt_length"]] for row in rows],
            {"eos_token_ids": [tokenizer.eos_token_id]},
        )
        one = engine.answers(prompts, sampled, sample_ids=range(24), **ends)
        assert engine.answers(prompts[::-1], sampled, sample_ids=range(23, -1, -1), **ends)[::-1] == one
    theirs = score(model, tokenizer, rows, **options)
    assert mine.column_names == theirs.column_names
    assert mine["response"] == theirs["response"]
    assert mine["rouge_l"] == theirs["rouge_l"]
    assert mine["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-4)
    assert judged.metrics() == pytest.approx(evaluate(model, tokenizer, rows, **options).metrics(), rel=1e-4)


def test_both_caches_are_those_of_transformers(
    tmp_path: Path, model: Any, teacher: Path, tokenizer: Any, rows: Any
) -> None:
    build: dict[str, Any] = {"tokenizer": tokenizer, "disable_tqdm": True}
    with VLLMEngine(teacher, dtype="float32", max_model_len=128) as engine:
        likely = TopKCache.build(tmp_path / "k", engine, rows, top_k=32, **build)
        hidden = HiddenStateCache.build(tmp_path / "h", engine, rows, **build)
    local = LocalEngine(model)
    assert relative(hidden.rows(rows), local.hidden_states(rows)) <= 1e-5
    assert torch.equal(hidden.head.weight, local.head().weight)
    ids, log_probs = local.top_k(rows, 32)
    torch.testing.assert_close(likely.rows(rows)[1], log_probs, rtol=1e-4, atol=1e-4)
    assert float((likely.rows(rows)[0] == ids).double().mean()) > 0.99


def test_a_served_teacher_is_stored_and_one_that_dies_is_waited_for(
    tmp_path: Path, server: Server, model: Any, tokenizer: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_module, "plan_shards", lambda data, tokens: plan_shards(data, 60))
    engine = ServerEngine(server.url, MODEL, tokenizer=tokenizer, in_flight=4, retries=60, backoff=0.5)
    killed: list[float] = []
    ask = engine.client.ask

    def counted(path: str, question: Any = None) -> Any:
        reply = ask(path, question)
        if len(killed) < 2 and len(list(tmp_path.glob("c/shard-*.json"))) > 2 * len(killed):
            killed.append(time.monotonic())  # in the midst of the others' questions
            server.kill()
            threading.Thread(target=server.start).start()
        return reply

    monkeypatch.setattr(engine.client, "ask", counted)
    cache = TopKCache.build(tmp_path / "c", engine, rows, top_k=32, tokenizer=tokenizer, disable_tqdm=True)
    assert len(killed) == 2
    ids, log_probs = LocalEngine(model).top_k(rows, 32)
    torch.testing.assert_close(cache.rows(rows)[1], log_probs, rtol=1e-4, atol=1e-4)
    assert float((cache.rows(rows)[0] == ids).double().mean()) > 0.99


def test_a_real_server_that_gives_too_little_is_refused_in_words(
    tmp_path: Path, server: Server, tokenizer: Any, shared_tokenizer: Any, rows: Any
) -> None:
    with pytest.raises(ValueError, match=r"start the server with --max-logprobs 64 .* or lower top_k"):
        TopKCache.build(tmp_path / "a", ServerEngine(server.url, MODEL, tokenizer=tokenizer), rows, top_k=64)
    with pytest.raises(ValueError, match=f"has no model 'gpt2'; it has '{MODEL}'"):
        TopKCache.build(tmp_path / "a", ServerEngine(server.url, "gpt2", tokenizer=tokenizer), rows)
    small = [{"sample_id": 1, "input_ids": list(range(5, 20)), "labels": list(range(5, 20))}]
    with pytest.raises(ValueError, match="has another tokenizer than the student"):
        TopKCache.build(tmp_path / "a", ServerEngine(server.url, MODEL, tokenizer=shared_tokenizer), small, top_k=8)


@pytest.mark.parametrize("place", ["server", "vllm"])
def test_a_recipe_with_its_teacher_elsewhere_runs_to_its_report(
    place: str, tmp_path: Path, server: Server, teacher: Path, model: Any, tokenizer: Any
) -> None:
    student = cut_layers(model, 4)
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in question_answer_pairs()[:40]))
    served = {"server": server.url, "model": MODEL, "top_k": 32}
    recipe = {
        "output": str(tmp_path / "run"),
        "teacher": served if place == "server" else {"model": str(teacher), "engine": "vllm"},
        "student": {"model": str(tmp_path / "student"), "engine": "vllm"},
        "data": {
            "source": str(tmp_path / "pairs.jsonl"),
            "num_validation": 4,
            "num_test": 6,
            "max_length": 96,
            "max_prompt_length": 64,
        },
        "warmup": {"epochs": 1},
        "ranking": {"max_new_tokens": 8},
        "curriculum": {"num_stages": 2, "epochs": 1},
        "training": {"batch_size": 8, "metric": "kl_to_teacher"},
        "on_policy": {"share": 0.5 if place == "server" else 0.0, "max_new_tokens": 8},
        "evaluation": {"max_new_tokens": 8},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["distill", str(tmp_path / "recipe.yaml")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    told = {"server": "the 32 likeliest tokens leave", "vllm": "exact at every temperature"}
    assert told[place] in result.output
    log = [json.loads(line) for line in (tmp_path / "run" / "training" / "log.jsonl").read_text().splitlines()]
    assert [line for line in log if "divergence" in line]
    assert (tmp_path / "run" / "report").exists()
