"""The steps that train: warm-up, ranking with the student that results, and the curriculum."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pocl.curriculum import Curriculum, Stage
from pocl.data.tables import arrow_column, slice_of
from pocl.pipeline.card import write_card
from pocl.pipeline.context import Context
from pocl.pipeline.corpus import criteria_without_answers
from pocl.pipeline.curricula import batch_size_of, control_recipe, curriculum_of
from pocl.pipeline.lora import merged_by
from pocl.pipeline.subsets import drawn_rows, reranker, stored_subsets, training_seed
from pocl.pipeline.teacher import teacher_for_training
from pocl.recipe import Recipe
from pocl.run_folder import replacing

if TYPE_CHECKING:
    from datasets import Dataset

    from pocl.difficulty import Criterion
    from pocl_kernels import Divergence


WARM_UP, ADAPTATION = "warm-up", "adaptation"  # a single stage, without validation
# What a ranking may add to the columns of the data, besides the rank under each criterion, `rank_<column>`.
RANKING_COLUMNS = frozenset(
    {
        "sample_id",
        "cross_entropy",
        "teacher_cross_entropy",
        "kl_to_teacher",
        "rouge_l",
        "student_response",
        "num_tokens",
        "rank",
        "rrf_score",
        "subset",
    }
)
_ROWS_AT_A_TIME = 8192
SCALED_BY_AUTHORS = frozenset({"fkl", "jsd", "skew_rkl"})  # by T^2, in the code of the paper's authors


def divergence_of(recipe: Recipe) -> Divergence:
    """The divergence that a recipe asks for, with its parameters; the skew comes from the stages."""
    from pocl_kernels import DIVERGENCES

    return DIVERGENCES[recipe.loss.divergence](**divergence_parameters(recipe))


def divergence_parameters(recipe: Recipe) -> dict[str, float]:
    """The parameters of the divergence that the recipe's loss section sets."""
    loss = recipe.loss
    parameters = {"jsd": {"beta": loss.beta}, "alpha": {"alpha": loss.alpha}}
    return parameters.get(loss.divergence, {})


def scales_by_temperature(recipe: Recipe, divergence: str) -> bool:
    """Whether the loss with a divergence of this name has the factor T^2."""
    choice = recipe.loss.scale_by_temperature
    return divergence in SCALED_BY_AUTHORS if choice == "authors" else choice


def warm_up(context: Context) -> Mapping[str, Any]:
    """One stage of plain distillation on all samples."""
    section = context.recipe.warmup
    stage = Stage(0, (0,), section.epochs, section.temperature, section.kd_ratio, None, section.learning_rate)
    rows = context.rows("train")
    folder = context.path / "warmup"
    trainer = _trainer(
        context,
        folder,
        model=context.load_student(context.student_source(), trained=True),
        rows=rows,
        subsets=[0] * len(rows),
        curriculum=Curriculum((stage,), WARM_UP, start="last"),
        divergence="fkl",
        scale_by_temperature=scales_by_temperature(context.recipe, "fkl"),
    )
    trainer.train()
    _save(trainer, folder / "student")
    _remove_stages(folder)
    return {"steps": trainer.state.global_step, "note": _loss_note(folder)}


def criteria_of(context: Context) -> list[Criterion]:
    """The criteria that a run ranks by; among the blocks of a corpus there are no answers to compare."""
    from pocl import difficulty

    found = []
    corpus = context.is_corpus()
    for section in criteria_without_answers(context.recipe) if corpus else context.recipe.ranking.criteria:
        known: Criterion = getattr(difficulty, section.measure.upper())
        found.append(difficulty.Criterion(known.column, section.direction or known.direction, section.weight))
    return found


