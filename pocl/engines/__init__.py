"""Who runs a model that is not being trained: transformers in this process, or an engine apart from it."""

from pocl.engines.choice import ENGINES, check_engine, running
from pocl.engines.http import ServerError
from pocl.engines.local import LocalEngine
from pocl.engines.protocol import Engine
from pocl.engines.server import ServerEngine
from pocl.engines.vllm import EngineError, VLLMEngine

__all__ = [
    "ENGINES",
    "Engine",
    "EngineError",
    "LocalEngine",
    "ServerEngine",
    "ServerError",
    "VLLMEngine",
    "check_engine",
    "running",
]
