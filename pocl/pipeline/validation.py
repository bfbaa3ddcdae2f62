"""What is measured on the validation samples besides the loss of the stage: numbers that compare across stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pocl.pipeline.context import Context

if TYPE_CHECKING:
    from pocl.teacher import LikelyTokens, Teacher


def validation_metrics(context: Context) -> Callable[[Any], dict[str, float]]:
    """KL(teacher || student) at temperature 1, and, where the best weights are chosen by it, the answers' ROUGE-L."""
    from pocl.pipeline.teacher import teacher_for_training

    teacher = teacher_for_training(context)
    rouge = _answer_metric(context) if metric_of(context) == "rouge_l" else None
    rows, batch_size = context.rows("validation"), context.recipe.training.batch_size

    def measure(model: Any) -> dict[str, float]:
        measured = {"kl_to_teacher": kl_to_teacher(model, teacher, rows, batch_size)}
        return measured | ({"rouge_l": rouge(model)} if rouge else {})

    return measure


def metric_of(context: Context) -> str:
    """What the best weights are chosen by: `training.metric`, but for a corpus, which has no answers, the loss."""
    return "loss" if context.is_corpus() else context.recipe.training.metric


def kl_to_teacher(model: Any, teacher: Teacher | LikelyTokens, rows: Any, batch_size: int) -> float:
    """KL(teacher || model) at temperature 1, nats per response token; every process measures all rows."""
    import torch

    from pocl import fused_linear_divergence, heads
    from pocl.data import Collator
    from pocl.teacher import signal_of

    device = next(model.parameters()).device
    collate, was_training = Collator(0), model.training
    total, tokens = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            chosen = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
            batch = {name: tensor.to(device) for name, tensor in chosen.items()}
            index = (heads.shifted_labels(batch["labels"]).flatten() != -100).nonzero()[:, 0]
            hidden = heads.hidden_states(model, batch["input_ids"], attention_mask=batch["attention_mask"])
            out = fused_linear_divergence(
                hidden.flatten(0, 1)[index],
                heads.head_of(model),
                *signal_of(teacher, batch),
                reduction="sum",
            )
            total += float(out.divergence)
            tokens += len(index)
    model.train(was_training)
    return total / max(tokens, 1)


def _answer_metric(context: Context) -> Callable[[Any], float]:
    """ROUGE-L of a student's greedy answers to the validation prompts."""
    from pocl.difficulty.samples import SampleReader
    from pocl.generation import GenerationSettings, end_tokens, generate
    from pocl.rouge import count_wordless, pair_scores, warn_of_wordless

    tokenizer = context.tokenizer()
    samples = SampleReader.of_rows(tokenizer)(context.judged_rows("validation"))
    prompts, references = [sample.prompt for sample in samples], [sample.reference for sample in samples]
    settings = GenerationSettings(max_new_tokens=context.recipe.ranking.max_new_tokens)
    words = context.recipe.ranking.words
    warn_of_wordless(count_wordless(references, words), len(references), words)

    def measure(model: Any) -> float:
        ends = end_tokens(model, tokenizer)
        answers = generate(model, prompts, settings, eos_token_ids=ends, progress=False)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        scores = pair_scores(texts, references, stem=True, words=words)
        return sum(scores) / len(scores)

    return measure