def rank_samples(context: Context) -> Mapping[str, Any]:
    """Score every training sample with the student as it is, rank, and cut the ranking into parts."""
    from pocl.difficulty import rank

    section = context.recipe.ranking
    if context.is_corpus() and section.needs_answers:
        context.say("The data is a corpus: there are no answers to compare, so rouge_l is left out of the ranking.")
    student = context.load_student(context.warm_student_source())
    scores = score_samples(context, student, context.judged_rows("train"), context.path / "ranking")
    num_stages = context.recipe.curriculum.num_stages
    criteria = criteria_of(context)
    ranked = rank(scores, k=section.k, num_subsets=num_stages, criteria=criteria, partition=section.partition)
    if "response" in ranked.column_names:
        # `response` is the reference in a data set that other trainers read: the student's answer gets another name
        ranked = ranked.rename_column("response", "student_response")
    _write_ranked(context, ranked, context.path / "ranking" / "ranked.parquet")
    easiest, hardest = (_mean(ranked, part) for part in (0, num_stages - 1))
    return {
        "note": f"Mean cross-entropy {easiest:.2f} in the easiest part, {hardest:.2f} in the hardest; "
        f"{context.path / 'ranking' / 'ranked.parquet'}"
    }


def _write_ranked(context: Context, ranked: Dataset, path: Path) -> None:
    """Write the ranking behind the columns of the data's own rows, some rows at a time."""
    import pyarrow.parquet as pq
    from datasets import Features

    with pq.ParquetFile(context.path / "data" / "train-source.parquet") as source, replacing(path) as temporary:
        scored = None
        if len(ranked) < source.metadata.num_rows:  # both are in the order of the data
            scored = np.isin(arrow_column(context.rows("train"), "sample_id"), arrow_column(ranked, "sample_id"))
        features = Features.from_arrow_schema(source.schema_arrow)
        names = names_beside_ranking(list(features))
        features = Features({names[name]: kind for name, kind in features.items()} | ranked.features)
        read = written = 0
        with pq.ParquetWriter(temporary, features.arrow_schema) as writer:
            for batch in source.iter_batches(_ROWS_AT_A_TIME):
                chosen = batch if scored is None else batch.filter(pa.array(scored[read : read + len(batch)]))
                read += len(batch)
                if len(chosen):
                    columns = [*chosen.columns, *slice_of(ranked, written, len(chosen)).columns]
                    writer.write_table(pa.table(columns, schema=features.arrow_schema))
                    written += len(chosen)


def score_samples(context: Context, student: Any, rows: Dataset, folder: Path) -> Dataset:
    """What the recipe ranks by, measured with a student; kept in a folder, and found there again."""
    from pocl.difficulty import score
    from pocl.generation import GenerationSettings

    section = context.recipe.ranking
    settings = GenerationSettings(
        max_new_tokens=section.max_new_tokens, no_repeat_ngram_size=section.no_repeat_ngram_size
    )
    answers = section.needs_answers and not context.is_corpus()
    return score(
        student,
        context.tokenizer(),
        rows,
        output_dir=folder,
        answers=answers,
        words=section.words,
        generation=settings if answers else None,
        teacher=context.teacher() if section.needs_teacher else None,
        engine=context.recipe.student.engine,
        engine_args=context.recipe.student.engine_args,
        progress=not context.console.quiet,
        max_prompt_length=context.recipe.data.max_prompt_length,
    )


def names_beside_ranking(columns: Sequence[str]) -> dict[str, str]:
    """What the columns of the data are called in the ranked table: `source_rank` where the ranking has a `rank`."""
    names: dict[str, str] = {}
    for column in columns:
        name = column
        while name in RANKING_COLUMNS or name.startswith("rank_") or (name != column and name in columns):
            name = f"source_{name}"
        names[column] = name
    return names


def _mean(ranked: Dataset, part: int) -> float:
    values, subsets = (arrow_column(ranked, name).to_numpy() for name in ("cross_entropy", "subset"))
    return float(values[subsets == part].mean())


def train_curriculum(context: Context) -> Mapping[str, Any]:
    """Train the student through the stages and save it with its tokenizer."""
    return _train_stages(context, context.path / "training", context.path / "student")


