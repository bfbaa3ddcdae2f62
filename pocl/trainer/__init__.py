"""Staged distillation as a Hugging Face `Trainer`."""

from pocl.trainer.config import POCLConfig
from pocl.trainer.trainer import POCLTrainer

__all__ = ["POCLConfig", "POCLTrainer"]
