"""Answers: greedy equals the model's own, sampling depends on the sample alone, limits and bans hold."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pocl.generation import (
    GenerationSettings,
    NgramBan,
    SlotEngine,
    choose,
    end_tokens,
    generate,
    resolve_backend,
    rows_that_fit,
    uniforms,
)
from pocl.generation.memory import available_bytes, cache_bytes_per_token
from pocl.generation.slots import slots_agree
from pocl.models import separates_packed_rows

EOS = [1]


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Any]) -> Any:
    return make_tiny_model(seed=3)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 17, 5, 1, 9, 12, 30, 4, 4, 8, 2, 21]
    return [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in lengths]


def _one_by_one(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """transformers' own greedy search, a prompt at a time."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=1, pad_token_id=0, **options
        )
        answer = tokens[0, len(prompt) :].tolist()
        out.append(answer[: answer.index(1)] if 1 in answer else answer)
    return out


def _generate(model: Any, prompts: list[list[int]], settings: GenerationSettings, **options: Any) -> list[list[int]]:
    return generate(model, prompts, settings, eos_token_ids=EOS, progress=False, **options)


@pytest.mark.parametrize("backend", ["slots", "transformers"])
@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_greedy_answers_are_the_models_own_at_any_batch_size(
    model: Any, prompts: list[list[int]], batch_size: int | None, backend: str
) -> None:
    settings = GenerationSettings(max_new_tokens=12)
    expected = _one_by_one(model, prompts, max_new_tokens=12)
    assert _generate(model, prompts, settings, batch_size=batch_size, backend=backend) == expected


@pytest.mark.parametrize("backend", ["slots", "transformers"])
def test_no_repeated_ngram_within_prompt_and_answer(model: Any, prompts: list[list[int]], backend: str) -> None:
    free = _generate(model, prompts, GenerationSettings(max_new_tokens=40))
    settings = GenerationSettings(max_new_tokens=40, no_repeat_ngram_size=2)
    bound = _generate(model, prompts, settings, backend=backend)
    assert bound != free
    assert bound == _one_by_one(model, prompts, max_new_tokens=40, no_repeat_ngram_size=2)


@pytest.mark.parametrize("backend", ["slots", "transformers"])
def test_runs_of_the_prompt_count_as_repeated(model: Any, backend: str) -> None:
    prompts = [list(range(3, 403)), list(range(500, 900))]
    settings = GenerationSettings(max_new_tokens=12, no_repeat_ngram_size=1)
    answers = _generate(model, prompts, settings, backend=backend)
    assert answers == _one_by_one(model, prompts, max_new_tokens=12, no_repeat_ngram_size=1)
    assert all(not set(prompt) & set(answer) for prompt, answer in zip(prompts, answers, strict=True))


def test_a_sampled_answer_depends_on_seed_and_sample_id_alone(model: Any, prompts: list[list[int]]) -> None:
    settings = GenerationSettings(max_new_tokens=12, do_sample=True, temperature=0.7, seed=5)
    ids = list(range(50, 50 + len(prompts)))
    together = _generate(model, prompts, settings, sample_ids=ids)
    alone = [_generate(model, [p], settings, sample_ids=[i])[0] for p, i in zip(prompts, ids, strict=True)]
    backwards = _generate(model, prompts[::-1], settings, sample_ids=ids[::-1], batch_size=5)
    assert together == alone == backwards[::-1]
    assert together == _generate(model, prompts, settings, sample_ids=ids, batch_size=5, backend="transformers")
    other = GenerationSettings(max_new_tokens=12, do_sample=True, temperature=0.7, seed=6)
    assert _generate(model, prompts, other, sample_ids=ids) != together


def test_answers_end_before_the_end_token(model: Any, prompts: list[list[int]]) -> None:
    free = _generate(model, prompts, GenerationSettings(max_new_tokens=8))
    ends = [free[0][4]]
    cut = generate(model, prompts, GenerationSettings(max_new_tokens=8), eos_token_ids=[*ends, 1], progress=False)
    assert cut[0] == free[0][: free[0].index(ends[0])]


