"""vLLM as an engine, in a process of its own and, where its dependencies want that, in an environment of its own."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocl.digests import content_fingerprint
from pocl.engines.local import batches_of
from pocl.engines.protocol import Advance, Row, check_rows, predicting
from pocl.engines.top_k import check_k
from pocl.models import project, with_merged_adapters
from pocl.models.fingerprint import model_fingerprint
from pocl.models.stored_head import check_whole_model, stored_head
from pocl.models.wrappers import context_of
from pocl_kernels import Head

PYTHON = "POCL_VLLM_PYTHON"
_WORKER = Path(__file__).parent / "worker" / "pocl_vllm_worker.py"
_TOKENS_AT_ONCE = 32_768  # of one question, so that the bar moves and no answer is large
_RESERVED = ("runner", "convert", "pooler_config", "max_logprobs", "model", "tokenizer", "skip_tokenizer_init")
# Of a launcher: vLLM would take them for its own.
_OF_LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TRITON_INTERPRET",
)
_END = 60.0  # seconds that a process gets to leave by itself


class EngineError(OSError):
    """The engine cannot be started, or has ended; the message says its last words."""


def vllm_python() -> str:
    """The interpreter that has vLLM: what POCL_VLLM_PYTHON names, or this one.

    Raises:
        ValueError: there is none; says how to get one.
    """
    named = os.environ.get(PYTHON)
    if named:
        found = shutil.which(os.path.expanduser(named))
        if found is None:
            raise ValueError(
                f"{PYTHON} is {named!r}, which is no program; set it to the python of an environment with vLLM"
            )
        return found
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "engine: vLLM is not installed; run `pip install 'pocl[vllm]'`, or, as it may want other releases than "
            "this environment has, give it one of its own: `python -m venv ~/vllm && ~/vllm/bin/pip install vllm`, "
            f"then `export {PYTHON}=~/vllm/bin/python`. On a machine without a GPU `make test-engines` makes one in "
            ".venv-vllm"
        )
    return sys.executable


class VLLMEngine:
    """Runs a model with vLLM. See `Engine`.

    Two kinds of questions need two ways of running a model, of which one is held at a time: answers and
    log-probabilities; and hidden states, exactly what enters the head, after the final norm. Before hidden states are
    given out they are compared with log-probabilities of the other way, on one row.

    Args:
        model: folder or hub id. Adapters are to be merged first.
        dtype: of weights and arithmetic: float32, bfloat16, float16, or auto for that of the files.
        revision: of a hub id.
        max_model_len: tokens of the longest row or of prompt and answer together; the model's context when left out,
            for which vLLM reserves memory.
        engine_args: further arguments of `vllm.LLM`, such as `tensor_parallel_size`.

    Raises:
        ValueError: vLLM is not installed (says the command), or an argument that is not the user's to choose.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        max_model_len: int | None = None,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        from transformers import AutoConfig

        given = dict(engine_args or {})
        if taken := [name for name in given if name in _RESERVED]:
            raise ValueError(f"engine_args: {', '.join(taken)} is set by pocl; leave it out")
        self.python = vllm_python()
        self.source, self.revision, self.dtype = str(model), revision, dtype
        check_whole_model(self.source)
        trust = bool(given.get("trust_remote_code", False))
        options = {} if Path(self.source).is_dir() else {"revision": revision}
        config = AutoConfig.from_pretrained(self.source, trust_remote_code=trust, **options)
        self._config = config.get_text_config(decoder=True)
        limit = context_of(self._config)
        wanted = given.get("max_model_len", max_model_len)
        self.context = min(filter(None, (limit, wanted)), default=None)
        self.vocabulary: int = getattr(self._config, "unpadded_vocab_size", None) or self._config.vocab_size
        self._args = {
            "dtype": dtype,
            "enable_prefix_caching": False,  # what is in it gives neither states nor log-probabilities
            **({"revision": revision} if options and revision else {}),
            **({} if torch.cuda.is_available() else {"enforce_eager": True}),
            **given,
            **({"max_model_len": self.context} if self.context else {}),
        }
        self._process: _Process | None = None
        self._states_are_exact = False
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._fingerprint: str | None = None

    @classmethod
    def of_model(cls, model: nn.Module, tokenizer: Any = None, **options: Any) -> VLLMEngine:
        """For a model of this process: it is written into a temporary folder, and read from there."""
        vllm_python()  # before anything is written
        merged = with_merged_adapters(model)
        folder = tempfile.TemporaryDirectory(prefix="pocl-engine-")
        merged.save_pretrained(folder.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder.name)
        dtype = str(next(merged.parameters()).dtype).removeprefix("torch.")
        engine = cls(folder.name, **{"dtype": dtype, **options})
        engine._temporary, engine._fingerprint = folder, model_fingerprint(merged)
        return engine

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            here = Path(self.source).is_dir()
            weights = content_fingerprint(Path(self.source)) if here else f"{self.source}@{self.revision or 'main'}"
            self._fingerprint = f"{weights} {self.dtype}"
        return self._fingerprint

    def head(self) -> Head:
        return stored_head(self.source, dtype=self.dtype, revision=self.revision)

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Any,
        *,
        eos_token_ids: Sequence[int],
        sample_ids: Sequence[int],
        advance: Advance | None = None,
    ) -> list[list[int]]:
        """See `Engine.answers`. Greedy answers are those of any engine up to rounding; sampled ones are vLLM's own."""
        process = self._running("tokens")
        limits = [min(settings.max_new_tokens, process.context - len(prompt)) for prompt in prompts]
        for sample_id, prompt, limit in zip(sample_ids, prompts, limits, strict=True):
            if limit < 1:
                raise ValueError(
                    f"the prompt of sample {sample_id} has {len(prompt)} tokens and the engine's context is "
                    f"{process.context}; cut it with max_prompt_length"
                )
        sampled = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        said, _ = process.ask(
            "answers",
            prompts=[list(prompt) for prompt in prompts],
            limits=limits,
            seeds=[seed_of(settings.seed, sample_id) for sample_id in sample_ids],
            ends=[int(i) for i in eos_token_ids],
            no_repeat=settings.no_repeat_ngram_size,
            sampling=sampled if settings.do_sample else {"temperature": 0.0},
        )
        if advance is not None:
            advance(len(prompts))
        answers: list[list[int]] = said["answers"]
        return answers

    def log_probs_of(self, rows: Sequence[Row], advance: Advance | None = None) -> list[Tensor]:
        parts = [found["own"] for found in self._asked("log_probs", rows, advance, k=1)]
        counts = [len(predicting(row)) for row in rows]
        return list(torch.cat(parts).split(counts)) if parts else []

    def hidden_states(self, rows: Sequence[Row], advance: Advance | None = None) -> Tensor:
        if not self._states_are_exact:
            self._check_states(min(rows, key=lambda row: len(row["input_ids"])))
            self._states_are_exact = True
        return torch.cat([found["hidden"] for found in self._asked("hidden_states", rows, advance)])

    def top_k(self, rows: Sequence[Row], k: int, advance: Advance | None = None) -> tuple[Tensor, Tensor]:
        check_k(k, self.vocabulary)
        parts = list(self._asked("log_probs", rows, advance, k=k))
        return torch.cat([part["token_ids"] for part in parts]), torch.cat([part["log_probs"] for part in parts])

    def close(self) -> None:
        if self._process is not None:
            self._process.end()
        self._process = None
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> VLLMEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _asked(self, question: str, rows: Sequence[Row], advance: Advance | None, **further: Any) -> Iterator[Any]:
        process = self._running("states" if question == "hidden_states" else "tokens")
        # what reads log-probabilities writes a token, too
        check_rows(process.limits(self, 0 if question == "hidden_states" else 1), rows)
        for batch in batches_of(rows, _TOKENS_AT_ONCE):
            positions = [predicting(row).tolist() for row in batch]
            ids = [list(row["input_ids"]) for row in batch]
            yield process.ask(question, rows=ids, positions=positions, **further)[1]
            if advance is not None:
                advance(sum(map(len, positions)))

    def _running(self, runner: str) -> _Process:
        if self._process is None or self._process.runner != runner:
            if self._process is not None:
                self._process.end()
            self._process = _Process(self.python, {"model": self.source, "runner": runner, "args": self._args})
        return self._process

    def _check_states(self, row: Row) -> None:
        """Raise a ValueError unless states and log-probabilities are of one distribution."""
        (told,) = self._asked("log_probs", [row], None, k=1)
        (found,) = self._asked("hidden_states", [row], None)
        head, labels = self.head(), torch.as_tensor(row["labels"])[predicting(row) + 1]
        states = project(Head(head.weight.float(), None if head.bias is None else head.bias.float(), head.scale,
                              head.softcap), found["hidden"].float()).log_softmax(-1)  # fmt: skip
        error = float((states.gather(1, labels[:, None])[:, 0] - told["own"]).abs().mean())
        allowed = 1e-3 if head.weight.dtype is torch.float32 else 0.1
        if not error <= allowed:
            raise ValueError(
                f"engine: the hidden states that vLLM gives of {self.source} are not what enters its head: "
                f"log-probabilities made of them are off by {error:.3g} nats on sample {row.get('sample_id')}; build "
                "the cache with engine='transformers', or store the likeliest tokens (TopKCache)"
            )