def train_control(context: Context) -> Mapping[str, Any]:
    """Train the student of `curriculum.control`, from the same start for as many steps."""
    recipe, rows = context.recipe, drawn_rows(context)
    subsets = stored_subsets(context, rows)
    steps = curriculum_of(recipe, subsets, batch_size_of(recipe)).stage_steps(subsets, batch_size_of(recipe))
    plain = Context(control_recipe(recipe, steps), context.path, context.console)
    plain.summaries = context.summaries
    folder = context.path / "control"
    return _train_stages(plain, folder, folder / "student")


def _train_stages(context: Context, folder: Path, student: Path) -> Mapping[str, Any]:
    """Train through the stages of the context's recipe in a folder, and save the student."""
    recipe = context.recipe
    rows = drawn_rows(context)
    subsets = stored_subsets(context, rows)
    curriculum = curriculum_of(recipe, subsets, batch_size_of(recipe))
    trainer = _trainer(
        context,
        folder,
        model=context.load_student(context.warm_student_source(), trained=True),
        rows=rows,
        subsets=subsets,
        curriculum=curriculum,
        rerank=reranker(context, rows) if recipe.ranking.refresh == "stage" else None,
        divergence=divergence_of(recipe),
        scale_by_temperature=scales_by_temperature(recipe, recipe.loss.divergence),
        on_policy=recipe.on_policy.share,
        on_policy_max_new_tokens=recipe.on_policy.max_new_tokens,
        on_policy_temperature=recipe.on_policy.temperature,
        on_policy_replay=recipe.on_policy.replay,
    )
    trainer.train()
    _save(trainer, student, card=recipe, merged=merged_by(recipe))
    _remove_stages(folder)
    return {
        "stage_samples": [len(chosen) for chosen in curriculum.rows(subsets)],
        "stage_steps": list(curriculum.stage_steps(subsets, batch_size_of(recipe))),
        "note": f"Student saved in {student}",
    }


def _trainer(
    context: Context,
    folder: Path,
    *,
    model: Any,
    rows: Dataset,
    subsets: Sequence[int],
    curriculum: Curriculum,
    divergence: str | Divergence,
    rerank: Callable[[int, Any], Sequence[int]] | None = None,
    **options: Any,
) -> Any:
    """A trainer with the recipe's settings; `options` are further ones of `POCLConfig`."""
    from transformers import PrinterCallback

    from pocl.models import check_no_further_token
    from pocl.pipeline.prepare import tokens_of_student_alone
    from pocl.pipeline.validation import metric_of, validation_metrics
    from pocl.trainer import POCLConfig, POCLTrainer

    recipe = context.recipe
    training = recipe.training
    in_stages = curriculum.name not in (WARM_UP, ADAPTATION)
    evaluates = context.has_rows("validation") and in_stages
    metric = metric_of(context)
    quiet = context.console.quiet
    config = POCLConfig(
        output_dir=str(folder),
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=curriculum.stages[0].learning_rate or 1e-4,
        weight_decay=training.weight_decay,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        train_sampling_strategy="group_by_length" if training.group_by_length else "random",
        lr_scheduler_kwargs={"min_lr_rate": training.min_learning_rate_ratio},
        bf16=training.precision == "bfloat16",
        fp16=training.precision == "float16",
        warmup_steps=training.warmup_steps,
        **_intervals(training.eval_every, evaluates),
        eval_on_start=evaluates,
        save_every=training.save_every,
        report_to=list(training.report_to) or "none",
        load_best_model_at_end=evaluates and curriculum.start == "best",
        metric_for_best_model=metric if evaluates else None,
        greater_is_better=metric == "rouge_l" if evaluates else None,
        seed=training_seed(recipe) if in_stages else recipe.seed,
        disable_tqdm=quiet,  # transformers would derive it from its log level
        **_checkpointing(training.activation_checkpointing),
        logging_steps=training.log_every or (1 if len(rows) < 5000 else 10),
        dataloader_num_workers=training.dataloader_workers,
        **training.extra,
        **options,
    )
    labels_alone = all(stage.kd_ratio == 0 for stage in curriculum.stages)
    if not labels_alone:  # the data may have been read before there was a teacher
        check_no_further_token(rows, tokens_of_student_alone(context))
    on_policy = options.get("on_policy", 0) > 0
    teacher = None if labels_alone else teacher_for_training(context, on_policy=on_policy)
    trainer = POCLTrainer(
        model,
        teacher,
        config,
        rows,
        subsets,
        curriculum,
        eval_dataset=context.rows("validation") if evaluates else None,
        processing_class=context.tokenizer(),
        divergence=divergence,
        compute_generation_metrics=validation_metrics(context) if evaluates else None,
        rerank=rerank,
    )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    return trainer


