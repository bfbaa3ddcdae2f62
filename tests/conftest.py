"""What every test shares: seeds, thread limits, no network, and a tiny model with its tokenizer, both made in code."""

import os

# Before torch, transformers or a Triton kernel is imported, here and in the processes that tests start. One thread
# whatever the shell says: a forked child of a process that has computed with more waits for threads it does not have.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy
import multiprocessing
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU, Triton kernels run in Triton's interpreter. It must be chosen before the first kernel is imported, and
# none is by now.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One seed for all machines; no deadline, since the cores are shared with other test workers.
settings.register_profile(
    "pocl", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("pocl")
torch.set_num_threads(1)

VOCABULARY = 1_000
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
WORDS = tuple(f"w{index}" for index in range(VOCABULARY - len(SPECIAL_TOKENS)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with slow tests, so that no worker is left alone with one; skip those marked `gpu` without a GPU."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def tiny_tokenizer(shared_tokenizer: Any) -> Any:
    """A tokenizer of the test's own, which it may change; see `shared_tokenizer`."""
    return copy.deepcopy(shared_tokenizer)


@pytest.fixture(scope="session")
def shared_tokenizer() -> Any:
    """A word-level tokenizer over 1,000 words: `w0` ... `w996` and <pad> = 0, <eos> = 1, <unk> = 2.

    Words are split at spaces and punctuation; anything else is <unk>. No token is added, none is changed in case.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., Any]:
    """A factory: `make_tiny_model(seed=0, hidden_size=32, num_layers=2, **config)` -> random Llama in eval mode.

    Vocabulary 1,000, tied head, float32; the same seed gives the same weights.
    """

    def make(*, seed: int = 0, hidden_size: int = 32, num_layers: int = 2, **config: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        arguments: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
            # wide enough that a random model's distributions are far from uniform
            "initializer_range": 0.2,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**(arguments | config))).eval()

    return make


@pytest.fixture(scope="session")
def make_tiny_folder(
    tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable[..., Any], shared_tokenizer: Any
) -> Callable[..., Path]:
    """A factory: `make_tiny_folder(**options of make_tiny_model)` -> saved model and tokenizer."""

    def make(**options: Any) -> Path:
        folder = tmp_path_factory.mktemp("tiny-model")
        make_tiny_model(**options).save_pretrained(folder)
        shared_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model_folder(make_tiny_folder: Callable[..., Path]) -> Path:
    """A saved two-layer model (seed 0, hidden size 32) with its tokenizer. Read only."""
    return make_tiny_folder(seed=0)


@pytest.fixture(scope="session")
def tiny_teacher_folder(make_tiny_folder: Callable[..., Path]) -> Path:
    """A saved three-layer model (seed 1, hidden size 48) with the same tokenizer. Read only."""
    return make_tiny_folder(seed=1, hidden_size=48, num_layers=3)


@pytest.fixture(scope="session")
def tiny_pairs() -> list[dict[str, str]]:
    """48 rows (`instruction`, `input`, `output`) of known words; answers of 2 to 9 words repeat the question."""
    generator = random.Random(0)
    rows = []
    for index in range(48):
        question = generator.sample(WORDS, 3 + index % 5)
        answer = (question * 3)[: 2 + index % 8]
        rows.append({"instruction": " ".join(question), "input": "", "output": " ".join(answer)})
    return rows


@pytest.fixture
def start_processes() -> Callable[..., list[Any]]:
    """A factory: `start_processes(work, size=1)` forks processes as a launcher would start them.

    Each runs `work()` and ends with exit code 0 if that returns.
    """

    def start(work: Callable[[], Any], size: int = 1) -> list[Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def main(rank: int) -> None:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ.update({name: str(value) for name, value in ranks.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            work()
            sys.stdout.flush()
            os._exit(0)

        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=main, args=(rank,)) for rank in range(size)]
        for process in processes:
            process.start()
        return processes

    return start
