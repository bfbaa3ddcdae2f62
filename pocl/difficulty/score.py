"""Per-sample difficulty: cross-entropy of the reference answer and ROUGE-L of the student's own answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pocl.data import IGNORE_INDEX, Collator, tokenize
from pocl.generation import GenerationSettings, end_tokens, generate
from pocl.heads import head_of, hidden_states, shifted_labels
from pocl.rouge import rouge_l

if TYPE_CHECKING:
    from datasets import Dataset

MAX_BATCH_TOKENS = 4096


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that rows x longest row <= `max_tokens` (a longer row goes alone), longest rows first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def sample_cross_entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of each sample's response, [B] float64, nats per response token; no logits are made."""
    from pocl_kernels import fused_linear_cross_entropy

    hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])
    labels = shifted_labels(batch["labels"])
    rows, _ = torch.nonzero(labels != IGNORE_INDEX, as_tuple=True)
    valid = labels != IGNORE_INDEX
    losses = fused_linear_cross_entropy(hidden[valid], head_of(model), labels[valid], reduction="none")
    count = valid.sum(dim=1)
    total = torch.zeros(len(count), dtype=torch.float64, device=losses.device).index_add_(0, rows, losses.double())
    return total / count


def cross_entropies(
    model: nn.Module, tokens: Dataset, *, max_batch_tokens: int = MAX_BATCH_TOKENS, progress: bool = True
) -> list[float]:
    """Cross-entropy of every tokenised sample, in its order.

    Raises:
        ValueError: a value that is not finite; names the sample.
    """
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    collate = Collator(pad_token_id=0)
    out = [0.0] * len(tokens)
    lengths = [len(ids) for ids in tokens["input_ids"]]
    batches = token_budget_batches(lengths, max_batch_tokens)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _bar(tqdm, len(tokens), "cross-entropy", progress) as bar:
            for indices in batches:
                batch = {k: v.to(device) for k, v in collate([tokens[i] for i in indices]).items()}
                values = sample_cross_entropy(model, batch)
                for i, value in zip(indices, values.tolist(), strict=True):
                    if not torch.isfinite(torch.tensor(value)):
                        raise ValueError(
                            f"the cross-entropy of sample {tokens[i]['sample_id']} is {value}: the model gives "
                            "non-finite logits for it; score in float32 or check the weights"
                        )
                    out[i] = value
                bar.update(len(indices))
    finally:
        model.train(was_training)
    return out


def _bar(tqdm: Any, total: int, description: str, progress: bool) -> Any:
    return tqdm(total=total, desc=description, unit=" samples", disable=not progress)


def score(
    model: nn.Module,
    tokenizer: Any,
    dataset: Dataset,
    *,
    template: str = "auto",
    max_length: int = 512,
    max_prompt_length: int = 256,
    generation: GenerationSettings | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    stem: bool = True,
    progress: bool = True,
) -> Dataset:
    """Scores every sample with the student before distillation (arXiv 2506.05695, section 3.2).

    Args:
        model: the student, a Hugging Face causal language model.
        tokenizer: its tokenizer.
        dataset: examples from `load_examples`, or rows from `tokenize` (references are then decoded from the labels).
        template, max_length, max_prompt_length: as in `tokenize`; unused for rows.
        generation: how answers are made; greedy when left out.
        max_batch_tokens: tokens, padding included, of one cross-entropy batch.
        stem: compare Porter stems.
        progress: show progress bars.

    Returns:
        A `Dataset` with `sample_id`, `cross_entropy` (nats per response token), `rouge_l` (F1 in [0, 1]), `response`
        (the model's answer) and `num_tokens` (tokens of the reference answer), in the order of `dataset`.
    """
    from datasets import Dataset

    rows, references = _prepare(tokenizer, dataset, template, max_length, max_prompt_length, progress)
    losses = cross_entropies(model, rows, max_batch_tokens=max_batch_tokens, progress=progress)
    prompts = [row["input_ids"][: row["prompt_length"]] for row in _iterate(rows)]
    answers = generate(
        model,
        prompts,
        generation,
        eos_token_ids=end_tokens(model, tokenizer),
        sample_ids=rows["sample_id"],
        progress=progress,
    )
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return Dataset.from_dict(
        {
            "sample_id": rows["sample_id"],
            "cross_entropy": losses,
            "rouge_l": rouge_l(texts, references, stem=stem),
            "response": texts,
            "num_tokens": [sum(label != IGNORE_INDEX for label in row["labels"]) for row in _iterate(rows)],
        }
    )


def _iterate(rows: Dataset) -> Iterator[dict[str, Any]]:
    return iter(rows)


def _prepare(
    tokenizer: Any, dataset: Dataset, template: str, max_length: int, max_prompt_length: int, progress: bool
) -> tuple[Dataset, list[str]]:
    """Token rows and reference texts, from examples or from rows."""
    if "input_ids" in dataset.column_names:
        labels = [[t for t in row["labels"] if t != IGNORE_INDEX] for row in _iterate(dataset)]
        return dataset, tokenizer.batch_decode(labels, skip_special_tokens=True)
    rows, _ = tokenize(
        dataset,
        tokenizer,
        template=template,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        progress=progress,
    )
    by_id = dict(zip(dataset["id"], dataset["response"], strict=True))
    return rows, [by_id[i] for i in rows["sample_id"]]