def _intervals(eval_every: int | str, evaluates: bool) -> dict[str, Any]:
    """Evaluations, and with them the checkpoints that the best one is chosen from."""
    if not evaluates or eval_every == "epoch":
        return {"eval_strategy": "epoch" if evaluates else "no", "save_strategy": "epoch"}
    return {"eval_strategy": "steps", "eval_steps": eval_every, "save_strategy": "steps", "save_steps": eval_every}


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """The argument of transformers, which goes by another name in older releases."""
    from transformers import TrainingArguments

    new, old = "activation_checkpointing", "gradient_checkpointing"
    return {new if new in TrainingArguments.__dataclass_fields__ else old: True} if wanted else {}


def adapt_teacher(context: Context) -> Mapping[str, Any]:
    """Fine-tune the teacher on the reference responses of the training samples."""
    section = context.recipe.teacher
    stage = Stage(0, (0,), section.adapt_epochs, 1.0, 0.0, None, section.adapt_learning_rate)
    rows = context.rows("train")
    folder = context.path / "adapted-teacher"
    trainer = _trainer(
        context,
        folder,
        model=context.load_model(context.base_teacher_source(), section, trained=True),
        rows=rows,
        subsets=[0] * len(rows),
        curriculum=Curriculum((stage,), ADAPTATION, start="last"),
        divergence="fkl",
    )
    trainer.train()
    _save(trainer, folder / "teacher")
    _remove_stages(folder)
    return {"steps": trainer.state.global_step, "note": _loss_note(folder, "cross_entropy", "Cross-entropy")}


def _save(
    trainer: Any, folder: Path, *, card: Recipe | None = None, merged: Callable[[Path, Path], None] | None = None
) -> None:
    """Write the student, its tokenizer and, of a recipe, a card; the folder is there in full or not at all.

    `merged` makes an ordinary model of the folder of an adapter.
    """
    from pocl.generation import end_tokens
    from pocl.trainer.card import distillation_section
    from pocl.trainer.weights import name_ends, save_weights

    scratch = folder.with_name(f".{folder.name}-writing")
    if trainer.is_world_process_zero():
        shutil.rmtree(scratch, ignore_errors=True)
    save_weights(trainer, scratch)
    if trainer.is_world_process_zero():
        name_ends(scratch, end_tokens(trainer.model, trainer.processing_class))
        if merged:
            apart = scratch.rename(folder.with_name(f".{folder.name}-apart"))
            shutil.rmtree(scratch, ignore_errors=True)
            merged(apart, scratch)
            shutil.rmtree(apart)
        if card:
            write_card(card, scratch, distillation_section(trainer))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    trainer.accelerator.wait_for_everyone()


def _remove_stages(folder: Path) -> None:
    """Checkpoints are for going on; a finished step needs them no more, and they hold three times the model each."""
    for stage in folder.glob("stage-*"):
        shutil.rmtree(stage, ignore_errors=True)  # every process comes here


def _loss_note(folder: Path, key: str = "divergence", title: str = "Divergence from the teacher") -> str:
    from pocl.report.run import read_log

    values = [line[key] for line in read_log(folder / "log.jsonl") if key in line]
    count = max(1, len(values) // 20)
    first, last = sum(values[:count]) / count, sum(values[-count:]) / count
    return f"{title} {first:.2f} -> {last:.2f} nats per token."