def seed_of(seed: int, sample_id: int) -> int:
    """What an answer is sampled from: a function of seed and sample id alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{sample_id}".encode(), digest_size=8).digest(), "little") >> 1


class _Process:
    """A running worker.

    Raises:
        EngineError: it does not start.
    """

    def __init__(self, python: str, start: Mapping[str, Any]) -> None:
        self.runner = str(start["runner"])
        environment = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        if not torch.cuda.is_available():
            environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        log, self._log = tempfile.mkstemp(prefix="pocl-vllm-", suffix=".log")
        self._child = subprocess.Popen(
            [python, str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
        )
        os.close(log)
        self._finalizer = weakref.finalize(self, _end, self._child, self._log)
        self._send(start)
        self.context = int(self._answer()[0]["context"])

    def limits(self, engine: VLLMEngine, written: int) -> Any:
        """An engine whose context is what this process reads, if it writes so many tokens behind it."""
        context = self.context - written
        return type("Limits", (), {"name": engine.name, "context": context, "vocabulary": engine.vocabulary})

    def ask(self, question: str, **details: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self._send({"do": question, **details})
        return self._answer()

    def end(self) -> None:
        self._finalizer()

    def _send(self, content: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        said = json.dumps(content).encode()
        try:
            self._child.stdin.write(struct.pack("<QQ", len(said), 0) + said)
            self._child.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def _answer(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from safetensors.torch import load

        size, further = struct.unpack("<QQ", self._read(16))
        content: dict[str, Any] = json.loads(self._read(size))
        tensors = load(self._read(further)) if further else {}
        if "error" in content:
            raise EngineError(f"the vLLM engine: {content['error']} (its log is {self._log})")
        return content, tensors

    def _read(self, count: int) -> bytes:
        assert self._child.stdout is not None
        content = self._child.stdout.read(count)
        if len(content) < count:
            self._fail()
        return content

    def _fail(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_END)
        lines = Path(self._log).read_text("utf-8", "replace").strip().splitlines()
        raise EngineError(
            f"the vLLM engine has ended (exit code {self._child.returncode}); its last words: {' / '.join(lines[-3:])} "
            f"(its log is {self._log}). Whole shards of what it said are kept: the same call goes on from there"
        )


def _end(child: subprocess.Popen[bytes], log: str) -> None:
    """Let a worker leave: its input ends. Its log goes with it, unless it failed."""
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    try:
        child.wait(_END)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.returncode == 0:
        Path(log).unlink(missing_ok=True)
