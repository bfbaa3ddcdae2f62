"""Batches of prompts through `model.generate`: for architectures whose cache the slot engine cannot hold."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from pocl.generation.sampling import NgramBan, check_finite, choose, uniforms
from pocl.generation.settings import GenerationSettings, Request
from pocl.models import view_of


def answer_in_batches(
    model: nn.Module,
    requests: Sequence[Request],
    settings: GenerationSettings,
    *,
    eos_token_ids: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (index, answer) for every request, longest prompts first, a batch at a time.

    Raises:
        ValueError: logits that are not finite; names the sample.
    """
    context = view_of(model).context or sys.maxsize
    order = sorted(requests, key=lambda r: -len(r.prompt))
    # an answer that the context may cut short goes alone: in a batch it would cut the others short too
    count = sum(len(r.prompt) + settings.max_new_tokens > context + 1 for r in order)
    starts = [*range(count), *range(count, len(order), batch_size), len(order)]
    for start, stop in pairwise(starts):
        batch = order[start:stop]
        limit = min(settings.max_new_tokens, context + 1 - len(batch[0].prompt))
        answers = _batch(model, batch, replace(settings, max_new_tokens=limit), eos_token_ids)
        yield from zip([r.index for r in batch], answers, strict=True)


def _batch(
    model: nn.Module, requests: Sequence[Request], settings: GenerationSettings, eos_token_ids: Sequence[int]
) -> list[list[int]]:
    from transformers import LogitsProcessorList

    device = view_of(model).device
    width = max(len(r.prompt) for r in requests)
    input_ids = torch.full((len(requests), width), int(eos_token_ids[0]), dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, request in enumerate(requests):
        input_ids[row, width - len(request.prompt) :] = torch.as_tensor(list(request.prompt))
        mask[row, width - len(request.prompt) :] = 1
    processors = LogitsProcessorList([_Choose(settings, requests, width)])
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
    ends = set(eos_token_ids)
    return [_until_end(row[width:].tolist(), ends) for row in out.cpu()]


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)


class _Choose:
    """A logits processor that leaves one token alive: greedy search then returns what our own rules chose."""

    def __init__(self, settings: GenerationSettings, requests: Sequence[Request], width: int) -> None:
        self.settings, self.requests, self.width = settings, requests, width
        self.noise = None
        if settings.do_sample:
            self.noise = torch.stack([uniforms(settings.seed, r.sample_id, settings.max_new_tokens) for r in requests])
        size = settings.no_repeat_ngram_size
        self.bans = [NgramBan(size, r.prompt) for r in requests] if size else []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.width
        check_finite(scores, [(request.sample_id, step) for request in self.requests])
        if self.bans and step:
            for ban, token in zip(self.bans, input_ids[:, -1].tolist(), strict=True):
                ban.append(token)
        for row, ban in enumerate(self.bans):
            scores[row, ban.banned()] = -torch.inf
        tokens = choose(scores, self.settings, None if self.noise is None else self.noise[:, step])
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens.unsqueeze(-1), 0.0)
