"""What pocl asks of vLLM, for Llamas without layers: a row's states are its tokens' embeddings, normed.

`FAKE_VLLM` makes it misbehave: `unnormed` gives states before the norm, `refuses` does not start, `dies` ends at the
first question.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open

__version__ = "0.0 (fake)"


class SamplingParams(SimpleNamespace):
    def __init__(self, **given: Any) -> None:
        usual = {"extra_args": None, "prompt_logprobs": None, "seed": None, "top_k": 0, "top_p": 1.0}
        super().__init__(**(usual | given))


class LLM:
    def __init__(self, model: str, **arguments: Any) -> None:
        print("a library says something on the standard output")
        if os.environ.get("FAKE_VLLM") == "refuses":
            raise ValueError("no such device")
        assert "RANK" not in os.environ
        self.config = json.loads((Path(model) / "config.json").read_text())
        assert self.config["num_hidden_layers"] == 0
        with safe_open(Path(model) / "model.safetensors", framework="pt") as file:
            self.embedding = file.get_tensor("model.embed_tokens.weight")
            self.norm = file.get_tensor("model.norm.weight")
        context = min(arguments.get("max_model_len") or 10**9, self.config["max_position_embeddings"])
        self.context = context
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=context))
        self.processors = []
        for name in arguments.get("logits_processors", []):
            module, _, kind = name.partition(":")
            self.processors.append(getattr(__import__(module), kind)(None, None, False))

    def states(self, ids: list[int]) -> torch.Tensor:
        assert len(ids) <= self.context
        if os.environ.get("FAKE_VLLM") == "dies":
            os._exit(7)
        raw = self.embedding[ids]
        if os.environ.get("FAKE_VLLM") == "unnormed":
            return raw
        return self.norm * raw / (raw.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()

    def encode(self, prompts: Any, pooling_task: str, use_tqdm: bool) -> list[Any]:
        assert pooling_task == "token_embed"
        return [SimpleNamespace(outputs=SimpleNamespace(data=self.states(p["prompt_token_ids"]))) for p in prompts]

    def generate(self, prompts: Any, parameters: Any, use_tqdm: bool) -> list[Any]:
        if isinstance(parameters, SamplingParams):
            parameters = [parameters] * len(prompts)
        return [self._answer(p["prompt_token_ids"], how) for p, how in zip(prompts, parameters, strict=True)]

    def _answer(self, prompt: list[int], how: Any) -> Any:
        assert len(prompt) + how.max_tokens <= self.context
        told = None
        if how.prompt_logprobs is not None:
            told = self._told(prompt, how.prompt_logprobs)
        bans = [ban for each in self.processors if (ban := each.new_req_logits_processor(how))]
        generator = torch.Generator().manual_seed(how.seed or 0)
        answer: list[int] = []
        while len(answer) < how.max_tokens:
            logits = (self.states([*prompt, *answer][-1:]) @ self.embedding.T)[0]
            for ban in bans:
                logits = ban(prompt, answer, logits)
            if how.temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / how.temperature).softmax(-1), 1, generator=generator))
            answer.append(token)
            if token in getattr(how, "stop_token_ids", []):
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer)], prompt_logprobs=told)

    def _told(self, prompt: list[int], k: int) -> Any:
        """Flat: at each position but the first the token itself, then the likeliest."""
        table = (self.states(prompt) @ self.embedding.T).log_softmax(-1)
        values, ids = table.topk(k)
        flat = SimpleNamespace(start_indices=[0], token_ids=[], logprobs=[])
        for place, token in enumerate(prompt[1:]):
            flat.start_indices.append(len(flat.token_ids))
            flat.token_ids += [token, *ids[place].tolist()]
            flat.logprobs += [float(table[place, token]), *values[place].tolist()]
        return flat