def test_the_batch_stays_full_while_prompts_wait(
    model: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, active = SlotEngine.forward, []
    monkeypatch.setattr(SlotEngine, "forward", lambda self, tokens: active.append(len(tokens)) or plain(self, tokens))
    ends = sorted({answer[2] for answer in _generate(model, prompts, GenerationSettings(max_new_tokens=8))})[:4]
    active.clear()
    settings = GenerationSettings(max_new_tokens=8)
    answers = generate(model, prompts, settings, eos_token_ids=ends, batch_size=3, backend="slots", progress=False)
    # an answer is chosen from as many passes as it has tokens and, where it ends early, one for the end token; the
    # first of them is that of its prompt
    passes = [min(len(answer) + 1, 8) - 1 for answer in answers]
    assert len(set(passes)) > 2
    assert sum(active) == sum(passes)
    waiting_ends = max(i for i, count in enumerate(active) if count == 3)
    assert active[: waiting_ends + 1] == [3] * (waiting_ends + 1)
    assert active == sorted(active, reverse=True)


@pytest.mark.parametrize("backend", ["slots", "transformers"])
def test_an_answer_ends_where_the_context_does(backend: str, prompts: list[list[int]]) -> None:
    model = _random_model("GPT2Config", {**GPT2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 1})
    short = [[token % 97 + 3 for token in prompt][:14] for prompt in prompts]
    whole = generate(model, short, GenerationSettings(40), eos_token_ids=[], backend="slots", progress=False)
    assert [len(prompt) + len(answer) for prompt, answer in zip(short, whole, strict=True)] == [17] * len(short)
    found = generate(
        model, short, GenerationSettings(8), eos_token_ids=EOS, batch_size=4, backend=backend, progress=False
    )
    cut = [answer[: answer.index(1)] if 1 in answer else answer for answer in whole]
    assert found == [answer[:8] for answer in cut]


def test_training_mode_is_left_as_it_was(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model().train()
    _generate(model, [[3, 4]], GenerationSettings(max_new_tokens=1))
    assert model.training


# --------------------------------------------------------------------------------------------------- architectures

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
GROUPED = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
OPT = {**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "init_std": 0.3}
FAMILIES = [
    ("Gpt2", "GPT2Config", {**GPT2, "bos_token_id": 1, "eos_token_id": 1}),
    ("Opt", "OPTConfig", {name: value for name, value in OPT.items() if name != "initializer_range"}),
    ("Mistral, sliding", "MistralConfig", {**GROUPED, "sliding_window": 8}),
    ("Gemma 2, softcap, both kinds of attention", "Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    ("Qwen 3", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    ("Cohere, scaled logits", "CohereConfig", GROUPED),
]
PLAIN = {"vocab_size": 100, "hidden_size": 32, "eos_token_id": 1}
WITHOUT_SLOTS = [
    ("position bias from the padding mask", "BloomConfig", {**PLAIN, "n_layer": 2, "n_head": 4}),
    ("a state in place of a cache", "MambaConfig", {**PLAIN, "num_hidden_layers": 2}),
]


def _random_model(config: str, options: dict[str, Any]) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**options)).eval()


@pytest.mark.parametrize(("config", "options"), [f[1:] for f in FAMILIES], ids=[f[0] for f in FAMILIES])
def test_slots_serve_other_families_beyond_their_windows(
    config: str, options: dict[str, Any], prompts: list[list[int]]
) -> None:
    model = _random_model(config, options)
    short = [[token % 97 + 3 for token in prompt] for prompt in prompts]
    assert resolve_backend(model, "auto") == "slots"
    settings = GenerationSettings(max_new_tokens=10)
    assert _generate(model, short, settings, batch_size=5) == _one_by_one(model, short, max_new_tokens=10)


def test_attention_that_takes_no_mask_gives_way_and_comes_back(
    make_tiny_model: Callable[..., Any], prompts: list[list[int]]
) -> None:
    from transformers import AttentionInterface

    def without_masks(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        raise TypeError("this kernel takes no mask")

    AttentionInterface.register("without_masks", without_masks)
    model, plain = make_tiny_model(seed=3), make_tiny_model(seed=3)
    model.set_attn_implementation("without_masks")
    settings = GenerationSettings(max_new_tokens=4)
    assert _generate(model, prompts, settings) == _generate(plain, prompts, settings)
    assert model.config._attn_implementation == "without_masks"


@pytest.mark.parametrize(("config", "options"), [f[1:] for f in WITHOUT_SLOTS], ids=[f[0] for f in WITHOUT_SLOTS])
def test_families_without_slots_are_found_out_and_still_answer(
    config: str, options: dict[str, Any], prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    model = _random_model(config, options)
    short = [[token % 97 + 3 for token in prompt] for prompt in prompts[:4]]
    answers = _generate(model, short, GenerationSettings(max_new_tokens=5))
    assert "does not run on the slot engine" in caplog.text
    assert answers == _one_by_one(model, short, max_new_tokens=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits_run_on_the_slot_engine_and_may_be_packed(
    make_tiny_model: Callable[..., Any], dtype: torch.dtype
) -> None:
    half = make_tiny_model(seed=3, num_layers=6).to(dtype)
    assert resolve_backend(half, "auto") == "slots"
    assert separates_packed_rows(half)
    mixing = _random_model("MambaConfig", {**PLAIN, "num_hidden_layers": 2}).to(dtype)
    assert resolve_backend(mixing, "auto") == "transformers"
    assert not separates_packed_rows(mixing)


@pytest.mark.parametrize(
    ("error", "says_something"),
    [
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("The size of tensor a (4) must match the size of tensor b (8)"), True),
    ],
)
def test_a_device_that_fails_says_nothing_about_the_model(
    make_tiny_model: Callable[..., Any], error: RuntimeError, says_something: bool
) -> None:
    model = make_tiny_model()

    def fail(*_: Any) -> None:
        raise error

    model.model.layers[0].register_forward_pre_hook(fail)
    for trial in (slots_agree, separates_packed_rows):
        if says_something:
            assert not trial(model)
        else:
            with pytest.raises(RuntimeError, match=str(error)):
                trial(model)


# ---------------------------------------------------------------------------------------------------------- memory


def test_rows_that_fit_follow_the_free_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # keys and values of 2 layers, 2 heads of 8 float32 numbers; beside them three copies of 1,000 float32 logits
    row = 100 * (2 * 2 * 2 * 8 * 4) + 3 * 4 * 1000
    assert cache_bytes_per_token(model) == 256
    monkeypatch.setattr("pocl.generation.memory.available_bytes", lambda device: 2 * 10 * row)
    assert rows_that_fit(model, 100) == 10
    assert rows_that_fit(model, 100, processes=2) == 5
    monkeypatch.setattr("pocl.generation.memory.available_bytes", lambda device: 0)
    assert rows_that_fit(model, 100) == 1


def test_available_memory_is_some_of_the_machines() -> None:
    assert 0 < available_bytes(torch.device("cpu")) < 1 << 50


# --------------------------------------------------------------------------------------------------------- choosing


def test_choose_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]]).expand(20_000, 4)
    u = torch.rand(20_000, dtype=torch.float64)
    drawn = torch.bincount(choose(logits, GenerationSettings(do_sample=True), u), minlength=4) / 20_000
    torch.testing.assert_close(drawn, logits[0].softmax(-1), atol=0.02, rtol=0)


