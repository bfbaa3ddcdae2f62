"""The steps that train: warm-up, ranking with the student that results, and the curriculum."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pocl.curriculum import Curriculum, Ramp, Stage, per_stage
from pocl.data.tables import arrow_column, arrow_table
from pocl.pipeline.context import Context, in_memory, read_parquet, write_parquet
from pocl.recipe import Recipe
from pocl.run_folder import write_text

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

    from pocl.difficulty import Criterion
    from pocl.teacher import Teacher
    from pocl_kernels import Divergence


WARM_UP = "warm-up"
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
SCALED_BY_AUTHORS = frozenset({"fkl", "jsd", "skew_rkl"})  # by T^2, in the code of the paper's authors


def curriculum_of(recipe: Recipe) -> Curriculum:
    """The curriculum that a recipe asks for."""
    section = recipe.curriculum
    if section.kind == "constant":
        # as many passes as the stages make together: stage i of n holds i / n of the samples
        passes = max(1, round(section.epochs[0] * (section.num_stages + 1) / 2))
        return Curriculum.constant(
            section.temperature[0],
            section.kd_ratio[0],
            passes,
            num_subsets=section.num_stages,
            skew=section.skew[0] if is_skewed(recipe) else None,
            learning_rate=section.learning_rate[0],
            max_steps=section.max_steps[0] if section.max_steps else None,
            patience=section.patience,
        )
    count = section.num_stages
    options: dict[str, Any] = {
        name: _spread(recipe, name)
        for name in ("temperature", "kd_ratio", "learning_rate", *(["skew"] if is_skewed(recipe) else []))
    }
    options["epochs"] = section.epochs if len(section.epochs) > 1 else section.epochs[0]
    if section.max_steps:
        options["max_steps"] = section.max_steps if len(section.max_steps) > 1 else section.max_steps[0]
    for name in ("patience", "start", "optimizer", "schedule"):
        options[name] = getattr(section, name)
    if section.kind == "shuffled":
        options["seed"] = recipe.seed
    made: Curriculum = getattr(Curriculum, section.kind)(count, **options)
    return made


def _spread(recipe: Recipe, name: str) -> tuple[float, ...]:
    """A schedule of the recipe, one number a stage."""
    section = recipe.curriculum
    values: tuple[float, ...] = getattr(section, name)
    if len(values) == 2 and section.num_stages != 2:
        return per_stage(name, Ramp(*values, section.spacing), section.num_stages)
    return per_stage(name, values[0] if len(values) == 1 else values, section.num_stages)


def is_skewed(recipe: Recipe) -> bool:
    """Whether the divergence takes the skew of the stages."""
    return recipe.loss.divergence in ("skew_fkl", "skew_rkl")


def teacher_passes(recipe: Recipe, num_samples: int | None = None) -> float:
    """How many times warm-up and stages send the average sample through an online teacher.

    Stages that count steps need the number of samples; without it, and without `data.num_train`, it is infinite.
    """
    curriculum = curriculum_of(recipe)
    if recipe.curriculum.max_steps is None:
        # subsets are of equal size but for a remainder, which does not matter here
        return recipe.warmup.epochs + curriculum.passes(range(recipe.curriculum.num_stages))
    count = num_samples or recipe.data.num_train
    steps = sum(stage.max_steps or 0 for stage in curriculum.stages)
    rows = steps * recipe.training.batch_size * recipe.training.gradient_accumulation_steps
    return recipe.warmup.epochs + (rows / count if count else math.inf)


def plans_cache(recipe: Recipe) -> bool:
    """Whether the teacher's hidden states are to be stored; a disk without room may decide against it later."""
    from pocl.teacher import choose_teacher

    mode, on_policy = recipe.teacher_cache.mode, recipe.on_policy.share > 0
    if mode == "auto":
        return choose_teacher(teacher_passes(recipe), 0, 0, on_policy=on_policy).cached
    return mode == "cached"


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


def teacher_for_training(context: Context, *, on_policy: bool = False) -> Teacher:
    """The cached teacher if the run has a cache, with the model behind it for sampled responses; else the model."""
    from pocl.teacher import HiddenStateCache, OnlineTeacher

    if not context.summaries.get("teacher-cache", {}).get("cached"):
        return OnlineTeacher(context.teacher())
    fallback = OnlineTeacher(context.teacher()) if on_policy else None
    return HiddenStateCache.open(
        context.path / "teacher-cache",
        tokenizer=context.tokenizer(),
        template=context.template_name(),
        dataset=context.rows("train"),
        fallback=fallback,
    )


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


