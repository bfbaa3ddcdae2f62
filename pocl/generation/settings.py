"""How answers are made, where they end, and which prompts can be answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pocl.data.templates import answer_ends
from pocl.models import unwrapped, view_of


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are made. The defaults are greedy; the paper's near-greedy sampling (temperature 0.01) equals it.

    Raises:
        ValueError: a value out of its range.
    """

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


@dataclass(frozen=True)
class Request:
    """One prompt that waits for its answer."""

    index: int
    """Position among the caller's prompts."""
    sample_id: int
    """What the sampling seed is made of, and the name in messages."""
    prompt: Sequence[int]


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the tokenizer's EOS, what its chat template closes a turn with, and those that the
    model's generation config names. Ranking, evaluation and training on own responses all stop there.

    Raises:
        ValueError: nobody names one.
    """
    ids = [*named_ends(model), *([] if tokenizer is None else answer_ends(tokenizer))]
    if not ids:
        raise ValueError(
            "neither the model's generation_config nor the tokenizer has an EOS token, so no answer could end; "
            "set tokenizer.eos_token"
        )
    return sorted(set(ids))


def named_ends(model: nn.Module) -> list[int]:
    """The end tokens of the model's generation config."""
    found = getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
    return [] if found is None else [int(i) for i in ([found] if isinstance(found, int) else found)]


def context_length(model: nn.Module) -> int | None:
    """Tokens the model can see at once, None if its config sets no limit."""
    return view_of(model).context


def check_prompts(model: nn.Module, requests: Sequence[Request]) -> None:
    """Refuses prompts that cannot be answered.

    Raises:
        ValueError: an empty prompt, or one that leaves no room in the model's context; names the sample.
    """
    context = context_length(model)
    for request in requests:
        if len(request.prompt) == 0:
            raise ValueError(f"the prompt of sample {request.sample_id} is empty; it must have at least one token")
        if context and len(request.prompt) >= context:
            raise ValueError(
                f"the prompt of sample {request.sample_id} has {len(request.prompt)} tokens and the model's context is "
                f"{context}; cut it with max_prompt_length"
            )
