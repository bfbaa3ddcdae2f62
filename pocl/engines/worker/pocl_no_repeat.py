"""No run of n tokens twice in prompt and answer: the paper's rule, which vLLM has none for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

KEY = "pocl_no_repeat_ngram_size"


class NoRepeat(AdapterLogitsProcessor):
    """For requests that name a size in `extra_args`."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        size = (params.extra_args or {}).get(KEY, 0)
        return _Ban(size) if size else None


class _Ban:
    """Of one request, whose tokens grow by one a call."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tokens: list[int] = []
        self.followers: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int], logits: Any) -> Any:
        for token in [*(() if self.tokens else prompt_ids), *output_ids[max(len(self.tokens) - len(prompt_ids), 0) :]]:
            if len(self.tokens) >= self.size - 1:
                self.followers.setdefault(self._tail(), []).append(token)
            self.tokens.append(token)
        if len(self.tokens) >= self.size - 1:
            logits[self.followers.get(self._tail(), [])] = -float("inf")
        return logits

    def _tail(self) -> tuple[int, ...]:
        return tuple(self.tokens[len(self.tokens) - self.size + 1 :])
