"""vLLM as an engine: what pocl asks of it and makes of its answers, with a vLLM that is not there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl.data import tokenize
from pocl.difficulty import score
from pocl.engines import EngineError, LocalEngine, VLLMEngine
from pocl.evaluate import evaluate
from pocl.generation import GenerationSettings
from pocl.models.stored_head import stored_head
from pocl.teacher import HiddenStateCache, TopKCache

from ..teacher.conftest import samples

PROMPTS = [[5, 6, 7], [9, 8], [7, 7, 7, 7], [30]]
IDS = {"eos_token_ids": [1], "sample_ids": [4, 9, 2, 7]}


@pytest.mark.parametrize("no_repeat", [0, 1, 2])
def test_greedy_answers_are_those_of_this_process(vllm: VLLMEngine, local: LocalEngine, no_repeat: int) -> None:
    settings = GenerationSettings(max_new_tokens=12, no_repeat_ngram_size=no_repeat)
    found = vllm.answers(PROMPTS, settings, **IDS)
    assert found == local.answers(PROMPTS, settings, **IDS)
    assert max(map(len, found)) == 12
    first = found[0][0]
    ended = vllm.answers(PROMPTS[:1], settings, eos_token_ids=[first], sample_ids=[0])
    assert ended == [[]]


def test_a_sampled_answer_depends_on_its_seed_and_sample_alone(vllm: VLLMEngine) -> None:
    def sampled(prompts: Any, ids: Any, seed: int = 3) -> list[list[int]]:
        settings = GenerationSettings(max_new_tokens=8, do_sample=True, temperature=2.0, seed=seed)
        return vllm.answers(prompts, settings, eos_token_ids=[1], sample_ids=ids)

    found = sampled([PROMPTS[0]] * 3, [4, 9, 4])
    assert found[0] == found[2] != found[1]
    assert sampled(PROMPTS[::-1], [1, 2, 3, 4])[-1] == found[0]
    assert sampled(PROMPTS[:1], [4], seed=5) != found[:1]


def test_states_and_log_probabilities_are_those_of_this_process(vllm: VLLMEngine, local: LocalEngine) -> None:
    rows, told = samples(20), list[int]()
    close = {"rtol": 1e-5, "atol": 1e-5}
    for mine, theirs in zip(vllm.log_probs_of(rows), local.log_probs_of(rows), strict=True):
        torch.testing.assert_close(mine, theirs, **close)
    ids, log_probs = vllm.top_k(rows, 6, told.append)
    expected = local.top_k(rows, 6)
    assert torch.equal(ids, expected[0])
    torch.testing.assert_close(log_probs, expected[1], **close)
    assert sum(told) == len(ids)
    torch.testing.assert_close(vllm.hidden_states(rows), local.hidden_states(rows), **close)
    assert torch.equal(vllm.head().weight, local.head().weight)


def test_states_that_do_not_enter_the_head_are_refused(folder: Path, misbehaving: Any) -> None:
    misbehaving("unnormed")
    with VLLMEngine(folder, dtype="float32") as engine:
        row = samples(1)[0]
        real = engine._asked
        engine._asked = lambda question, *args, **kw: (  # type: ignore[method-assign]
            iter([{"own": torch.full((len(row["labels"]) - 2,), -6.9)}])
            if question == "log_probs"
            else real(question, *args, **kw)
        )
        with pytest.raises(
            ValueError, match=r"are not what enters its head: log-probabilities made of them are off by"
        ):
            engine.hidden_states([row])


def test_an_engine_that_does_not_start_or_ends_is_told_in_its_own_words(folder: Path, misbehaving: Any) -> None:
    misbehaving("refuses")
    with pytest.raises(EngineError, match="the vLLM engine: ValueError: no such device"):
        VLLMEngine(folder).log_probs_of(samples(2))
    misbehaving("dies")
    with pytest.raises(EngineError, match=r"has ended \(exit code 7\).* the same call goes on from there"):
        VLLMEngine(folder).log_probs_of(samples(2))


def test_what_vllm_cannot_do_is_said_before_it_starts(
    folder: Path, vllm: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="engine_args: runner is set by pocl"):
        VLLMEngine(folder, engine_args={"runner": "draft"})
    long = {"sample_id": 77, "input_ids": [5] * 512, "labels": [5] * 512}
    with pytest.raises(ValueError, match=r"sample 77 has 512 tokens, and the engine \(vllm\) reads 511 at most"):
        vllm.log_probs_of([long])
    with pytest.raises(ValueError, match="sample 78 has the token id 1000, .* has 1000"):
        vllm.top_k([{"sample_id": 78, "input_ids": [5, 1000], "labels": [5, 1000]}], 2)
    with pytest.raises(ValueError, match="the prompt of sample 4 has 512 tokens and the engine's context is 512"):
        vllm.answers([[5] * 512], GenerationSettings(), eos_token_ids=[1], sample_ids=[4])
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a PEFT adapter, and an engine takes a whole model; .*pocl merge"):
        VLLMEngine(tmp_path)
    monkeypatch.setenv("POCL_VLLM_PYTHON", "/nowhere/python")
    with pytest.raises(ValueError, match="POCL_VLLM_PYTHON is '/nowhere/python', which is no program"):
        VLLMEngine(folder)
    monkeypatch.delenv("POCL_VLLM_PYTHON")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vLLM is not installed; run `pip install 'pocl\[vllm\]'`.*POCL_VLLM_PYTHON="):
        VLLMEngine(folder)


def test_caches_are_built_by_vllm_from_a_folder(
    tmp_path: Path, folder: Path, local: LocalEngine, fake_vllm: Any
) -> None:
    rows = samples(12)
    build: dict[str, Any] = {"engine": "vllm", "disable_tqdm": True}
    cache = HiddenStateCache.build(tmp_path / "vllm", folder, rows, **build)
    expected = HiddenStateCache.build(tmp_path / "local", local, rows, disable_tqdm=True)
    torch.testing.assert_close(cache.rows(rows), expected.rows(rows), rtol=1e-5, atol=1e-5)
    assert torch.equal(cache.head.weight, expected.head.weight)
    with pytest.raises(ValueError, match="the cache of another teacher, another engine"):
        HiddenStateCache.open(tmp_path / "vllm", teacher=local)
    likely = TopKCache.build(tmp_path / "likely", folder, rows, top_k=5, **build)
    assert torch.equal(likely.rows(rows)[0], local.top_k(rows, 5)[0])
    for kind in (HiddenStateCache, TopKCache):
        with pytest.raises(ValueError, match="engine must be one of transformers, vllm, got 'sglang'"):
            kind.build(tmp_path / "no", local, rows, engine="sglang")
        with pytest.raises(ValueError, match="engine_args are for engine='vllm', and engine is 'transformers'"):
            kind.build(tmp_path / "no", local, rows, engine_args={"seed": 1})
        with pytest.raises(ValueError, match="teacher must be a model.* got PosixPath"):
            kind.build(tmp_path / "no", folder, rows)


def test_scores_and_measures_are_those_of_this_process(
    vllm: VLLMEngine, local: LocalEngine, tiny_tokenizer: Any, tiny_pairs: Any
) -> None:
    from datasets import Dataset

    pairs = [{"id": i, "prompt": p["instruction"], "response": p["output"]} for i, p in enumerate(tiny_pairs[:12])]
    rows, _ = tokenize(Dataset.from_list(pairs), tiny_tokenizer, template="plain", workers=1, progress=False)
    options: dict[str, Any] = {
        "generation": GenerationSettings(max_new_tokens=6, no_repeat_ngram_size=3),
        "progress": False,
    }
    mine = score(local.model, tiny_tokenizer, rows, engine=vllm, **options)
    theirs = score(local.model, tiny_tokenizer, rows, **options)
    assert mine["response"] == theirs["response"]
    assert mine["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-5)
    assert mine.column_names == theirs.column_names
    one = evaluate(local.model, tiny_tokenizer, rows, engine=vllm, **options)
    two = evaluate(local.model, tiny_tokenizer, rows, **options)
    assert one.responses == two.responses
    assert one.metrics() == pytest.approx(two.metrics(), rel=1e-5)
    with_teacher = score(local.model, tiny_tokenizer, rows, engine=vllm, teacher=local.model, **options)
    assert with_teacher["kl_to_teacher"] == pytest.approx([0.0] * 12, abs=1e-5)


def test_a_model_of_this_process_is_handed_over(local: LocalEngine, tiny_tokenizer: Any, fake_vllm: Any) -> None:
    rows = samples(3)
    with VLLMEngine.of_model(local.model, tiny_tokenizer) as engine:
        folder = Path(engine.source)
        assert torch.equal(engine.top_k(rows, 4)[0], local.top_k(rows, 4)[0])
        assert engine.fingerprint() == local.fingerprint()
    assert not folder.exists()


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_read_without_the_rest_of_its_model(make_tiny_folder: Callable[..., Path], tied: bool) -> None:
    from pocl.models import load_causal_lm, view_of

    folder = make_tiny_folder(seed=4, tie_word_embeddings=tied)
    expected = view_of(load_causal_lm(folder)).head()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pocl.models.stored_head.load_causal_lm", None)
        assert torch.equal(stored_head(str(folder)).weight, expected.weight)
    assert stored_head(str(folder), dtype="bfloat16").weight.dtype is torch.bfloat16
