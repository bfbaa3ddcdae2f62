"""vLLM in a process of its own, asked through its standard input and answering through its standard output.

A message is two lengths (8 bytes each, little endian), that many bytes of JSON, and that many of safetensors. The first
one says which model is to be run and how; then one answer follows each question, until the input ends.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import sys
from typing import Any, BinaryIO


def main() -> None:
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # what libraries print goes to the log
        source = sys.stdin.buffer
        start = read(source)
        if start is None:
            return
        try:
            model = States(start) if start["runner"] == "states" else Tokens(start)
        except Exception as error:
            write(out, {"error": in_words(error)})
            raise
        write(out, model.describe())
        while (question := read(source)) is not None:
            try:
                said, tensors = getattr(model, question.pop("do"))(**question)
            except Exception as error:
                said, tensors = {"error": in_words(error)}, {}
            write(out, said, tensors)


class Model:
    """A model in the engine.

    Args:
        start: the first message.
        further: arguments of the engine that are not the user's to choose.
    """

    def __init__(self, start: dict[str, Any], **further: Any) -> None:
        from vllm import LLM

        self.llm = LLM(start["model"], **{**start["args"], **further})

    def describe(self) -> dict[str, Any]:
        import vllm

        return {"context": int(self.llm.llm_engine.model_config.max_model_len), "version": vllm.__version__}


class States(Model):
    """Gives what enters the head."""

    def __init__(self, start: dict[str, Any]) -> None:
        from vllm.config import PoolerConfig

        pooler = PoolerConfig(task="token_embed", use_activation=False)
        super().__init__(start, runner="pooling", convert="embed", pooler_config=pooler)

    def hidden_states(self, rows: list[list[int]], positions: list[list[int]]) -> tuple[dict[str, Any], dict[str, Any]]:
        import torch

        prompts: Any = [{"prompt_token_ids": row} for row in rows]
        outputs = self.llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        parts = [out.outputs.data[places].cpu() for out, places in zip(outputs, positions, strict=True)]
        return {}, {"hidden": torch.cat(parts)}


class Tokens(Model):
    """Answers, and tells log-probabilities of what it reads."""

    def __init__(self, start: dict[str, Any]) -> None:
        own = start["args"].get("logits_processors", [])
        super().__init__(
            start, skip_tokenizer_init=True, max_logprobs=-1, logits_processors=[*own, "pocl_no_repeat:NoRepeat"]
        )

    def answers(
        self,
        prompts: list[list[int]],
        limits: list[int],
        seeds: list[int],
        ends: list[int],
        no_repeat: int,
        sampling: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        from pocl_no_repeat import KEY
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                max_tokens=limit,
                seed=seed,
                stop_token_ids=ends,
                ignore_eos=True,
                detokenize=False,
                extra_args={KEY: no_repeat},
                **sampling,
            )
            for limit, seed in zip(limits, seeds, strict=True)
        ]
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(asked, parameters, use_tqdm=False)
        answers = (list(out.outputs[0].token_ids) for out in outputs)
        stop = set(ends)
        return {"answers": [list(itertools.takewhile(lambda t: t not in stop, answer)) for answer in answers]}, {}

    def log_probs(
        self, rows: list[list[int]], positions: list[list[int]], k: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the token behind each position: `own` [N]; and `token_ids`, `log_probs` [N, k], likeliest first."""
        import torch
        from vllm import SamplingParams

        how = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=k, detokenize=False, flat_logprobs=True)
        prompts: Any = [{"prompt_token_ids": row} for row in rows]
        outputs = self.llm.generate(prompts, how, use_tqdm=False)
        own: list[float] = []
        ids: list[list[int]] = []
        log_probs: list[list[float]] = []
        for out, places in zip(outputs, positions, strict=True):
            flat = out.prompt_logprobs
            for place in places:
                first = flat.start_indices[place + 1]  # the token itself; behind it the likeliest
                own.append(flat.logprobs[first])
                ids.append(flat.token_ids[first + 1 : first + 1 + k])
                log_probs.append(flat.logprobs[first + 1 : first + 1 + k])
        return {}, {
            "own": torch.tensor(own, dtype=torch.float32),
            "token_ids": torch.tensor(ids, dtype=torch.int32).view(len(own), k),
            "log_probs": torch.tensor(log_probs, dtype=torch.float32).view(len(own), k),
        }


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"


def read(source: BinaryIO) -> dict[str, Any] | None:
    """The JSON of the next message; None where there is no more."""
    lengths = source.read(16)
    if len(lengths) < 16:
        return None
    size, further = struct.unpack("<QQ", lengths)
    content: dict[str, Any] = json.loads(source.read(size))
    source.read(further)
    return content


def write(out: BinaryIO, content: dict[str, Any], tensors: dict[str, Any] | None = None) -> None:
    from safetensors.torch import save

    said, numbers = json.dumps(content).encode(), save(tensors) if tensors else b""
    out.write(struct.pack("<QQ", len(said), len(numbers)))
    out.write(said)
    out.write(numbers)
    out.flush()


if __name__ == "__main__":
    main()
