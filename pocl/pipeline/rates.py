"""How fast this machine runs models of given shapes, measured in about a second and without their weights.

What is timed is a stack of decoder layers of the model's own shape, made of plain PyTorch: a few layers on a few rows,
and the loss and the optimizer that training uses. transformers takes longer to import its models than all of this.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LAYERS = 3  # of the stack that is timed, each with weights of its own: shared ones would stay in the processor's cache
_FLOPS = 8e9  # of one timed pass, about
_TOKENS = (32, 512)  # of one timed pass
_HEAD_NUMBERS = 32e6  # of the output embedding that is timed, at most; time grows with its rows
_OPTIMIZED = 4_000_000  # numbers of the optimizer step that is timed
_JUDGED = 256  # response tokens; more of them take as much each
_FEW = 4  # answers in the making
_REPEATS = 3


@dataclass(frozen=True)
class Shape:
    """Of a decoder."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    parameters: int
    """All of them, tied ones once."""
    trained: int | None = None
    """Of adapters; None where all parameters are trained."""

    @property
    def per_layer(self) -> int:
        """Weights of a layer of this stack."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.inner

    @property
    def weight(self) -> float:
        """How much more a layer of the model holds than one of this stack: experts, other kinds of blocks."""
        rest = self.parameters - self.vocabulary * self.hidden
        return min(8.0, max(0.25, rest / (self.layers * self.per_layer)))


@dataclass(frozen=True)
class Rates:
    """Seconds of one model on this machine."""

    read: float
    """A token through all layers, without gradients."""
    learn: float
    """A token through all layers and back."""
    judge: float
    """The head at a response token, without gradients."""
    compare: float
    """The head, the loss against a teacher and their gradients at a response token."""
    answer: float
    """A token of an answer, beside what its step takes in any case."""
    step: float
    """A step that adds a token to each of the answers in the making, however few they are."""
    update: float
    """Clipping and a step of the optimizer."""


def shape_of(config: Any, parameters: int, trained: int | None = None) -> Shape:
    """By a configuration of transformers, whatever its names of these numbers are."""
    text = config.get_text_config(decoder=True)

    def first(*names: str) -> int | None:
        return next((int(value) for name in names if isinstance(value := getattr(text, name, None), int)), None)

    hidden = first("hidden_size", "n_embd", "d_model") or 1024
    heads = first("num_attention_heads", "n_head") or max(1, hidden // 64)
    return Shape(
        layers=first("num_hidden_layers", "n_layer") or 1,
        hidden=hidden,
        inner=first("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        heads=heads,
        kv_heads=first("num_key_value_heads") or heads,
        head_size=first("head_dim") or hidden // heads,
        vocabulary=first("vocab_size") or 1,
        parameters=parameters,
        trained=trained,
    )


def measure(
    shape: Shape,
    *,
    length: int,
    rows: int,
    responses: int,
    answering: int,
    teacher: Shape | None,
    precision: str,
) -> Rates:
    """Time a model of a shape on the device that runs models here.

    Args:
        shape: of the model.
        length: tokens of a row.
        rows: of a batch of training.
        responses: response tokens of a batch.
        answering: answers that are made at a time.
        teacher: whom it learns from; None where it is only read and asked, the rest is then 0.
        precision: of training, as `training.precision`.
    """
    from pocl.devices import accelerator

    device = accelerator() or torch.device("cpu")
    made = _Stack(shape, device)
    autocast = torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")
    tokens = int(min(_TOKENS[1], max(_TOKENS[0], _FLOPS / (2 * made.count * shape.per_layer))))
    batch = (max(1, tokens // length), min(length, tokens))
    scale = shape.layers / made.count * shape.weight
    with torch.inference_mode():
        read = _seconds(lambda: made.forward(made.hidden(*batch))) / (batch[0] * batch[1])
        head = _seconds(lambda: made.judge(_JUDGED)) / _JUDGED * made.head_scale
        many = max(_FEW + 1, answering)
        few, all_ = (scale * _seconds(partial(made.step, n, length)) for n in (_FEW, many))
        few, all_ = (s + made.head_scale * _seconds(partial(made.project, n)) for s, n in ((few, _FEW), (all_, many)))
        answer = max(0.0, all_ - few) / (many - _FEW)
        step = max(0.0, few - _FEW * answer)
    if teacher is None:
        return Rates(scale * read, 0.0, head, 0.0, answer, step, 0.0)
    batch = (max(1, min(rows, tokens // length)), min(length, tokens))
    numbers = shape.parameters if shape.trained is None else shape.trained
    with autocast:
        learn = _seconds(lambda: made.learn(made.hidden(*batch), weights=shape.trained is None)) / (batch[0] * batch[1])
        responses = min(_TOKENS[1], max(1, responses))
        compare = _seconds(made.compare(_Stack(teacher, device, layers=0), responses)) / responses * made.head_scale
    update = _seconds(_optimizer(min(numbers, _OPTIMIZED), device)) * numbers / min(numbers, _OPTIMIZED)
    return Rates(scale * read, scale * learn, head, compare, answer, step, update)


def _seconds(work: Callable[[], Tensor]) -> float:
    """The best of a few, after one that does not count."""
    taken = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        work().sum().item()  # the number makes the host wait for the device
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def _optimizer(count: int, device: torch.device) -> Callable[[], Tensor]:
    """As many numbers read and written as clipping and a fused step of AdamW; its module would import the compiler."""
    weight, gradient, first, second = (torch.full((count,), 1e-3, device=device) for _ in range(4))

    def work() -> Tensor:
        gradient.mul_((1.0 / (gradient.norm() + 1)).clamp(max=1.0))
        first.lerp_(gradient, 0.1)
        weight.addcdiv_(first, second, value=-1e-4)
        return weight[:1]

    return work


class _Stack:
    """Some layers with rotary attention and a gated MLP, and a piece of the output embedding."""

    def __init__(self, shape: Shape, device: torch.device, layers: int = _LAYERS) -> None:
        def made(*size: int) -> Tensor:
            return torch.full(size, 1e-2, device=device)

        self.shape, self.device, self.count = shape, device, min(layers, shape.layers)
        h, q, kv = shape.hidden, shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        sizes = ((q, h), (kv, h), (kv, h), (h, q), (shape.inner, h), (shape.inner, h), (h, shape.inner), (h,), (h,))
        self.layers = [[made(*size) for size in sizes] for _ in range(self.count)]
        words = int(min(shape.vocabulary, _HEAD_NUMBERS // h))
        self.head, self.head_scale = made(words, h), shape.vocabulary / words
        self.made = made

    def hidden(self, rows: int, length: int) -> Tensor:
        return self.made(rows, length, self.shape.hidden)

    def forward(self, x: Tensor, past: int = 0) -> Tensor:
        rows, length, _ = x.shape
        turn = self.made(length, self.shape.head_size)
        for q, k, v, o, gate, up, down, first, second in self.layers:
            normed = _norm(x, first)
            queries, keys, values = (self._heads(F.linear(normed, weight)) for weight in (q, k, v))
            queries, keys = _turned(queries, turn), _turned(keys, turn)
            if past:
                keys, values = (self.made(rows, self.shape.kv_heads, past, self.shape.head_size) for _ in range(2))
            grouped = self.shape.heads != self.shape.kv_heads
            mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=not past, enable_gqa=grouped)
            x = x + F.linear(mixed.transpose(1, 2).reshape(rows, length, -1), o)
            normed = _norm(x, second)
            x = x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)
        return x

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.shape.head_size)).transpose(1, 2)

    def learn(self, x: Tensor, *, weights: bool) -> Tensor:
        tensors = [weight.requires_grad_(weights) for layer in self.layers for weight in layer]
        x.requires_grad_()
        out = self.forward(x).sum()
        found = torch.autograd.grad(out, [x, *(tensors if weights else [])])
        for weight in tensors:
            weight.requires_grad_(False)
        return found[0]

    def step(self, rows: int, past: int) -> Tensor:
        return self.forward(self.hidden(rows, 1), past)

    def project(self, rows: int) -> Tensor:
        return F.linear(self.hidden(rows, 1), self.head).argmax(-1)

    def judge(self, tokens: int) -> Tensor:
        from pocl_kernels import fused_linear_cross_entropy

        labels = torch.zeros(tokens, dtype=torch.int64, device=self.device)
        return fused_linear_cross_entropy(self.made(tokens, self.shape.hidden), self.head, labels, reduction="none")

    def compare(self, teacher: _Stack, tokens: int) -> Callable[[], Tensor]:
        from pocl_kernels import fused_linear_divergence

        words = min(len(self.head), len(teacher.head))
        student = self.head[:words].clone().requires_grad_()
        hidden = self.made(tokens, self.shape.hidden).requires_grad_()
        other, labels = self.made(tokens, teacher.shape.hidden), torch.zeros(tokens, dtype=torch.int64).to(self.device)

        def work() -> Tensor:
            out = fused_linear_divergence(
                hidden, student, other, teacher.head[:words], labels=labels, ce_weight=0.1, temperature=1.5
            )
            return torch.autograd.grad(out.loss, [hidden, student])[0] * (len(self.head) / words)

        return work


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * turn + torch.cat((-right, left), dim=-1) * turn
