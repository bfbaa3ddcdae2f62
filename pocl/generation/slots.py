"""Continuous batching over a padded key-value cache, for any decoder of transformers with an ordinary cache.

The cache is [slots, heads, capacity, head size] a layer. Active rows are the first A slots: row i holds its own tokens
at positions 0 .. length_i - 1, and one step feeds every active row its newest token at position length_i under a mask
that hides what lies behind. A finished row is overwritten by the last active one, and waiting prompts are appended, so
that the batch stays full and dense. Prompts come in prefilled: whoever ran them through the model, for instance to
measure the cross-entropy of a reference that follows them, hands over hidden states, keys and values.

A: active rows, B: rows of a prefilled batch, L: its length, H: hidden size, W: positions in use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from pocl.generation.sampling import NgramBan, check_finite, choose, uniforms
from pocl.generation.settings import GenerationSettings, Request
from pocl.models import is_out_of_order, project, tolerance_of, view_of

# Positions in use are rounded up to this, so that attention works on whole vectors.
_WIDTH_MULTIPLE = 16
# Implementations of attention in transformers that take a mask of one row a sample.
_MASKABLE = ("sdpa", "eager", None)


@dataclass
class Prefilled:
    """A batch that went through the backbone."""

    requests: Sequence[Request]
    hidden: Tensor
    """[B, H], at each prompt's last token."""
    keys: list[Tensor]
    """One a layer, [B, heads, >= longest prompt, head size]; row b holds its prompt at positions 0 .. n_b - 1."""
    values: list[Tensor]


def prefill(
    model: nn.Module,
    requests: Sequence[Request],
    input_ids: Tensor,  # [B, L] int64, right-padded; each row begins with its request's prompt
) -> tuple[Tensor, Prefilled]:  # [B, L, H]
    """One pass over right-padded rows: all last hidden states, and what the engine needs of the prompts.

    No mask is passed: in a causal model padding on the right cannot reach the tokens before it.
    """
    cache = DynamicCache()
    hidden = view_of(model).hidden_states(input_ids, past_key_values=cache, use_cache=True)
    rows = torch.arange(len(requests), device=hidden.device)
    last = torch.tensor([len(r.prompt) - 1 for r in requests], device=hidden.device)
    keys = [layer.keys for layer in cache.layers]
    values = [layer.values for layer in cache.layers]
    return hidden, Prefilled(requests, hidden[rows, last], keys, values)


