"""Training on the student's own responses: GKD (Agarwal et al., arXiv 2306.13649), with DistiLLM's replay buffer.

With a given probability the responses of a batch are replaced by ones that the student samples, and the teacher judges
those. The curriculum still chooses the prompts. A bounded buffer lets sampled responses be used more than once
(Ko et al., arXiv 2402.03898), as sampling costs several times a training step.

Every decision and sample follows from (seed, stage, step, micro-batch), so a resumed run samples the same.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocl import heads
from pocl.data.templates import answer_ends
from pocl.generation.settings import named_ends
from pocl.heads import IGNORE_INDEX
from pocl.teacher.batches import rows_of
from pocl.trainer.progress import write_atomically
from pocl.trainer.sampler import derived_seed

_DUMMY: dict[str, Any] = {"sample_id": -1, "input_ids": [0]}


class OnPolicy:
    """Replaces batches by what the student says to their prompts.

    Args:
        probability: share of batches that are replaced.
        max_new_tokens: limit of a response.
        temperature: of sampling; 1 samples the student's distribution.
        replay_capacity: rows kept for use again; 0 samples anew every time. With a buffer, every other replaced batch
            is drawn from it.
        eos_token_id: what ends a response, one id or several; those of the student's generation config do too.
        pad_token_id: pads prompts on the left.
        collator: makes a batch of rows.
        rank: of this process, which samples for itself.
        seed: of everything random here.
    """

    def __init__(
        self,
        probability: float,
        *,
        max_new_tokens: int,
        temperature: float,
        replay_capacity: int,
        eos_token_id: int | Sequence[int] | None,
        pad_token_id: int,
        collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
        rank: int,
        seed: int,
    ) -> None:
        self.probability, self.max_new_tokens, self.temperature = probability, max_new_tokens, temperature
        given = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        self.end_ids, self.pad_token_id = sorted({int(i) for i in given}), pad_token_id
        self.collator, self.rank, self.seed = collator, rank, seed
        self.replay: deque[dict[str, Any]] = deque(maxlen=replay_capacity)
        self.rounds = 0  # of sampling, the same on every process

    @classmethod
    def of(cls, trainer: Any) -> OnPolicy:
        """As the arguments of a POCLTrainer say."""
        args, tokenizer = trainer.args, trainer.processing_class
        return cls(
            args.on_policy,
            max_new_tokens=args.on_policy_max_new_tokens,
            temperature=args.on_policy_temperature,
            replay_capacity=args.on_policy_replay,
            eos_token_id=answer_ends(tokenizer),
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            collator=trainer.data_collator,
            rank=args.process_index,
            seed=args.seed,
        )

    def replace(self, model: Any, batch: Mapping[str, Tensor], *place: int) -> dict[str, Any]:
        """The batch, or a replaced one.

        Args:
            model: the student; on several processes all must call this together.
            batch: as the collator made it.
            place: stage, step, micro-batch.
        """
        chance = random.Random(derived_seed(self.seed, *place))  # the same on every process: they sample together
        if chance.random() >= self.probability:
            return dict(batch)
        prompts = [row for row in map(_prompt, rows_of(batch)) if row["input_ids"]]
        own_seed = derived_seed(self.seed, self.rank, *place)
        if self.replay.maxlen and self.rounds and chance.random() < 0.5:
            rows = random.Random(own_seed).choices(list(self.replay), k=len(prompts)) if self.replay else []
        else:
            # a process whose rows are all fillers samples too, and throws it away: sharded students run together
            rows = self.sample(model, prompts or [_DUMMY], own_seed)[: len(prompts)]
            self.rounds += 1
            self.replay.extend(rows)
        if not rows:
            return dict(batch)
        device = batch["input_ids"].device
        return {name: value.to(device) for name, value in self.collator(rows).items()}

    @torch.no_grad()
    def sample(self, model: Any, prompts: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
        """Rows of prompts and sampled responses, the end token included."""
        device = next(model.parameters()).device
        longest = max(len(row["input_ids"]) for row in prompts)
        ids = torch.full((len(prompts), longest), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(prompts):
            ids[i, longest - len(row["input_ids"]) :] = torch.tensor(row["input_ids"])
            mask[i, longest - len(row["input_ids"]) :] = 1
        ends = sorted({*self.end_ids, *named_ends(model)})
        was_training = model.training
        model.eval()
        try:
            with _plain_generation(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                output = model.generate(
                    ids.to(device),
                    attention_mask=mask.to(device),
                    do_sample=True,
                    temperature=self.temperature,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=self.max_new_tokens,
                    eos_token_id=ends or None,
                    pad_token_id=self.pad_token_id,
                    synced_gpus=torch.distributed.is_available() and torch.distributed.is_initialized(),
                )
        finally:
            model.train(was_training)
        responses = output[:, longest:].tolist()
        return [_row(row, response, ends) for row, response in zip(prompts, responses, strict=True)]

    def save(self, checkpoint: Path) -> None:
        """Keep the buffer with a checkpoint."""
        if self.replay.maxlen:
            content = {"rounds": self.rounds, "rows": list(self.replay)}
            write_atomically(checkpoint / f"replay-{self.rank}.json", json.dumps(content))

    def load(self, checkpoint: Path | None) -> None:
        """Take the buffer of a checkpoint; without one it is empty."""
        self.replay.clear()
        self.rounds = 0
        path = None if checkpoint is None else checkpoint / f"replay-{self.rank}.json"
        if path is not None and path.exists():
            content = json.loads(path.read_text("utf-8"))
            self.rounds = content["rounds"]
            self.replay.extend(content["rows"])


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Set a checkpoint's own generation settings aside: a repetition penalty, say, samples another distribution."""
    from transformers import GenerationConfig

    inner = heads.unwrapped(model)
    holders = [holder for holder in (model, inner) if getattr(holder, "generation_config", None) is not None]
    before = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig(
                cache_implementation=holder.generation_config.cache_implementation
            )
        yield
    finally:
        for holder, config in zip(holders, before, strict=True):
            holder.generation_config = config


def _row(prompt: Mapping[str, Any], response: list[int], ends: Sequence[int]) -> dict[str, Any]:
    stop = next((i + 1 for i, token in enumerate(response) if token in ends), len(response))
    ids = [*prompt["input_ids"], *response[:stop]]
    return {
        "sample_id": prompt["sample_id"],
        "input_ids": ids,
        "labels": [IGNORE_INDEX] * len(prompt["input_ids"]) + response[:stop],
    }


def _prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """What stands before the last answer: the start of the last run of labels."""
    learnt = [label != IGNORE_INDEX for label in row["labels"]]
    first = max((i for i in range(1, len(learnt)) if learnt[i] and (i == 1 or not learnt[i - 1])), default=0)
    return {"sample_id": row["sample_id"], "input_ids": row["input_ids"][:first]}
