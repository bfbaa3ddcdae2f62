"""What an engine can be asked. An engine runs a model that is not being trained, wherever that is.

Rows are token rows (`input_ids`, `labels`, for messages `sample_id`). N counts the positions of all rows that predict a
label, row after row: position i of a row predicts `labels[i + 1]`, and the first label of a row is never predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from pocl.heads import IGNORE_INDEX

if TYPE_CHECKING:
    from pocl.generation import GenerationSettings
    from pocl_kernels import Head

Advance = Callable[[int], Any]
"""Called with the label tokens, or the answers, that are finished since the last call."""
Row = Mapping[str, Any]


@runtime_checkable
class Engine(Protocol):
    """Runs one model.

    Attributes:
        name: `transformers`, `vllm` or `server`.
        context: tokens of the longest row that it reads, None if nothing limits it.
        vocabulary: number of logits.
    """

    name: str
    context: int | None
    vocabulary: int

    def fingerprint(self) -> str:
        """What stands for the weights and what they compute; equal for equal models run by the same kind of engine."""
        ...

    def head(self) -> Head:
        """The projection to the vocabulary.

        Raises:
            ValueError: the engine does not give it.
        """
        ...

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        eos_token_ids: Sequence[int],
        sample_ids: Sequence[int],
        advance: Advance | None = None,
    ) -> list[list[int]]:
        """See `pocl.generation.generate`: the answer to each prompt, sampled by (seed, sample id) alone."""
        ...

    def log_probs_of(self, rows: Sequence[Row], advance: Advance | None = None) -> list[Tensor]:
        """Of each row the log-probabilities of its labels at temperature 1, float32 [labels that are predicted]."""
        ...

    def hidden_states(self, rows: Sequence[Row], advance: Advance | None = None) -> Tensor:
        """What enters the head at the N positions, [N, H] on the CPU.

        Raises:
            ValueError: the engine does not give it.
        """
        ...

    def top_k(self, rows: Sequence[Row], k: int, advance: Advance | None = None) -> tuple[Tensor, Tensor]:
        """The k likeliest next tokens of the N positions, likeliest first, on the CPU.

        Returns:
            ids int32 [N, k] and log-probabilities float32 [N, k] at temperature 1.
        """
        ...

    def close(self) -> None:
        """Gives back what it holds: processes, memory, connections."""
        ...


def predicting(row: Row) -> np.ndarray:
    """The positions of a row that predict a label, ascending."""
    return np.flatnonzero(np.asarray(row["labels"][1:]) != IGNORE_INDEX)


def check_rows(engine: Engine, rows: Sequence[Row]) -> None:
    """Refuses rows that an engine cannot read.

    Raises:
        ValueError: names the sample.
    """
    for row in rows:
        tokens, largest = len(row["input_ids"]), max(row["input_ids"])
        if engine.context and tokens > engine.context:
            raise ValueError(
                f"sample {row.get('sample_id')} has {tokens} tokens, and the engine ({engine.name}) reads "
                f"{engine.context} at most; make rows with max_length={engine.context}, or give the engine a longer "
                "context (max_model_len of vLLM)"
            )
        if largest >= engine.vocabulary:
            raise ValueError(
                f"sample {row.get('sample_id')} has the token id {largest}, and the model of the engine "
                f"({engine.name}) has {engine.vocabulary}; make rows with the tokenizer of the model"
            )
