"""The difficulty measurer: score every sample with the student, then rank and partition. Easy first."""

from pocl.difficulty.ranking import (
    CROSS_ENTROPY,
    KL_TO_TEACHER,
    PAPER_CRITERIA,
    RESPONSE_LENGTH,
    ROUGE_L,
    TEACHER_CROSS_ENTROPY,
    Criterion,
    rank,
)
from pocl.difficulty.scoring import score
from pocl.rouge import rouge_l

__all__ = [
    "CROSS_ENTROPY",
    "KL_TO_TEACHER",
    "PAPER_CRITERIA",
    "RESPONSE_LENGTH",
    "ROUGE_L",
    "TEACHER_CROSS_ENTROPY",
    "Criterion",
    "rank",
    "rouge_l",
    "score",
]
