"""Who runs a model that is not being trained: transformers in this process, or an engine apart from it."""

from pocl.engines.local import LocalEngine
from pocl.engines.protocol import Engine

__all__ = ["Engine", "LocalEngine"]
