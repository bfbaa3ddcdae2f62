"""Whether two models mean the same by a token id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# Padding a vocabulary to a multiple never adds more rows than this (multiples of 512 and less are in use).
_MAX_VOCABULARY_PADDING = 512
_ROWS_AT_A_TIME = 10_000


def check_vocabularies(student: Any, teacher: Any) -> int:
    """Number of token ids that student and teacher share.

    The student may have tokens that the teacher lacks, if no row uses them: see `further_tokens`.

    Args:
        student, teacher: each a tokenizer, a mapping from token to id, or a number of rows. Two numbers can only be
            compared by size: they may differ by padding, that is by at most 512 rows.

    Returns:
        The shared number of ids; surplus rows of either head are padding.

    Raises:
        ValueError: the two disagree on the meaning of an id, the teacher has a token that the student lacks, or the
            sizes differ by more than padding.
    """
    if isinstance(student, int) and isinstance(teacher, int):
        if abs(student - teacher) > _MAX_VOCABULARY_PADDING:
            raise ValueError(
                f"teacher: its vocabulary has {teacher} entries and the student's {student}; they may only differ by"
                f" padding (at most {_MAX_VOCABULARY_PADDING}). Choose a pair that shares its tokenizer"
            )
        return min(student, teacher)
    of_student, of_teacher = _vocabulary(student), _vocabulary(teacher)
    meanings = {index: token for token, index in of_teacher.items()}
    tokens = of_student.keys() | of_teacher.keys()
    differing = [token for token in tokens if of_student.get(token) != of_teacher.get(token)]
    # a token of the student alone does no harm where its id means nothing to the teacher
    clashing = sorted(token for token in differing if token in of_teacher or of_student[token] in meanings)
    if clashing:
        shown = ", ".join(f"{t!r}: {of_student.get(t)} and {of_teacher.get(t)}" for t in clashing[:3])
        lacking = [token for token in clashing if token not in of_student]
        advice = "distillation needs one tokenizer. Choose a pair that shares it"
        if len(lacking) == len(clashing):
            advice = (
                "the student could never learn to say them. Use the teacher's tokenizer for both, or add these tokens "
                "to the student's"
            )
        raise ValueError(
            f"teacher: its tokenizer gives {len(clashing)} tokens another id than the student's (student and teacher: "
            f"{shown}); {advice}"
        )
    return max(of_teacher.values()) + 1


def further_tokens(student: Any, teacher: Any) -> dict[int, str]:
    """The tokens that the student has and the teacher lacks, by id: no row may use them.

    Args:
        student, teacher: tokenizers, or mappings from token to id, that `check_vocabularies` has passed.
    """
    known = set(_vocabulary(teacher).values())
    return {index: token for token, index in _vocabulary(student).items() if index not in known}


def check_no_further_token(rows: Any, further: Mapping[int, str]) -> None:
    """Raise a ValueError where a row has a token that the teacher does not know; names the sample and the token.

    Args:
        rows: token rows with `sample_id` and `input_ids`.
        further: what `further_tokens` gave.
    """
    if not further:
        return
    for chunk in rows.iter(_ROWS_AT_A_TIME) if hasattr(rows, "iter") else [_columns(rows)]:
        used = np.unique(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in chunk["input_ids"]]))
        strange = further.keys() & set(used.tolist())
        if strange:
            index = min(strange)
            sample = next(
                s for s, ids in zip(chunk["sample_id"], chunk["input_ids"], strict=True) if index in list(ids)
            )
            raise ValueError(
                f"sample {sample} has the token {further[index]!r} (id {index}), which the teacher's "
                "tokenizer does not know: it has never seen it, and its distribution after it means nothing. Leave "
                "such samples out, choose a template without this token, or a teacher that was trained with it"
            )


def _columns(rows: Any) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in ("sample_id", "input_ids")}


def _vocabulary(source: Any) -> Mapping[str, int]:
    vocabulary = source if isinstance(source, Mapping) else getattr(source, "get_vocab", lambda: None)()
    if not vocabulary:
        raise ValueError(
            f"check_vocabularies: expected two sizes, or tokenizers or mappings from token to id, "
            f"got {type(source).__name__}"
        )
    return vocabulary
