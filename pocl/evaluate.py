"""How good a student is: cross-entropy, KL to its teacher, and its answers by ROUGE-L and exact match.

Cross-entropy and KL are means over response tokens, in nats per token, at temperature 1. ROUGE-L and exact match are
means over samples, as the paper reports them (section 4.1): stemmed F1, and equality after SQuAD normalisation.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pocl.data import IGNORE_INDEX, Collator, tokenize
from pocl.difficulty.score import MAX_BATCH_TOKENS, token_budget_batches
from pocl.generation import GenerationSettings, end_tokens, generate
from pocl.heads import head_of, hidden_states, shifted_labels
from pocl.rouge import rouge_l

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
    generation: GenerationSettings | None = None,
    max_new_tokens: int | None = None,
    seeds: Sequence[int] = (),
    num_generated: int | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: bool = True,
) -> EvaluationResult:
    """Evaluates a causal language model on prompt/response examples.

    Args:
        model: the model to judge.
        tokenizer: its tokenizer.
        examples: what `load_examples` returns.
        teacher: when given, KL(teacher || model) is measured against it.
        template, max_length, max_prompt_length: as in `tokenize`.
        generation: how answers are made; greedy when left out.
        max_new_tokens: overrides that of `generation`.
        seeds: sampling seeds; answers are made once a seed and the metrics averaged (the paper: 10 to 50). Empty: one
            run with the settings as they are.
        num_generated: answer the first n samples only; 0 skips generation; all when left out.
        max_batch_tokens: tokens, padding included, of one forward batch.
        progress: show progress bars.

    Raises:
        ValueError: bad data (see `tokenize`), or a teacher of another vocabulary.
    """
    rows, _ = tokenize(
        examples,
        tokenizer,
        template=template,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        progress=progress,
    )
    cross_entropy, kl, num_tokens = _token_metrics(model, teacher, rows, max_batch_tokens, progress)
    judged = rows if num_generated is None else rows.select(range(min(num_generated, len(rows))))
    rouge = match = None
    responses: tuple[str, ...] = ()
    if len(judged):
        settings = generation or GenerationSettings()
        if max_new_tokens is not None:
            settings = GenerationSettings(**{**vars(settings), "max_new_tokens": max_new_tokens})
        by_id = dict(zip(examples["id"], examples["response"], strict=True))
        references = [by_id[i] for i in judged["sample_id"]]
        rouge, match, responses = _answer_metrics(model, tokenizer, judged, references, settings, seeds, progress)
    return EvaluationResult(cross_entropy, kl, rouge, match, len(rows), num_tokens, responses)


def _token_metrics(
    model: nn.Module, teacher: nn.Module | None, rows: Dataset, max_batch_tokens: int, progress: bool
) -> tuple[float, float | None, int]:
    from tqdm.auto import tqdm

    models = [m for m in (model, teacher) if m is not None]
    modes = [m.training for m in models]
    collate = Collator(pad_token_id=0)
    sums = [0.0, 0.0]
    count = 0
    for m in models:
        m.eval()
    try:
        lengths = [len(ids) for ids in rows["input_ids"]]
        with (
            torch.inference_mode(),
            tqdm(total=len(rows), desc="evaluating", unit=" samples", disable=not progress) as bar,
        ):
            for indices in token_budget_batches(lengths, max_batch_tokens):
                ce, kl, n = _batch_sums(model, teacher, collate([rows[i] for i in indices]))
                sums = [sums[0] + ce, sums[1] + kl]
                count += n
                bar.update(len(indices))
    finally:
        for m, mode in zip(models, modes, strict=True):
            m.train(mode)
    return sums[0] / count, None if teacher is None else sums[1] / count, count


def _batch_sums(model: nn.Module, teacher: nn.Module | None, batch: dict[str, Tensor]) -> tuple[float, float, int]:
    """Sums of cross-entropy and KL over the response tokens of one batch, and their number."""
    from pocl_kernels import fused_linear_cross_entropy, fused_linear_divergence

    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in batch.items()}
    labels = shifted_labels(batch["labels"])
    valid = labels != IGNORE_INDEX
    hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])[valid]
    head = head_of(model)
    n = int(valid.sum())
    ce = fused_linear_cross_entropy(hidden, head, labels[valid], reduction="sum")
    if teacher is None:
        return float(ce), 0.0, n
    teacher_hidden = hidden_states(teacher, batch["input_ids"], batch["attention_mask"])[valid]
    out = fused_linear_divergence(
        hidden, head, teacher_hidden, head_of(teacher), divergence="fkl", temperature=1.0, reduction="sum"
    )
    return float(ce), float(out.loss), n


def _answer_metrics(
    model: nn.Module,
    tokenizer: Any,
    rows: Dataset,
    references: Sequence[str],
    settings: GenerationSettings,
    seeds: Sequence[int],
    progress: bool,
) -> tuple[float, float, tuple[str, ...]]:
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    runs = [GenerationSettings(**{**vars(settings), "seed": s}) for s in seeds] or [settings]
    rouge, match = [], []
    first: tuple[str, ...] = ()
    for run in runs:
        answers = generate(
            model,
            prompts,
            run,
            eos_token_ids=end_tokens(model, tokenizer),
            sample_ids=rows["sample_id"],
            progress=progress,
        )
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        first = first or tuple(texts)
        rouge += rouge_l(texts, references)
        match += exact_match(texts, references)
    return sum(rouge) / len(rouge), sum(match) / len(match), first
