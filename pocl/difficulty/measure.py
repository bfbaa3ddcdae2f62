"""What one pass of a model over samples tells: cross-entropy, distance to a teacher, and the model's own answers.

Batches are filled up to a budget of tokens from samples sorted by length, and only response positions are projected to
the vocabulary, without logits. The same pass leaves the keys and values of the prompts behind: answers start from them.

B: samples of a batch, L: longest of them, N: response tokens of the batch, H: hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocl.data import IGNORE_INDEX
from pocl.difficulty.samples import Sample
from pocl.engines import Engine, check_engine, running
from pocl.generation import GenerationSettings, Prefilled, Request, SlotEngine, maskable_attention, prefill
from pocl.generation.fallback import answer_in_batches
from pocl.generation.settings import check_prompts
from pocl.models import check_vocabularies, in_evaluation_mode, verify_head, view_of

MAX_BATCH_TOKENS = 4096
# On a CPU, so that the memory of scoring is the same for any vocabulary; at 150,000 tokens it costs 15 % of the speed.
_CPU_WORKSPACE_MB = 64.0

Advance = Callable[[int, int], None]
"""Called with (samples finished, tokens processed) since the last call."""


@dataclass(frozen=True)
class TokenScores:
    """Means over one sample's response tokens, in nats per token."""

    cross_entropy: float
    teacher_cross_entropy: float | None = None
    kl_to_teacher: float | None = None


@dataclass(frozen=True)
class Answering:
    """How answers are made: settings that are resolved, nothing left to find out."""

    settings: GenerationSettings
    eos_token_ids: tuple[int, ...]
    backend: str
    """`slots` or `transformers`; or the name of an engine apart from this process."""
    rows: int
    """Answers in the making at a time; 0 where an engine decides for itself."""


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that rows x longest row <= `max_tokens` (a longer row goes alone), longest rows first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def check_models(model: nn.Module, teacher: nn.Module | None) -> None:
    """Refuses models whose scores would not be theirs: what the trainer checks of them.

    Raises:
        ValueError: see `pocl.heads.verify_head`; or the two differ in more than padding of the vocabulary.
    """
    verify_head(model)
    if teacher is not None:
        verify_head(teacher)
        check_vocabularies(view_of(model).head().vocab_size, view_of(teacher).head().vocab_size)


def check_samples(model: nn.Module, samples: Sequence[Sample]) -> None:
    """Refuses samples that the model cannot read.

    Raises:
        ValueError: prompt and response together exceed the model's context, or the prompt fills it; names the sample.
    """
    context = view_of(model).context
    for sample in samples:
        if context and len(sample) > context:
            raise ValueError(
                f"sample {sample.sample_id} has {len(sample)} tokens and the context of {type(model).__name__} is "
                f"{context}; lower max_length"
            )
    check_prompts(model, [Request(i, s.sample_id, s.prompt) for i, s in enumerate(samples)])


def token_scores(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    teacher: nn.Module | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    advance: Advance | None = None,
) -> list[TokenScores]:
    """Scores of every sample, in order, without answers.

    Raises:
        ValueError: a sample that does not fit, or a value that is not finite; names the sample.
    """
    out: list[TokenScores | None] = [None] * len(samples)
    with _evaluating(model, teacher):
        for indices in token_budget_batches([len(s) for s in samples], max_batch_tokens):
            batch = [samples[i] for i in indices]
            input_ids = _stack(batch, view_of(model).device)
            for i, scores in zip(indices, _batch_scores(model, teacher, batch, input_ids), strict=True):
                out[i] = scores
            if advance is not None:
                advance(len(batch), sum(map(len, batch)))
    return [scores for scores in out if scores is not None]


@contextmanager
def asked(
    model: nn.Module, engine: str | Engine, engine_args: Mapping[str, Any] | None, max_model_len: int | None
) -> Iterator[Engine | None]:
    """The engine apart from this process that is to run a model, None where this process does."""
    if engine == "transformers":
        check_engine(engine, engine_args)
        yield None
    elif isinstance(engine, str):
        with running(model, engine, engine_args=engine_args, max_model_len=max_model_len) as made:
            yield made
    else:
        yield engine


def engine_scores(engine: Engine, samples: Sequence[Sample], advance: Advance | None = None) -> list[TokenScores]:
    """Cross-entropies of every sample, in order, as an engine tells them.

    Raises:
        ValueError: as `token_scores`.
    """
    rows: list[dict[str, Any]] = [
        {
            "sample_id": sample.sample_id,
            "input_ids": sample.prompt + sample.response,
            "labels": [IGNORE_INDEX] * len(sample.prompt) + sample.response,
        }
        for sample in samples
    ]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    told = engine.log_probs_of([rows[i] for i in order])
    losses = dict(zip(order, told, strict=True))
    values = torch.cat([-losses[i] for i in range(len(samples))])
    if advance is not None:
        advance(len(samples), sum(map(len, samples)))
    return [TokenScores(mean) for mean in _means(values, [len(s.response) for s in samples], samples, "cross-entropy")]


def engine_answers(
    engine: Engine, samples: Sequence[Sample], answering: Answering, advance: Advance | None = None
) -> list[list[int]]:
    """The answer of an engine to every sample's prompt, in order."""
    answers = engine.answers(
        [sample.prompt for sample in samples],
        answering.settings,
        eos_token_ids=answering.eos_token_ids,
        sample_ids=[sample.sample_id for sample in samples],
    )
    if advance is not None:
        advance(len(samples), sum(map(len, answers)))
    return answers


