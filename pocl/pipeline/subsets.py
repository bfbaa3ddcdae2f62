"""Which samples a training takes and in which subsets: from the stored ranking, drawn by the seed, ranked again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pocl.data.tables import arrow_column
from pocl.pipeline.context import Context, read_parquet
from pocl.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray


def training_seed(recipe: Recipe) -> int:
    """The seed of order, draw and deal in the stages."""
    return recipe.seed if recipe.training.seed is None else recipe.training.seed


def drawn_rows(context: Context) -> Dataset:
    """The training rows, or as many of them as `training.draw` says, drawn by the seed; in their order.

    Raises:
        ValueError: more are to be drawn than there are.
    """
    rows, count = context.rows("train"), context.recipe.training.draw
    if count is None:
        return rows
    if count > len(rows):
        raise ValueError(
            f"training.draw = {count}, but there are {len(rows)} training samples; draw fewer, or leave it out to "
            "train on all"
        )
    return rows.select(sorted(random.Random(training_seed(context.recipe)).sample(range(len(rows)), count)))


def takes_ranking(recipe: Recipe) -> bool:
    """Whether the stages train on parts of the ranking; where each has all samples, nothing need be measured."""
    return recipe.curriculum.kind not in ("constant", "whole")


def stored_subsets(context: Context, rows: Dataset) -> list[int]:
    """The subset of each row by the ranking step; rows that were drawn are ranked among themselves."""
    if not takes_ranking(context.recipe):
        parts = context.recipe.curriculum.num_stages
        return [min(row // max(1, len(rows) // parts), parts - 1) for row in range(len(rows))]
    file = context.path / "ranking" / "ranked.parquet"
    ids = arrow_column(rows, "sample_id").to_numpy()
    if context.recipe.training.draw is None:
        ranked = read_parquet(file, columns=["sample_id", "subset"])
        subsets: list[int] = arrow_column(ranked, "subset").to_numpy()[_places(ranked, ids)].tolist()
        return subsets
    ranked = read_parquet(file, columns=["sample_id", *_columns(context)])
    return _ranked(context, ranked.select(_places(ranked, ids)))


def _places(table: Dataset, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of each sample in a table."""
    ids = arrow_column(table, "sample_id").to_numpy()
    order = np.argsort(ids)
    places: NDArray[np.int64] = order[np.searchsorted(ids, sample_ids, sorter=order)]
    return places


def reranker(context: Context, rows: Dataset) -> Callable[[int, Any], Sequence[int]]:
    """Ranks the rows again with the student as it is before a stage; a stage's scores are kept and found again."""
    from pocl.pipeline.training import score_samples

    judged, ids = context.judged_rows("train"), arrow_column(rows, "sample_id").to_numpy()
    judged = judged.select(np.flatnonzero(np.isin(arrow_column(judged, "sample_id"), ids)))

    def rerank(stage: int, model: Any) -> list[int]:
        scores = score_samples(context, model, judged, context.path / "training" / f"ranking-{stage}")
        scores = scores.select_columns(["sample_id", *_columns(context)])
        subsets = np.asarray(_ranked(context, scores))
        found: list[int] = subsets[_places(scores, ids)].tolist()
        return found

    return rerank


def _columns(context: Context) -> list[str]:
    from pocl.pipeline.training import criteria_of

    return [criterion.column for criterion in criteria_of(context)]


def _ranked(context: Context, scores: Dataset) -> list[int]:
    from pocl.difficulty import rank
    from pocl.pipeline.training import criteria_of

    section, parts, criteria = context.recipe.ranking, context.recipe.curriculum.num_stages, criteria_of(context)
    ranked = rank(scores, k=section.k, num_subsets=parts, criteria=criteria, partition=section.partition)
    subsets: list[int] = arrow_column(ranked, "subset").to_pylist()
    return subsets
