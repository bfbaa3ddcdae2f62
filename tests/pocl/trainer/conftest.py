"""A student and a teacher of a few thousand parameters, and rows of random tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCABULARY = 61


def llama(hidden: int, layers: int, seed: int, **fields: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    return model


def random_rows(count: int, seed: int = 0, shortest: int = 5, longest: int = 14) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        prompt = int(torch.randint(1, length - 1, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"sample_id": 100 + index, "input_ids": ids, "labels": labels, "prompt_length": prompt})
    return rows


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return random_rows(22)


@pytest.fixture
def unseen_rows() -> list[dict[str, Any]]:
    return random_rows(7, seed=9)


@pytest.fixture
def subsets(rows: list[dict[str, Any]]) -> list[int]:
    return [i % 3 for i in range(len(rows))]


@pytest.fixture
def student() -> torch.nn.Module:
    return llama(16, 1, seed=1)


@pytest.fixture
def teacher() -> Any:
    from pocl.teacher import OnlineTeacher

    return OnlineTeacher(llama(24, 2, seed=2))


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Any]:
    """A POCLConfig for a run of a second, in a folder of the test's own."""
    from pocl.trainer import POCLConfig

    def make(**fields: Any) -> Any:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_steps": 2,
        }
        return POCLConfig(**(defaults | fields))

    return make