class _Layer(CacheLayerMixin):
    """The keys and values of one layer, [slots, heads, capacity, head size]."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, engine: SlotEngine) -> None:
        super().__init__()
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.engine = engine
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("the layer is made with its storage")

    def update(
        self,
        key_states: Tensor,  # [A, heads, 1, head size]
        value_states: Tensor,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:  # [A, heads, W, head size]
        rows, positions, width = self.engine.rows, self.engine.positions, self.engine.width
        self.keys[rows, :, positions] = key_states[:, :, 0]
        self.values[rows, :, positions] = value_states[:, :, 0]
        return self.keys[: len(rows), :, :width], self.values[: len(rows), :, :width]

    def get_seq_length(self) -> int:
        return self.engine.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.engine.width, 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:  # the name in transformers 5.10
        return self.keys.shape[2]


@dataclass
class _Row:
    request: Request
    answer: list[int] = field(default_factory=list)
    ban: NgramBan | None = None
    noise: Tensor | None = None


class SlotEngine:
    """Answers prefilled prompts, `slots` at a time.

    Args:
        model: a Hugging Face causal language model in eval mode.
        settings: how tokens are chosen.
        eos_token_ids: an answer ends before the first of these.
        slots: rows of the cache.
        max_prompt: tokens of the longest prompt that will come.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: GenerationSettings,
        *,
        eos_token_ids: Sequence[int],
        slots: int,
        max_prompt: int,
    ) -> None:
        self.view, self.settings = view_of(model), settings
        self.head = self.view.head()
        self.ends = set(eos_token_ids)
        self.slots = slots
        self.context = self.view.context
        self.kinds, self.window = self.view.attention
        self.capacity = -(-(max_prompt + settings.max_new_tokens) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
        self.cache = Cache(layers=[])
        self.active: list[_Row] = []
        self.lengths: list[int] = []
        self.rows = self.positions = torch.empty(0, dtype=torch.int64)
        self.width = 0

    def run(self, batches: Iterable[Prefilled]) -> Iterator[tuple[int, list[int]]]:
        """Yields (index, answer) as answers end; takes the next batch whenever slots are free and none waits."""
        source = iter(batches)
        ready: deque[tuple[Prefilled, int]] = deque()
        exhausted = False
        while True:
            while not exhausted and not ready and len(self.active) < self.slots:
                batch = next(source, None)
                exhausted = batch is None
                if batch is not None:
                    ready.extend((batch, i) for i in range(len(batch.requests)))
                    yield from self._admit(ready)
            yield from self._admit(ready)
            if not self.active:
                return
            yield from self._step()

    def _admit(self, ready: deque[tuple[Prefilled, int]]) -> Iterator[tuple[int, list[int]]]:
        """Moves waiting prompts into free slots and chooses the first token of each."""
        while ready and len(self.active) < self.slots:
            batch, first = ready[0]
            count = min(len(batch.requests) - first, self.slots - len(self.active))
            for _ in range(count):
                ready.popleft()
            start = len(self.active)
            self.place(batch, first, count)
            yield from self._choose(batch.hidden[first : first + count], start)

    def place(self, batch: Prefilled, first: int, count: int) -> None:
        """Copies `count` prompts of a batch, from `first` on, behind the active rows."""
        start, requests = len(self.active), batch.requests[first : first + count]
        longest = max(len(r.prompt) for r in requests)
        if not self.cache.layers:
            self.cache.layers = [
                _Layer(self._empty(k), self._empty(v), self) for k, v in zip(batch.keys, batch.values, strict=True)
            ]
        for layer, keys, values in zip(self.cache.layers, batch.keys, batch.values, strict=True):
            layer.keys[start : start + count, :, :longest] = keys[first : first + count, :, :longest]
            layer.values[start : start + count, :, :longest] = values[first : first + count, :, :longest]
        self.active += [self._row(request) for request in requests]
        self.lengths += [len(request.prompt) for request in requests]

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros, not empty: a masked position must not hold a NaN, which a weight of zero would not silence.
        return like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[3])

    def _row(self, request: Request) -> _Row:
        size = self.settings.no_repeat_ngram_size
        noise = None
        if self.settings.do_sample:
            noise = uniforms(self.settings.seed, request.sample_id, self.settings.max_new_tokens)
        return _Row(request, ban=NgramBan(size, request.prompt) if size else None, noise=noise)

    def _choose(self, hidden: Tensor, start: int) -> Iterator[tuple[int, list[int]]]:
        """The next token of the active rows from `start` on; rows that end leave and are yielded."""
        logits = project(self.head, hidden)
        rows = self.active[start:]
        check_finite(logits, [(row.request.sample_id, len(row.answer)) for row in rows])
        for i, row in enumerate(rows):
            if row.ban is not None and (banned := row.ban.banned()):
                logits[i, banned] = -torch.inf
        noise = None
        if self.settings.do_sample:
            noise = torch.stack([row.noise[len(row.answer)] for row in rows if row.noise is not None])
        finished = []
        for i, (row, token) in enumerate(zip(rows, choose(logits, self.settings, noise).tolist(), strict=True), start):
            if token not in self.ends:
                row.answer.append(token)
                if row.ban is not None:
                    row.ban.append(token)
            full = len(row.answer) >= self.settings.max_new_tokens
            if token in self.ends or full or (self.context and self.lengths[i] >= self.context):
                finished.append(i)
                yield row.request.index, row.answer
        self._remove(finished)

    def _remove(self, finished: list[int]) -> None:
        """Fills the places of finished rows with the last active ones."""
        gone = set(finished)
        remaining = len(self.active) - len(finished)
        holes = [i for i in finished if i < remaining]
        movers = [i for i in range(remaining, len(self.active)) if i not in gone]
        if holes:
            width = max(self.lengths[i] for i in movers)
            for layer in self.cache.layers:
                layer.keys[holes, :, :width] = layer.keys[movers, :, :width]
                layer.values[holes, :, :width] = layer.values[movers, :, :width]
            for hole, mover in zip(holes, movers, strict=True):
                self.active[hole], self.lengths[hole] = self.active[mover], self.lengths[mover]
        del self.active[remaining:], self.lengths[remaining:]

    def _step(self) -> Iterator[tuple[int, list[int]]]:
        hidden = self.forward([row.answer[-1] for row in self.active])
        yield from self._choose(hidden, 0)

    def forward(self, tokens: Sequence[int]) -> Tensor:  # [A, H]
        """Feeds every active row one token and returns the last hidden states."""
        device = self.cache.layers[0].keys.device
        self.rows = torch.arange(len(self.active), device=device)
        self.positions = torch.tensor(self.lengths, device=device)
        self.width = -(-(max(self.lengths) + 1) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
        hidden = self.view.hidden_states(
            torch.tensor(tokens, device=device).unsqueeze(1),
            self._mask(),
            position_ids=self.positions.unsqueeze(1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.lengths = [n + 1 for n in self.lengths]
        return hidden[:, 0]

    def _mask(self) -> Tensor | dict[str, Tensor]:  # [A, 1, 1, W], added to the attention scores
        positions = torch.arange(self.width, device=self.positions.device)
        hidden = positions > self.positions.unsqueeze(1)
        masks = {kind: hidden for kind in self.kinds}
        if "sliding_attention" in masks and self.window:
            masks["sliding_attention"] = hidden | (positions <= self.positions.unsqueeze(1) - self.window)
        dtype = self.head.weight.dtype
        lowest = torch.finfo(dtype).min
        added = {
            kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, lowest)[:, None, None, :]
            for kind, mask in masks.items()
        }
        return added if len(added) > 1 else next(iter(added.values()))


@contextmanager
def maskable_attention(model: nn.Module) -> Iterator[None]:
    """Attention that takes the engine's masks: flash kernels, which take none, give way to PyTorch's own meanwhile."""
    inner = view_of(model).model
    current = getattr(inner.config, "_attn_implementation", None)
    if current in _MASKABLE or not hasattr(inner, "set_attn_implementation"):
        yield
        return
    inner.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        inner.set_attn_implementation(current)


@torch.inference_mode()
def slots_agree(model: nn.Module, tolerance: float = 1e-3) -> bool:
    """Whether two steps of the engine give the hidden states of whole forward passes: a trial with two prompts.

    The prompts differ in length, so that a model shows that reads positions off its cache or aligns masks on the right.

    Args:
        model: in evaluation mode.
        tolerance: largest allowed difference relative to the largest value; more in 16-bit formats.

    Raises:
        RuntimeError: the device failed, or its memory is full; that says nothing about the architecture.
    """
    view = view_of(model)
    if not set(view.attention[0]) <= {"full_attention", "sliding_attention"}:
        return False
    texts = [[(7 * i + 3) % view.vocabulary for i in range(n)] for n in (7, 4)]
    requests = [Request(i, i, text[:-2]) for i, text in enumerate(texts)]
    ids = torch.tensor([texts[0][:-2], [*texts[1][:-2], 0, 0, 0]], device=view.device)
    try:
        with maskable_attention(model):
            engine = SlotEngine(model, GenerationSettings(max_new_tokens=3), eos_token_ids=[], slots=2, max_prompt=5)
            engine.place(prefill(model, requests, ids)[1], 0, 2)
            for step in (-2, -1):
                ours = engine.forward([text[step] for text in texts])
                for row, text in enumerate(texts):
                    whole = torch.tensor([text[: len(text) + 1 + step]], device=view.device)
                    expected = view.hidden_states(whole)[0, -1]
                    error, largest = (x.float().abs().max() for x in (ours[row] - expected, expected))
                    if not error <= tolerance_of(expected.dtype, tolerance) * largest:
                        return False
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
        return False
    except RuntimeError as error:  # shapes that do not fit
        if is_out_of_order(error):
            raise
        return False
    return True