def criteria_of(recipe: Recipe) -> list[Criterion]:
    """The criteria that a recipe ranks by."""
    from pocl import difficulty

    found = []
    for section in recipe.ranking.criteria:
        known: Criterion = getattr(difficulty, section.measure.upper())
        found.append(difficulty.Criterion(known.column, section.direction or known.direction, section.weight))
    return found


def rank_samples(context: Context) -> Mapping[str, Any]:
    """Score every training sample with the student as it is, rank, and cut the ranking into parts."""
    from pocl.difficulty import rank, score
    from pocl.generation import GenerationSettings

    section = context.recipe.ranking
    examples = context.examples("train")
    settings = GenerationSettings(
        max_new_tokens=section.max_new_tokens, no_repeat_ngram_size=section.no_repeat_ngram_size
    )
    student = context.load_student(context.warm_student_source())
    scores = score(
        student,
        context.tokenizer(),
        examples,
        output_dir=context.path / "ranking",
        answers=section.needs_answers,
        words=section.words,
        generation=settings if section.needs_answers else None,
        teacher=context.teacher() if section.needs_teacher else None,
        **context.text_options(),
    )
    num_stages = context.recipe.curriculum.num_stages
    criteria = criteria_of(context.recipe)
    ranked = rank(scores, k=section.k, num_subsets=num_stages, criteria=criteria, partition=section.partition)
    if section.needs_answers:
        # `response` is the reference in a data set that other trainers read: the student's answer gets another name
        ranked = ranked.rename_column("response", "student_response")
    write_parquet(_beside_source(context, examples, ranked), context.path / "ranking" / "ranked.parquet")
    easiest, hardest = (_mean(ranked, part) for part in (0, num_stages - 1))
    return {
        "note": f"Mean cross-entropy {easiest:.2f} in the easiest part, {hardest:.2f} in the hardest; "
        f"{context.path / 'ranking' / 'ranked.parquet'}"
    }


def _beside_source(context: Context, examples: Dataset, ranked: Dataset) -> Dataset:
    """The ranking behind the columns of the data's own rows."""
    from datasets import concatenate_datasets

    source = read_parquet(context.path / "data" / "train-source.parquet")
    if len(ranked) < len(examples):  # both are in the order of the data
        scored = np.isin(arrow_column(examples, "id").to_numpy(), arrow_column(ranked, "sample_id").to_numpy())
        source = in_memory(arrow_table(source).filter(pa.array(scored)), f"{source._fingerprint}-scored")
    source = source.rename_columns(names_beside_ranking(source.column_names))
    return concatenate_datasets([source, ranked], axis=1)


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


def _subsets(ranked: Dataset, sample_ids: NDArray[np.int64]) -> list[int]:
    """The subset of each of some samples."""
    ids, subsets = (arrow_column(ranked, name).to_numpy() for name in ("sample_id", "subset"))
    order = np.argsort(ids)
    found: list[int] = subsets[order[np.searchsorted(ids, sample_ids, sorter=order)]].tolist()
    return found