def test_choose_keeps_to_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]]).expand(101, 4)
    u = torch.linspace(0, 1 - 1e-9, 101, dtype=torch.float64)
    assert set(choose(logits, GenerationSettings(do_sample=True, top_k=2), u).tolist()) == {2, 3}
    assert set(choose(logits, GenerationSettings(do_sample=True, top_p=0.5), u).tolist()) == {2}
    assert set(choose(logits, GenerationSettings(do_sample=True, temperature=0.01), u).tolist()) == {2}
    assert set(choose(logits, GenerationSettings(do_sample=True), u).tolist()) == {0, 1, 2, 3}


def test_uniforms_are_a_function_of_seed_and_sample() -> None:
    assert torch.equal(uniforms(1, 2, 5), uniforms(1, 2, 9)[:5])
    assert len({tuple(uniforms(seed, sample, 3).tolist()) for seed in (1, 2, 12) for sample in (1, 2, 12)}) == 9


def test_banned_tokens_complete_a_run_already_there() -> None:
    assert NgramBan(3, [5, 6, 7, 5, 6]).banned() == [7]
    assert NgramBan(3, [5, 6, 7, 5, 6, 8, 5, 6]).banned() == [7, 8]
    assert NgramBan(3, [5, 6]).banned() == []
    assert NgramBan(1, [5, 6, 5]).banned() == [5, 6, 5]


# -------------------------------------------------------------------------------------------------------- bad input


def test_end_tokens_come_from_model_and_tokenizer(model: Any, tiny_tokenizer: Any) -> None:
    import copy

    assert end_tokens(model, tiny_tokenizer) == [1]
    bare, mute = copy.deepcopy(tiny_tokenizer), copy.deepcopy(model)
    bare.eos_token, mute.generation_config.eos_token_id = None, None
    with pytest.raises(ValueError, match="has an EOS token"):
        end_tokens(mute, bare)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[3], []], {}, "prompt of sample 1 is empty"),
        ([[3] * 512], {"sample_ids": [9]}, "prompt of sample 9 has 512 tokens and the model's context is 512"),
        ([[3], [4]], {"sample_ids": [9]}, "one id a prompt, got 1 for 2"),
    ],
)
def test_bad_prompts_are_refused(model: Any, prompts: list[list[int]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _generate(model, prompts, GenerationSettings(max_new_tokens=1), **options)


@pytest.mark.parametrize("backend", ["slots", "transformers"])
def test_logits_that_are_not_finite_name_the_sample(make_tiny_model: Callable[..., Any], backend: str) -> None:
    model = make_tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(ValueError, match=r"token 0 of the answer of sample 31 are not finite"):
        _generate(model, [[3, 5], [3, 7]], GenerationSettings(max_new_tokens=2), sample_ids=[30, 31], backend=backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": 0.0}, "for greedy use do_sample=False"),
        ({"top_p": 0.0}, "top_p in"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be >= 0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**options)
