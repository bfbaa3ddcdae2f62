"""A real engine, a real server and the embedded model: `make test-engines`. Skipped without POCL_VLLM_PYTHON."""

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODEL = "smollm2"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("POCL_VLLM_PYTHON"):
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs vLLM: make test-engines"))


@pytest.fixture(scope="session")
def teacher() -> Path:
    """The embedded model."""
    from pocl.embedded import teacher_folder

    return teacher_folder()


@pytest.fixture(scope="session")
def tokenizer(teacher: Path) -> Any:
    from pocl.models import load_tokenizer

    return load_tokenizer(teacher)


@pytest.fixture(scope="session")
def model(teacher: Path) -> Any:
    from pocl.models import load_causal_lm

    return load_causal_lm(teacher)


@pytest.fixture(scope="session")
def rows(tokenizer: Any) -> Any:
    """Token rows of 24 real questions and answers."""
    from datasets import Dataset

    from pocl.data import tokenize
    from pocl.embedded import question_answer_pairs

    pairs = [pair for pair in question_answer_pairs() if len(pair["completion"].split()) > 6][:24]
    examples = [{"id": i, "prompt": pair["prompt"], "response": pair["completion"]} for i, pair in enumerate(pairs)]
    made = tokenize(
        Dataset.from_list(examples), tokenizer, max_length=96, max_prompt_length=64, workers=1, progress=False
    )
    return made[0]


class Server:
    """vLLM's server of the embedded model, which can be killed and started again on its port."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = Path(tempfile.mkstemp(prefix="pocl-server-", suffix=".log")[1])
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, wait: float = 400.0) -> None:
        words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder), "--served-model-name", MODEL]
        words += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--host", "127.0.0.1"]
        words += ["--port", str(self.port), *self.options]
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **kept}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [os.environ["POCL_VLLM_PYTHON"], *words],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=tempfile.gettempdir(),
                start_new_session=True,
            )
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server does not start: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="session")
def server(teacher: Path) -> Iterator[Server]:
    made = Server(teacher, "--max-logprobs", "32")
    made.start()
    try:
        yield made
    finally:
        made.kill()