def scores_and_answers(
    model: nn.Module,
    samples: Sequence[Sample],
    answering: Answering,
    *,
    teacher: nn.Module | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    advance: Advance | None = None,
) -> tuple[list[TokenScores], list[list[int]]]:
    """Scores of every sample and the model's answer to its prompt, in order.

    Raises:
        ValueError: as `token_scores`.
    """
    answers: list[list[int]] = [[] for _ in samples]
    requests = [Request(i, s.sample_id, s.prompt) for i, s in enumerate(samples)]
    if answering.backend != "slots":
        losses = token_scores(model, samples, teacher=teacher, max_batch_tokens=max_batch_tokens)
        with _evaluating(model, None):
            finished = answer_in_batches(
                model,
                requests,
                answering.settings,
                eos_token_ids=answering.eos_token_ids,
                batch_size=answering.rows,
            )
            _collect(finished, samples, answers, advance)
        return losses, answers
    scores: list[TokenScores | None] = [None] * len(samples)

    def prompts() -> Iterator[Prefilled]:
        """Batches as the engine asks for them; their samples are scored on the way."""
        for indices in token_budget_batches([len(s) for s in samples], max_batch_tokens):
            batch = [samples[i] for i in indices]
            input_ids = _stack(batch, view_of(model).device)
            hidden, ready = prefill(model, [requests[i] for i in indices], input_ids)
            for i, found in zip(indices, _batch_scores(model, teacher, batch, input_ids, hidden), strict=True):
                scores[i] = found
            del hidden
            yield ready

    with _evaluating(model, teacher), maskable_attention(model):
        engine = SlotEngine(
            model,
            answering.settings,
            eos_token_ids=answering.eos_token_ids,
            slots=min(answering.rows, len(samples)),
            max_prompt=max(len(s.prompt) for s in samples),
        )
        _collect(engine.run(prompts()), samples, answers, advance)
    return [found for found in scores if found is not None], answers


def _collect(
    finished: Iterator[tuple[int, list[int]]],
    samples: Sequence[Sample],
    answers: list[list[int]],
    advance: Advance | None,
) -> None:
    for index, answer in finished:
        answers[index] = answer
        if advance is not None:
            advance(1, len(samples[index]) + len(answer))


def _stack(samples: Sequence[Sample], device: torch.device) -> Tensor:  # [B, L]
    input_ids = torch.zeros(len(samples), max(map(len, samples)), dtype=torch.int64)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample)] = torch.as_tensor(sample.prompt + sample.response)
    return input_ids.to(device)


def _batch_scores(
    model: nn.Module,
    teacher: nn.Module | None,
    samples: Sequence[Sample],
    input_ids: Tensor,  # [B, L], right-padded: in a causal model padding cannot reach the tokens before it
    hidden: Tensor | None = None,  # [B, L, H] if the model has run already
) -> list[TokenScores]:
    from pocl_kernels import fused_linear_cross_entropy, fused_linear_divergence

    rows, positions = _response_positions(samples, input_ids.device)
    labels = input_ids[rows, positions + 1]
    counts = [len(s.response) for s in samples]
    view = view_of(model)
    chosen = (view.hidden_states(input_ids) if hidden is None else hidden)[rows, positions]
    head = view.head()
    scratch: dict[str, Any] = {"workspace_mb": _CPU_WORKSPACE_MB if input_ids.device.type == "cpu" else None}
    losses = fused_linear_cross_entropy(chosen, head, labels, reduction="none", **scratch)
    columns = {"cross_entropy": _means(losses, counts, samples, "cross-entropy")}
    if teacher is not None:
        of_teacher = view_of(teacher)
        teacher_chosen, teacher_head = of_teacher.hidden_states(input_ids)[rows, positions], of_teacher.head()
        teacher_losses = fused_linear_cross_entropy(teacher_chosen, teacher_head, labels, reduction="none", **scratch)
        columns["teacher_cross_entropy"] = _means(teacher_losses, counts, samples, "teacher's cross-entropy")
        divergence = fused_linear_divergence(
            chosen, head, teacher_chosen, teacher_head, divergence="fkl", temperature=1.0, reduction="none", **scratch
        )
        columns["kl_to_teacher"] = _means(divergence.loss, counts, samples, "KL to the teacher")
    return [TokenScores(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _response_positions(samples: Sequence[Sample], device: torch.device) -> tuple[Tensor, Tensor]:  # [N], [N]
    """Rows and positions whose next token is a response token."""
    rows = [row for row, s in enumerate(samples) for _ in s.response]
    positions = [len(s.prompt) - 1 + i for s in samples for i in range(len(s.response))]
    return torch.tensor(rows, device=device), torch.tensor(positions, device=device)


def _means(values: Tensor, counts: Sequence[int], samples: Sequence[Sample], name: str) -> list[float]:
    # On the CPU and in float64: the sum of a sample must not depend on the batch or on the order of atomic additions.
    means = [float(part.mean()) for part in values.double().cpu().split(list(counts))]
    for sample, mean in zip(samples, means, strict=True):
        if not math.isfinite(mean):
            raise ValueError(
                f"the {name} of sample {sample.sample_id} is {mean}: the model gives non-finite logits for it; "
                "score in float32 or check the weights"
            )
    return means


@contextmanager
def _evaluating(model: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """Both models in eval mode and without gradients; what they were before is restored."""
    with ExitStack() as stack:
        for each in (model, teacher):
            if each is not None:
                stack.enter_context(in_evaluation_mode(each))
        stack.enter_context(torch.inference_mode())
        yield
