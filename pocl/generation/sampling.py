"""From logits to the next token: greedy or by inverse transform, with repeated n-grams forbidden if asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from pocl.generation.settings import GenerationSettings


def uniforms(seed: int, sample_id: int, count: int) -> Tensor:
    """The `count` numbers in [0, 1) that decide a sample's tokens: float64, a function of seed and sample id alone."""
    digest = hashlib.blake2b(f"{seed}:{sample_id}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def choose(
    logits: Tensor,  # [B, V]
    settings: GenerationSettings,
    u: Tensor | None,  # [B] float64
) -> Tensor:  # [B] int64
    """Next token ids: the largest logit or, when sampling, the first token whose cumulative probability exceeds `u`."""
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
    position = torch.searchsorted(cumulative, u.to(logits.device).unsqueeze(-1) * total, right=True)
    return tokens.gather(-1, position.clamp_max(logits.shape[-1] - 1)).squeeze(-1)


def check_finite(
    logits: Tensor,  # [B, V]
    places: Sequence[tuple[int, int]],
) -> None:
    """Refuses logits that no token can be chosen from.

    Args:
        logits: of the next tokens.
        places: for each row its sample's id and the position of the token in the answer.

    Raises:
        ValueError: a row with NaN or +inf, or without any finite value; names the sample.
    """
    fine = logits.amax(dim=-1).isfinite()
    if not bool(fine.all()):
        sample_id, position = places[int(fine.logical_not().nonzero()[0])]
        raise ValueError(
            f"the logits for token {position} of the answer of sample {sample_id} are not finite; generate in float32 "
            "or check the weights"
        )


class NgramBan:
    """The tokens that would repeat a run of `size` tokens of one growing sequence; constant work a token."""

    def __init__(self, size: int, tokens: Sequence[int]) -> None:
        self.size = size
        self.tail: list[int] = []
        self.followers: dict[tuple[int, ...], list[int]] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """The sequence grows by one token."""
        if len(self.tail) == self.size - 1:
            self.followers.setdefault(tuple(self.tail), []).append(token)
        self.tail = [*self.tail, token][1 - self.size :] if self.size > 1 else []

    def banned(self) -> list[int]:
        """Tokens that may not come next."""
        return self.followers.get(tuple(self.tail), []) if len(self.tail) == self.size - 1 else []
