"""The engine of this process: a model of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pocl import heads
from pocl.engines.protocol import Advance, Row, predicting
from pocl.engines.top_k import top_log_probs
from pocl.generation import GenerationSettings, generate
from pocl.models import in_evaluation_mode, verify_head, view_of
from pocl.models.fingerprint import model_fingerprint
from pocl_kernels import Head

BATCH_TOKENS = 4096


class LocalEngine:
    """Runs a Hugging Face causal language model in this process, on the device it is on. See `Engine`.

    Args:
        model: the model.
        batch_tokens: tokens of one forward pass, padding included. Rows are taken in their order: give long ones first.

    Raises:
        ValueError: the model's logits are not its head applied to its last hidden states (see `heads.verify_head`).
    """

    name = "transformers"

    def __init__(self, model: nn.Module, *, batch_tokens: int = BATCH_TOKENS) -> None:
        verify_head(model)
        self.model, self.batch_tokens = model, batch_tokens
        self.context = view_of(model).context
        self.vocabulary = self.head().vocab_size

    def fingerprint(self) -> str:
        return model_fingerprint(self.model)

    def head(self) -> Head:
        head = view_of(self.model).head()
        bias = None if head.bias is None else head.bias.detach()
        return Head(head.weight.detach(), bias, scale=head.scale, softcap=head.softcap)

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        eos_token_ids: Sequence[int],
        sample_ids: Sequence[int],
        advance: Advance | None = None,
    ) -> list[list[int]]:
        found = generate(
            self.model, prompts, settings, eos_token_ids=eos_token_ids, sample_ids=sample_ids, progress=False
        )
        if advance is not None:
            advance(len(found))
        return found

    def log_probs_of(self, rows: Sequence[Row], advance: Advance | None = None) -> list[Tensor]:
        from pocl_kernels import fused_linear_cross_entropy

        head, found = self.head(), []
        for batch, hidden in self._batches(rows, advance):
            labels = [torch.as_tensor(row["labels"])[predicting(row) + 1] for row in batch]
            losses = fused_linear_cross_entropy(hidden, head, torch.cat(labels).to(hidden.device), reduction="none")
            found += (-losses.float().cpu()).split([len(each) for each in labels])
        return found

    def hidden_states(self, rows: Sequence[Row], advance: Advance | None = None) -> Tensor:
        parts = [hidden.cpu() for _, hidden in self._batches(rows, advance)]
        return torch.cat(parts) if parts else torch.empty(0, self.head().hidden_size)

    def top_k(self, rows: Sequence[Row], k: int, advance: Advance | None = None) -> tuple[Tensor, Tensor]:
        head = self.head()
        parts = [top_log_probs(hidden, head, k) for _, hidden in self._batches(rows, advance)]
        ids, log_probs = zip(*parts, strict=True)
        return torch.cat(ids).cpu(), torch.cat(log_probs).cpu()

    def close(self) -> None:
        """Nothing to give back: the model is the caller's."""

    @torch.no_grad()
    def _batches(self, rows: Sequence[Row], advance: Advance | None) -> Iterator[tuple[Sequence[Row], Tensor]]:
        """Some rows and the states of their N positions, on the device."""
        from pocl.data import Collator

        device = view_of(self.model).device
        with in_evaluation_mode(self.model):
            for batch in batches_of(rows, self.batch_tokens):
                inputs = {name: tensor.to(device) for name, tensor in Collator(0)(batch).items()}
                given = {name: inputs[name] for name in heads.MODEL_INPUTS if name in inputs}
                hidden = heads.at_positions(heads.hidden_states(self.model, **given), heads.label_positions(inputs))
                yield batch, hidden
                if advance is not None:
                    advance(len(hidden))


def batches_of(rows: Sequence[Row], batch_tokens: int) -> Iterator[Sequence[Row]]:
    """Neighbouring rows, so many that rows x longest row <= `batch_tokens`; a longer row goes alone."""
    batch: list[Row] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row["input_ids"]))
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch, longest = [], len(row["input_ids"])
        batch.append(row)
    if batch:
        yield batch
