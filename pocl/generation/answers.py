"""From prompts to answers: by continuous batching where the architecture allows it, else by padded batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from pocl.generation.fallback import answer_in_batches
from pocl.generation.memory import rows_that_fit
from pocl.generation.settings import GenerationSettings, Request, check_prompts
from pocl.generation.slots import Prefilled, SlotEngine, maskable_attention, prefill, slots_agree
from pocl.models import in_evaluation_mode, view_of

BACKENDS = ("auto", "slots", "transformers")
_PREFILL_TOKENS = 4096

logger = logging.getLogger(__name__)


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings | None = None,
    *,
    eos_token_ids: Sequence[int],
    sample_ids: Sequence[int] | None = None,
    batch_size: int | None = None,
    backend: str = "auto",
    progress: bool = True,
) -> list[list[int]]:
    """The answer to each prompt as token ids, in the order of the prompts, without the end token.

    Args:
        model: a Hugging Face causal language model.
        prompts: token ids of each prompt, none empty.
        settings: greedy with 256 new tokens when left out.
        eos_token_ids: an answer ends before the first of these (see `end_tokens`).
        sample_ids: what the sampling seed of each prompt is made of; its position when left out.
        batch_size: rows at a time; what fits into memory when left out.
        backend: `slots` (continuous batching), `transformers` (padded batches through `model.generate`), or `auto`:
            slots where a trial run shows that the architecture allows them.
        progress: show a progress bar.

    Raises:
        ValueError: an empty prompt, a prompt longer than the model's context, logits that are not finite (names the
            sample), or a bad argument.
    """
    settings = settings or GenerationSettings()
    ids = list(range(len(prompts))) if sample_ids is None else [int(i) for i in sample_ids]
    if len(ids) != len(prompts):
        raise ValueError(f"sample_ids must have one id a prompt, got {len(ids)} for {len(prompts)} prompts")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}; leave it out to fill the memory")
    requests = [Request(i, ids[i], prompt) for i, prompt in enumerate(prompts)]
    check_prompts(model, requests)
    if not requests:
        return []
    answers: list[list[int]] = [[] for _ in prompts]
    from tqdm.auto import tqdm

    with (
        in_evaluation_mode(model),
        torch.inference_mode(),
        tqdm(total=len(prompts), desc="answering", unit=" samples", disable=not progress) as bar,
    ):
        tokens = 0
        for index, answer in _answers(model, requests, settings, eos_token_ids, batch_size, backend):
            answers[index] = answer
            tokens += len(answer)
            bar.update()
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)
    return answers


def resolve_backend(model: nn.Module, backend: str) -> str:
    """`auto` becomes `slots` or `transformers`, by a trial of the model (in eval mode); others are checked and kept."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto":
        return backend
    if slots_agree(model):
        return "slots"
    logger.warning(
        "%s does not run on the slot engine; answers come from padded batches of model.generate, which is slower",
        type(model).__name__,
    )
    return "transformers"


def _answers(
    model: nn.Module,
    requests: Sequence[Request],
    settings: GenerationSettings,
    eos_token_ids: Sequence[int],
    batch_size: int | None,
    backend: str,
) -> Iterator[tuple[int, list[int]]]:
    longest = max(len(r.prompt) for r in requests)
    rows = min(batch_size or rows_that_fit(model, longest + settings.max_new_tokens), len(requests))
    if resolve_backend(model, backend) == "transformers":
        return answer_in_batches(model, requests, settings, eos_token_ids=eos_token_ids, batch_size=rows)
    return _answers_from_slots(model, requests, settings, eos_token_ids, rows)


def _answers_from_slots(
    model: nn.Module, requests: Sequence[Request], settings: GenerationSettings, eos_token_ids: Sequence[int], rows: int
) -> Iterator[tuple[int, list[int]]]:
    longest = max(len(r.prompt) for r in requests)
    with maskable_attention(model):
        engine = SlotEngine(model, settings, eos_token_ids=eos_token_ids, slots=rows, max_prompt=longest)
        yield from engine.run(_prompt_batches(model, requests))


def _prompt_batches(model: nn.Module, requests: Sequence[Request]) -> Iterable[Prefilled]:
    """Prompts alone, longest first, in batches of at most `_PREFILL_TOKENS` tokens."""
    device = view_of(model).device
    order = sorted(requests, key=lambda r: -len(r.prompt))
    while order:
        count = max(1, _PREFILL_TOKENS // len(order[0].prompt))
        batch, order = order[:count], order[count:]
        ids = torch.zeros(len(batch), len(batch[0].prompt), dtype=torch.int64)
        for row, request in enumerate(batch):
            ids[row, : len(request.prompt)] = torch.as_tensor(list(request.prompt))
        yield prefill(model, batch, ids.to(device))[1]
