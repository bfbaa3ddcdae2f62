"""Answers from a causal language model: greedy, or sampled with a seed per sample.

An answer depends on its prompt, the settings and, when sampling, on its own id; never on the prompts beside it.
Sampling uses one uniform number u a token from a generator seeded by (seed, sample id, position): the token is the
first one whose cumulative probability exceeds u.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MAX_BATCH = 64


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are made. The defaults are greedy; the paper's near-greedy sampling (temperature 0.01) equals it."""

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens occurs twice in prompt and answer together; 0 allows repetition. The paper: 6."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}; for greedy use do_sample=False")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k must be >= 0 and top_p in (0, 1], got {self.top_k} and {self.top_p}")
        if self.no_repeat_ngram_size < 0:
            raise ValueError(f"no_repeat_ngram_size must be >= 0, got {self.no_repeat_ngram_size}")


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings | None = None,
    *,
    eos_token_ids: Sequence[int],
    sample_ids: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[list[int]]:
    """The answer to each prompt as token ids, in the order of the prompts, without the end token.

    Args:
        model: a Hugging Face causal language model.
        prompts: token ids of each prompt, none empty.
        settings: greedy with 256 new tokens when left out.
        eos_token_ids: an answer ends before the first of these (see `end_tokens`).
        sample_ids: what the sampling seed of each prompt is made of; its position when left out.
        batch_size: rows at a time; 64 when left out.
        progress: show a progress bar.

    Raises:
        ValueError: an empty prompt, or a prompt longer than the model's context.
    """
    settings = settings or GenerationSettings()
    ids = list(range(len(prompts))) if sample_ids is None else [int(i) for i in sample_ids]
    _check_prompts(model, prompts, ids, settings)
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = batch_size or MAX_BATCH
    from tqdm.auto import tqdm

    with tqdm(total=len(prompts), desc="answering", unit=" samples", disable=not progress) as bar:
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = _transformers_batch(
                model, [prompts[i] for i in rows], [ids[i] for i in rows], settings, eos_token_ids
            )
            for i, answer in zip(rows, batch, strict=True):
                answers[i] = answer
            bar.update(len(rows))
    return answers


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The ids that end an answer: those of the model's generation config and the tokenizer's.

    Raises:
        ValueError: neither names one.
    """
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [] if found is None else [found] if isinstance(found, int) else list(found)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ValueError(
            "neither the model's generation_config nor the tokenizer has an EOS token, so no answer could end; "
            "set tokenizer.eos_token"
        )
    return sorted({int(i) for i in ids})


def _check_prompts(
    model: nn.Module, prompts: Sequence[Sequence[int]], ids: Sequence[int], settings: GenerationSettings
) -> None:
    if len(ids) != len(prompts):
        raise ValueError(f"sample_ids must have one id a prompt, got {len(ids)} for {len(prompts)} prompts")
    context = getattr(model.config, "max_position_embeddings", None)
    for i, prompt in zip(ids, prompts, strict=True):
        if len(prompt) == 0:
            raise ValueError(f"the prompt of sample {i} is empty; it must have at least one token")
        if context and len(prompt) >= context:
            raise ValueError(
                f"the prompt of sample {i} has {len(prompt)} tokens and the model's context is {context}; "
                "cut it with max_prompt_length"
            )


def uniforms(seed: int, sample_id: int, count: int) -> Tensor:
    """The `count` numbers in [0, 1) that decide a sample's tokens: float64, a function of seed and sample id alone."""
    digest = hashlib.blake2b(f"{seed}:{sample_id}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def choose(logits: Tensor, settings: GenerationSettings, u: Tensor | None) -> Tensor:
    """Next token ids [B] from logits [B, V]: the largest, or by inverse transform of `u` [B] when sampling."""
    if not settings.do_sample:
        return logits.argmax(dim=-1)
    assert u is not None
    logits = logits.double() / settings.temperature
    if settings.top_k:
        kth = logits.topk(min(settings.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities, tokens = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    if settings.top_p < 1:
        kept = cumulative - probabilities < settings.top_p
        total = (probabilities * kept).sum(dim=-1, keepdim=True)
    position = torch.searchsorted(cumulative, (u.to(logits.device).unsqueeze(-1) * total), right=True)
    return tokens.gather(-1, position.clamp_max(logits.shape[-1] - 1)).squeeze(-1)


def _transformers_batch(
    model: nn.Module,
    prompts: list[Sequence[int]],
    ids: list[int],
    settings: GenerationSettings,
    eos_token_ids: Sequence[int],
) -> list[list[int]]:
    from transformers import LogitsProcessorList

    device = next(model.parameters()).device
    width = max(len(p) for p in prompts)
    input_ids = torch.full((len(prompts), width), int(eos_token_ids[0]), dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.as_tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    processors = LogitsProcessorList()
    if settings.no_repeat_ngram_size:
        processors.append(_NoRepeat(settings.no_repeat_ngram_size, [width - len(p) for p in prompts]))
    if settings.do_sample:
        noise = torch.stack([uniforms(settings.seed, i, settings.max_new_tokens) for i in ids])
        processors.append(_Choose(settings, noise, width))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            out = model.generate(  # type: ignore[operator]
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                num_beams=1,
                repetition_penalty=1.0,
                max_new_tokens=settings.max_new_tokens,
                eos_token_id=list(eos_token_ids),
                pad_token_id=int(eos_token_ids[0]),
                logits_processor=processors,
            )
    finally:
        model.train(was_training)
    ends = set(eos_token_ids)
    return [_until_end(row[width:].tolist(), ends) for row in out.cpu()]


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)


def banned_tokens(tokens: Sequence[int], size: int) -> list[int]:
    """Tokens that would complete a run of `size` tokens already in `tokens`."""
    if len(tokens) < size:
        return []
    last = tuple(tokens[len(tokens) - size + 1 :])
    return [tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tuple(tokens[i : i + size - 1]) == last]


class _NoRepeat:
    """A logits processor: forbids repeated n-grams within each row, padding left aside."""

    def __init__(self, size: int, padding: list[int]) -> None:
        self.size, self.padding = size, padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, (tokens, pad) in enumerate(zip(input_ids.tolist(), self.padding, strict=True)):
            scores[row, banned_tokens(tokens[pad:], self.size)] = -torch.inf
        return scores


class _Choose:
    """A logits processor that leaves one token alive: greedy search then returns what `choose` chose."""

    def __init__(self, settings: GenerationSettings, noise: Tensor, width: int) -> None:
        self.settings, self.noise, self.width = settings, noise, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = choose(scores, self.settings, self.noise[:, input_ids.shape[1] - self.width])
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(-1, tokens.unsqueeze(-1), 0.0)
