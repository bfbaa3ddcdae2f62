"""What a run does differently where its data is a corpus: texts to learn, without questions and answers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from pocl.data.corpus import COLUMNS
from pocl.data.rows import in_chunks
from pocl.pipeline.context import Context
from pocl.recipe import Recipe
from pocl.run_folder import replacing

if TYPE_CHECKING:
    import pyarrow as pa

    from pocl.recipe.sections import CriterionSection


def check_corpus(recipe: Recipe, name: str) -> None:
    """Refuses what asks for answers.

    Raises:
        ValueError: names the setting.
    """
    if not criteria_without_answers(recipe):
        raise ValueError(
            f"{name} is a corpus, which has no answers to compare: rank it by another measure than rouge_l "
            "(ranking.criteria cross_entropy)"
        )
    if recipe.on_policy.share:
        raise ValueError(
            f"{name} is a corpus, whose texts are no questions that the student could answer: set on_policy.share to 0"
        )


def criteria_without_answers(recipe: Recipe) -> list[CriterionSection]:
    """The criteria of the recipe that need no answers."""
    return [criterion for criterion in recipe.ranking.criteria if criterion.measure != "rouge_l"]


def write_blocks(context: Context, split: str) -> int:
    """Write the blocks of a split as texts, beside their tokens; returns their number.

    A block reads as its tokens do, end tokens included, and names the first and the last text of the source in it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Value

    tokenizer = context.tokenizer()
    kinds = {"id": Value("int64"), "text": Value("string"), **{name: Value("int64") for name in COLUMNS}}
    schema = Features(kinds).arrow_schema

    def texts(rows: list[dict[str, Any]]) -> pa.Table:
        made = tokenizer.batch_decode([row["input_ids"] for row in rows], clean_up_tokenization_spaces=False)
        columns = {"id": [row["sample_id"] for row in rows], "text": made}
        columns |= {name: [row[name] for row in rows] for name in COLUMNS}
        return pa.table(columns, schema=schema)

    count = 0
    with contextlib.ExitStack() as stack:
        writers = {}
        # the ranking carries the source's columns on, and what stands for rows of the source are the blocks
        for name in (split, *(["train-source"] if split == "train" else [])):
            path = stack.enter_context(replacing(context.path / "data" / f"{name}.parquet"))
            names = schema.names if name == split else schema.names[1:]
            kept = Features({column: kinds[column] for column in names}).arrow_schema
            writers[tuple(names)] = stack.enter_context(pq.ParquetWriter(path, kept))
        for table in in_chunks(context.rows(split), texts, workers=context.recipe.data.workers, title="blocks"):
            count += len(table)
            for names, writer in writers.items():
                writer.write_table(table.select(names).replace_schema_metadata(writer.schema.metadata))
    return count
