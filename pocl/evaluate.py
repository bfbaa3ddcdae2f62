"""How good a student is: cross-entropy, KL to its teacher, and its answers by ROUGE-L and exact match.

Cross-entropy and KL are means over response tokens, in nats per token, at temperature 1. ROUGE-L and exact match are
means over samples, as the paper reports them (section 4.1): stemmed F1, and equality after SQuAD normalisation.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from pocl.difficulty.measure import (
    MAX_BATCH_TOKENS,
    TokenScores,
    asked,
    check_models,
    check_samples,
    engine_scores,
    token_scores,
)
from pocl.difficulty.samples import Sample, SampleReader
from pocl.engines import Engine
from pocl.generation import GenerationSettings, end_tokens, generate
from pocl.rouge import check_rule, count_wordless, pair_scores, warn_of_wordless

if TYPE_CHECKING:
    from datasets import Dataset

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = set(string.punctuation)


@dataclass(frozen=True)
class EvaluationResult:
    """Means over the evaluation set."""

    cross_entropy: float
    """Nats per response token."""
    kl_to_teacher: float | None
    """KL(teacher || student), nats per response token; None without a teacher."""
    rouge_l: float | None
    """Mean F1 in [0, 1]; None when nothing was generated."""
    exact_match: float | None
    """Share of answers equal to the reference after normalisation, in [0, 1]; None when nothing was generated."""
    num_samples: int
    num_tokens: int
    responses: tuple[str, ...]
    """The answers of the first run, in the order of the samples."""
    of_each: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The same measures sample by sample, in order, with `sample_id` and `num_tokens` (response tokens): `rouge_l` and
    `exact_match` are means over the runs, and may be of the first samples alone."""

    def metrics(self) -> dict[str, float]:
        """The numbers alone, without what was not measured."""
        names = ("cross_entropy", "kl_to_teacher", "rouge_l", "exact_match")
        return {name: float(v) for name in names if (v := getattr(self, name)) is not None}


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1.0 where prediction and reference are equal after `normalize_answer`, else 0.0.

    Raises:
        ValueError: the two differ in length.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions and references must have the same length, got {len(predictions)} and {len(references)}"
        )
    return [float(normalize_answer(p) == normalize_answer(r)) for p, r in zip(predictions, references, strict=True)]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    examples: Dataset,
    *,
    teacher: nn.Module | None = None,
    template: str = "auto",
    max_length: int = 512,
    max_prompt_length: int = 256,
    template_kwargs: Mapping[str, Any] | None = None,
    special_tokens: str = "text",
    generation: GenerationSettings | None = None,
    max_new_tokens: int | None = None,
    seeds: Sequence[int] = (),
    num_generated: int | None = None,
    words: str = "auto",
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    engine: str | Engine = "transformers",
    engine_args: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Evaluates a causal language model on prompt/response examples.

    Args:
        model: the model to judge.
        tokenizer: its tokenizer.
        examples: what `load_examples` returns, or rows from `tokenize` (references are then decoded from the labels).
        teacher: when given, KL(teacher || model) is measured against it.
        template, max_length, max_prompt_length, template_kwargs, special_tokens: as in `tokenize`.
        generation: how answers are made; greedy when left out.
        max_new_tokens: overrides that of `generation`.
        seeds: sampling seeds; answers are made once a seed and the metrics averaged (the paper: 10 to 50). Empty: one
            run with the settings as they are.
        num_generated: answer the first n samples only; 0 skips generation; all when left out.
        words: what ROUGE-L takes for a word: `auto`, `rouge_score`, `unicode` or `characters` (see `pocl.rouge`).
        max_batch_tokens: tokens, padding included, of one forward batch.
        engine, engine_args: who runs the model; see `score`. With a teacher, cross-entropy and KL are measured in this
            process.
        progress: show progress bars.

    Raises:
        ValueError: bad data (see `score`), a model that the trainer would refuse (`pocl.heads.verify_head`), or a
            teacher whose vocabulary differs in more than padding.
    """
    check_rule(words)
    check_models(model, teacher)
    read = SampleReader(
        tokenizer,
        examples.column_names,
        template=template,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        template_kwargs=template_kwargs,
        special_tokens=special_tokens,
    )
    samples = read(examples)
    if not samples:
        raise ValueError("no sample is left to evaluate: none has a prompt and a response")
    check_samples(model, samples)
    judged = samples if num_generated is None else samples[:num_generated]
    settings = generation or GenerationSettings()
    if max_new_tokens is not None:
        settings = replace(settings, max_new_tokens=max_new_tokens)
    each: dict[str, Sequence[float]] = {
        "sample_id": [s.sample_id for s in samples],
        "num_tokens": [len(s.response) for s in samples],
    }
    rouge = match = None
    responses: tuple[str, ...] = ()
    longest = max(max(map(len, samples)) + 1, max(len(s.prompt) for s in samples) + settings.max_new_tokens)
    with asked(model, engine, engine_args, longest) as apart:
        scores = _scores(model, samples, teacher, apart, max_batch_tokens, progress)
        each["cross_entropy"] = [s.cross_entropy for s in scores]
        if teacher is not None:
            each["kl_to_teacher"] = [s.kl_to_teacher or 0.0 for s in scores]
        if judged:
            runs = [replace(settings, seed=seed) for seed in seeds] or [settings]
            each["rouge_l"], each["exact_match"], responses = _answer_metrics(
                model, tokenizer, judged, runs, words, progress, apart
            )
            rouge, match = (math.fsum(each[name]) / len(judged) for name in ("rouge_l", "exact_match"))
    counts = [len(sample.response) for sample in samples]
    kl = None if teacher is None else _token_mean([s.kl_to_teacher or 0.0 for s in scores], counts)
    cross_entropy = _token_mean([s.cross_entropy for s in scores], counts)
    of_each = {name: tuple(values) for name, values in each.items()}
    return EvaluationResult(cross_entropy, kl, rouge, match, len(samples), sum(counts), responses, of_each)


def _scores(
    model: nn.Module,
    samples: Sequence[Sample],
    teacher: nn.Module | None,
    apart: Engine | None,
    max_batch_tokens: int,
    progress: bool,
) -> list[TokenScores]:
    with tqdm(total=len(samples), desc="evaluating", unit=" samples", disable=not progress) as bar:

        def advance(count: int, _tokens: int) -> None:
            bar.update(count)

        if apart is not None and teacher is None:
            return engine_scores(apart, samples, advance)
        return token_scores(model, samples, teacher=teacher, max_batch_tokens=max_batch_tokens, advance=advance)


def _token_mean(means: Sequence[float], counts: Sequence[int]) -> float:
    """Mean over all tokens from each sample's mean and number of tokens."""
    return math.fsum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)


def _answer_metrics(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    runs: Sequence[GenerationSettings],
    words: str,
    progress: bool,
    apart: Engine | None,
) -> tuple[list[float], list[float], tuple[str, ...]]:
    """ROUGE-L and exact match of each sample, means over the runs, and the answers of the first run."""
    references = [sample.reference for sample in samples]
    warn_of_wordless(count_wordless(references, words), len(references), words)
    rouge: list[list[float]] = []
    match: list[list[float]] = []
    first: tuple[str, ...] = ()
    for run in runs:
        ends, ids = end_tokens(model, tokenizer), [sample.sample_id for sample in samples]
        prompts = [sample.prompt for sample in samples]
        if apart is None:
            answers = generate(model, prompts, run, eos_token_ids=ends, sample_ids=ids, progress=progress)
        else:
            answers = apart.answers(prompts, run, eos_token_ids=ends, sample_ids=ids)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        first = first or tuple(texts)
        rouge.append(pair_scores(texts, references, stem=True, words=words))
        match.append(exact_match(texts, references))
    return _means(rouge), _means(match), first


def _means(runs: Sequence[Sequence[float]]) -> list[float]:
    """Sample by sample, over the runs."""
    return [math.fsum(values) / len(runs) for values in zip(*runs, strict=True)]