def train_curriculum(context: Context) -> Mapping[str, Any]:
    """Train the student through the stages and save it with its tokenizer."""
    recipe = context.recipe
    rows = context.rows("train")
    ranked = read_parquet(context.path / "ranking" / "ranked.parquet", columns=["sample_id", "subset"])
    subsets = _subsets(ranked, arrow_column(rows, "sample_id").to_numpy())
    curriculum = curriculum_of(recipe)
    folder = context.path / "training"
    trainer = _trainer(
        context,
        folder,
        model=context.load_student(context.warm_student_source(), trained=True),
        rows=rows,
        subsets=subsets,
        curriculum=curriculum,
        divergence=divergence_of(recipe),
        scale_by_temperature=scales_by_temperature(recipe, recipe.loss.divergence),
        on_policy=recipe.on_policy.share,
        on_policy_max_new_tokens=recipe.on_policy.max_new_tokens,
        on_policy_temperature=recipe.on_policy.temperature,
        on_policy_replay=recipe.on_policy.replay,
    )
    trainer.train()
    _save(trainer, context.path / "student", title=recipe.name)
    _remove_stages(folder)
    return {
        "stage_samples": [len(chosen) for chosen in curriculum.rows(subsets)],
        "note": f"Student saved in {context.path / 'student'}",
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
    **options: Any,
) -> Any:
    """A trainer with the recipe's settings; `options` are further ones of `POCLConfig`."""
    from pocl.trainer import POCLConfig, POCLTrainer

    recipe = context.recipe
    training = recipe.training
    evaluates = len(context.examples("validation")) > 0 and curriculum.name != WARM_UP
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
        logging_steps=1 if len(rows) < 5000 else 10,
        eval_strategy="epoch" if evaluates else "no",
        save_strategy="epoch",
        report_to=list(training.report_to) or "none",
        load_best_model_at_end=evaluates and curriculum.start == "best",
        metric_for_best_model=training.metric if evaluates else None,
        greater_is_better=training.metric == "rouge_l" if evaluates else None,
        seed=recipe.seed,
        disable_tqdm=False,  # transformers would derive it from its log level
        **_checkpointing(training.activation_checkpointing),
        **options,
    )
    measures_answers = evaluates and training.metric == "rouge_l"
    return POCLTrainer(
        model,
        teacher_for_training(context, on_policy=options.get("on_policy", 0) > 0),
        config,
        rows,
        subsets,
        curriculum,
        eval_dataset=context.rows("validation") if evaluates else None,
        processing_class=context.tokenizer(),
        divergence=divergence,
        compute_generation_metrics=_answer_metric(context) if measures_answers else None,
    )


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """The argument of transformers, which goes by another name in older releases."""
    from transformers import TrainingArguments

    new, old = "activation_checkpointing", "gradient_checkpointing"
    return {new if new in TrainingArguments.__dataclass_fields__ else old: True} if wanted else {}


def _answer_metric(context: Context) -> Any:
    """ROUGE-L of a student's greedy answers to the validation prompts."""
    from pocl.difficulty.samples import SampleReader
    from pocl.generation import GenerationSettings, end_tokens, generate
    from pocl.rouge import count_wordless, pair_scores, warn_of_wordless

    examples, tokenizer = context.examples("validation"), context.tokenizer()
    samples = SampleReader(tokenizer, examples.column_names, **context.text_options())(examples)
    prompts, references = [sample.prompt for sample in samples], [sample.reference for sample in samples]
    settings = GenerationSettings(max_new_tokens=context.recipe.ranking.max_new_tokens)
    words = context.recipe.ranking.words
    warn_of_wordless(count_wordless(references, words), len(references), words)

    def measure(model: Any) -> dict[str, float]:
        ends = end_tokens(model, tokenizer)
        answers = generate(model, prompts, settings, eos_token_ids=ends, progress=False)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        scores = pair_scores(texts, references, stem=True, words=words)
        return {"rouge_l": sum(scores) / len(scores)}

    return measure


def _save(trainer: Any, folder: Path, *, title: str | None = None) -> None:
    """Write the student, its tokenizer and, under a title, a card; the folder is there in full or not at all."""
    from pocl.trainer.card import distillation_section
    from pocl.trainer.weights import save_weights

    scratch = folder.with_name(f".{folder.name}-writing")
    if trainer.is_world_process_zero():
        shutil.rmtree(scratch, ignore_errors=True)
    save_weights(trainer, scratch)
    if trainer.is_world_process_zero():
        if title:
            write_text(scratch / "README.md", f"# {title}\n{distillation_section(trainer)}")
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    trainer.accelerator.wait_for_everyone()


def _remove_stages(folder: Path) -> None:
    """Checkpoints are for going on; a finished step needs them no more, and they hold three times the model each."""
    for stage in folder.glob("stage-*"):
        shutil.rmtree(stage, ignore_errors=True)  # every process comes here


def _loss_note(folder: Path) -> str:
    from pocl.report.run import read_log

    values = [line["divergence"] for line in read_log(folder / "log.jsonl") if "divergence" in line]
    count = max(1, len(values) // 20)
    first, last = sum(values[:count]) / count, sum(values[-count:]) / count
    return f"Divergence from the teacher {first:.2f} -> {last:.2f} nats per token."
