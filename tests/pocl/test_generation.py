"""Answers: greedy equals the model's own, sampling depends on the sample alone, limits and bans hold."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pocl.generation import GenerationSettings, NgramBan, choose, end_tokens, generate, uniforms

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


def test_training_mode_is_left_as_it_was(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model().train()
    _generate(model, [[3, 4]], GenerationSettings(max_new_tokens=1))
    assert model.training


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
    assert not torch.equal(uniforms(1, 2, 5), uniforms(2, 1, 5))


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
