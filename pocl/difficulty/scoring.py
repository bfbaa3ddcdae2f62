"""Per-sample difficulty: cross-entropy of the reference answer and ROUGE-L of the student's own answer.

Samples are scored a shard at a time: a run of neighbouring samples, decided by the data and `shard_size` alone. A shard
is computed from its start, by one process, in an order that depends on its samples only, and written whole. So whatever
was cut off, and however many processes share the work, the table comes out the same.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from torch import nn

from pocl.data.corpus import is_corpus
from pocl.data.tables import arrow_column
from pocl.difficulty.measure import (
    MAX_BATCH_TOKENS,
    Advance,
    Answering,
    asked,
    check_models,
    check_samples,
    engine_answers,
    engine_scores,
    scores_and_answers,
    token_scores,
)
from pocl.difficulty.processes import Processes
from pocl.difficulty.samples import Sample, SampleReader, mark_of, split_into_shards
from pocl.difficulty.store import MemoryStore, ShardStore, add_ids, check_ids
from pocl.engines import Engine
from pocl.generation import GenerationSettings, end_tokens, resolve_backend, rows_that_fit
from pocl.models import in_evaluation_mode, view_of
from pocl.models.fingerprint import tokenizer_fingerprint, weights_fingerprint
from pocl.rouge import check_rule, count_wordless, pair_scores, warn_of_wordless

if TYPE_CHECKING:
    from datasets import Dataset

# Samples between two writes: enough that filling and draining the batch of answers weighs little, few enough to lose.
SHARD_SIZE = {"cpu": 128, "cuda": 1024}

# Parts of a configuration that change without a change of the scores.
_INCIDENTAL = frozenset({"_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype"})

_TYPES = {
    "sample_id": pa.int64(),
    "cross_entropy": pa.float64(),
    "teacher_cross_entropy": pa.float64(),
    "kl_to_teacher": pa.float64(),
    "rouge_l": pa.float64(),
    "response": pa.string(),
    "num_tokens": pa.int64(),
}

logger = logging.getLogger(__name__)


def score(
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    template: str = "auto",
    max_length: int = 512,
    max_prompt_length: int = 256,
    template_kwargs: Mapping[str, Any] | None = None,
    special_tokens: str = "text",
    answers: bool = True,
    generation: GenerationSettings | None = None,
    teacher: nn.Module | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    batch_size: int | None = None,
    shard_size: int | None = None,
    backend: str = "auto",
    engine: str | Engine = "transformers",
    engine_args: Mapping[str, Any] | None = None,
    stem: bool = True,
    words: str = "auto",
    progress: bool = True,
) -> Dataset:
    """Scores every sample with the student before distillation (arXiv 2506.05695, section 3.2).

    Under `torchrun` or `accelerate launch` the processes share the shards, and all return the whole table.

    Args:
        model: the student, a Hugging Face causal language model.
        tokenizer: its tokenizer.
        dataset: examples from `load_examples`, streaming or not, or rows from `tokenize` (references are then the
            column `reference`, or decoded from the labels).
        output_dir: where finished shards and the table are kept, and taken up again after a stop. None keeps them in
            memory; several processes need a folder that all of them see.
        template, max_length, max_prompt_length, template_kwargs, special_tokens: as in `tokenize`; unused for rows.
        answers: let the model answer, for `rouge_l` and `response`; without, cross-entropy alone is measured.
        generation: how answers are made; greedy when left out. The paper also forbids repeated 6-grams.
        teacher: measure `teacher_cross_entropy` and `kl_to_teacher` too.
        max_batch_tokens: tokens, padding included, of one forward batch.
        batch_size: answers in the making at a time; what fits into memory when left out (a folder keeps the number of
            the run that made it).
        shard_size: samples a shard, 128 on a CPU and 1,024 elsewhere when left out.
        backend: as in `generate`.
        engine: who runs the student: `transformers`, in this process, `vllm`, or an engine of `pocl.engines` that runs
            it already. An engine apart from this process gives the answers and, unless a teacher is measured, the
            cross-entropies; `batch_size` and `backend` are then its own business. One process asks it.
        engine_args: arguments of `vllm.LLM`, such as `tensor_parallel_size`.
        stem: compare Porter stems.
        words: what ROUGE-L takes for a word: `auto`, `rouge_score`, `unicode` or `characters` (see `pocl.rouge`).
        progress: show a progress bar.

    Returns:
        A `Dataset` with `sample_id`, `cross_entropy` (nats per response token), with a teacher `teacher_cross_entropy`
        and `kl_to_teacher` (the same unit), with answers `rouge_l` (F1 in [0, 1]) and `response` (the model's answer),
        and `num_tokens` (of the reference answer), in the order of `dataset`. Samples without prompt or response are
        left out, with a warning.

    Raises:
        ValueError: bad data or arguments, a model that the trainer would refuse (`pocl.heads.verify_head`), duplicate
            ids, a sample longer than the model's context, a value that is not finite (names the sample), or an
            `output_dir` that belongs to another model, data or settings.
        OSError: no space is left; finished shards stay.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable

    shard_size = shard_size or SHARD_SIZE.get(view_of(model).device.type, SHARD_SIZE["cuda"])
    check_rule(words)
    _check_sizes(shard_size=shard_size, max_batch_tokens=max_batch_tokens, batch_size=batch_size)
    read = SampleReader(
        tokenizer,
        _columns(dataset),
        template=template,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        template_kwargs=template_kwargs,
        special_tokens=special_tokens,
    )
    _check_ids(dataset, read)
    if answers and is_corpus(_columns(dataset)):
        raise ValueError("dataset holds blocks of a corpus, which are no questions to answer; pass answers=False")
    if not answers and generation is not None:
        raise ValueError("generation is given but answers=False; leave out one of the two")
    check_models(model, teacher)
    settings = generation or GenerationSettings()
    longest = None if read.tokenised else max(max_length + 1, max_prompt_length + settings.max_new_tokens)
    with Processes.current() as processes, asked(model, engine, engine_args, longest) as apart:
        if processes.size > 1 and output_dir is None:
            raise ValueError(f"output_dir is needed to share the work among {processes.size} processes")
        if processes.size > 1 and apart is not None:
            raise ValueError(
                f"engine {apart.name} spreads over the machine by itself, and {processes.size} processes would start "
                "one each: start one process"
            )
        answering = None
        if answers and apart is not None:
            answering = Answering(settings, tuple(end_tokens(model, tokenizer)), apart.name, 0)
        elif answers:
            answering = _answering(model, tokenizer, settings, backend, batch_size, max_prompt_length, processes)
        run = {
            "model": _identity(model),
            "teacher": None if teacher is None else _identity(teacher),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "rows": read.describe(),
            "answers": None if answering is None else asdict(answering) | {"rows": batch_size},
            "batches": {"max_batch_tokens": max_batch_tokens, "shard_size": shard_size, "stem": stem},
            "words": words,
        }
        store: ShardStore | MemoryStore = MemoryStore() if output_dir is None else ShardStore(output_dir)
        kept = processes.first(lambda: store.open(run, {} if answering is None else {"rows": answering.rows}))
        if answering is not None:
            # what fits may differ from run to run, but the rounding of an answer may depend on it
            answering = replace(answering, rows=kept["rows"])
        scorer = Scorer(model, tokenizer, answering, teacher, max_batch_tokens, stem, words, apart)
        judged: Counter[str] = Counter()
        num_shards = _score_shards(dataset, shard_size, read, scorer, store, processes, progress, judged)
        processes.wait()
        processes.first(lambda: store.finish(num_shards))
        _report(read, processes, judged, words)
        return Dataset(InMemoryTable(store.read()))


@dataclass(frozen=True)
class Scorer:
    """Scores the samples of one shard."""

    model: nn.Module
    tokenizer: Any
    answering: Answering | None
    teacher: nn.Module | None
    max_batch_tokens: int
    stem: bool
    words: str
    engine: Engine | None = None
    """Apart from this process; None leaves all to the model."""

    def __call__(self, samples: Sequence[Sample], advance: Advance | None = None) -> pa.Table:
        """The rows of the table, in the order of the samples."""
        check_samples(self.model, samples)
        options: dict[str, Any] = {
            "teacher": self.teacher,
            "max_batch_tokens": self.max_batch_tokens,
            "advance": advance,
        }
        columns: dict[str, list[Any]] = {"sample_id": [s.sample_id for s in samples]}
        answers: list[list[int]] = []
        if self.engine is not None and samples:
            half = None if self.answering is not None else advance
            if self.teacher is None:
                scores = engine_scores(self.engine, samples, half)
            else:
                scores = token_scores(self.model, samples, **options | {"advance": half})
            if self.answering is not None:
                answers = engine_answers(self.engine, samples, self.answering, advance)
        elif self.answering is None or not samples:
            scores = token_scores(self.model, samples, **options)
        else:
            scores, answers = scores_and_answers(self.model, samples, self.answering, **options)
        columns["cross_entropy"] = [s.cross_entropy for s in scores]
        if self.teacher is not None:
            columns["teacher_cross_entropy"] = [s.teacher_cross_entropy for s in scores]
            columns["kl_to_teacher"] = [s.kl_to_teacher for s in scores]
        if self.answering is not None:
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True) if answers else []
            references = [s.reference for s in samples]
            columns["rouge_l"] = pair_scores(texts, references, stem=self.stem, words=self.words)
            columns["response"] = texts
        columns["num_tokens"] = [len(s.response) for s in samples]
        return pa.table({name: pa.array(values, type=_TYPES[name]) for name, values in columns.items()})


def _score_shards(
    dataset: Any,
    shard_size: int,
    read: SampleReader,
    scorer: Scorer,
    store: ShardStore | MemoryStore,
    processes: Processes,
    progress: bool,
    judged: Counter[str],
) -> int:
    """Scores what this process has to and is not there yet; returns the number of shards of all processes.

    `judged` counts the references that answers are judged by, and those without words.
    """
    num_shards = 0
    stream = not hasattr(dataset, "select")  # whose ids nobody has seen before
    seen: set[int] = set()
    with _Progress(_share(dataset, shard_size, processes), processes, progress) as bar:
        for index, rows in split_into_shards(dataset, shard_size):
            num_shards += 1
            if stream:
                add_ids([row[read.id_column] for row in rows()], seen)
            if index % processes.size != processes.rank:
                continue
            raw = rows()
            samples = read(raw)
            mark = mark_of(samples)
            if scorer.answering is not None:
                references = [sample.reference for sample in samples]
                judged.update(all=len(samples), wordless=count_wordless(references, scorer.words))
            if store.load(index, mark) is not None:
                bar.skip(len(raw))
                continue
            store.save(index, mark, scorer(samples, bar.advance))
            bar.advance(len(raw) - len(samples), 0)
    return num_shards


def _share(dataset: Any, shard_size: int, processes: Processes) -> int | None:
    """Rows that fall to this process, None for a stream."""
    if not hasattr(dataset, "__len__"):
        return None
    starts = range(processes.rank * shard_size, len(dataset), processes.size * shard_size)
    return sum(min(shard_size, len(dataset) - start) for start in starts)


def _identity(model: nn.Module) -> dict[str, Any]:
    """A hash of the weights, and the configuration that decides how they are used (positions, windows, caps)."""
    config = json.loads(view_of(model).config.to_json_string(use_diff=False))
    return {
        "weights": weights_fingerprint(model),
        "config": {name: value for name, value in config.items() if name not in _INCIDENTAL},
    }


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _columns(dataset: Any) -> list[str]:
    if getattr(dataset, "column_names", None):
        return list(dataset.column_names)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("dataset is empty; there is nothing to score")
    return list(first)


def _check_ids(dataset: Any, read: SampleReader) -> None:
    """Refuses what can be refused before any work is done."""
    if not hasattr(dataset, "select"):
        return
    if len(dataset) == 0:
        raise ValueError("dataset is empty; there is nothing to score")
    check_ids([arrow_column(dataset, read.id_column).to_numpy()])


def _answering(
    model: nn.Module,
    tokenizer: Any,
    settings: GenerationSettings,
    backend: str,
    batch_size: int | None,
    max_prompt_length: int,
    processes: Processes,
) -> Answering:
    """How answers will be made on this machine."""
    with in_evaluation_mode(model):
        backend = resolve_backend(model, backend)
    longest = max_prompt_length + settings.max_new_tokens
    rows = batch_size or rows_that_fit(model, longest, processes=processes.local_size)
    return Answering(settings, tuple(end_tokens(model, tokenizer)), backend, rows)


def _report(read: SampleReader, processes: Processes, judged: Counter[str], words: str) -> None:
    where = f" (in the shards of process {processes.rank} of {processes.size})" if processes.size > 1 else ""
    warn_of_wordless(judged["wordless"], judged["all"], words, where)
    counts = read.encoder.counts
    dropped = counts["empty_prompts"] + counts["empty_responses"]
    if dropped:
        logger.warning(
            "%d samples were left out: %d without a prompt, %d without a response%s",
            dropped,
            counts["empty_prompts"],
            counts["empty_responses"],
            where,
        )


class _Progress:
    """A bar of the first process over its own share: samples/s, tokens/s, time left."""

    def __init__(self, total: int | None, processes: Processes, progress: bool) -> None:
        from tqdm.auto import tqdm

        label = "scoring" if processes.size == 1 else f"scoring (1 of {processes.size} processes)"
        self.bar = tqdm(total=total, desc=label, unit=" samples", disable=not progress or processes.rank > 0)
        self.tokens, self.start = 0, time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, samples: int, tokens: int) -> None:
        """Some samples are done."""
        self.tokens += tokens
        rate = self.tokens / max(time.monotonic() - self.start, 1e-9)
        self.bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.bar.update(samples)

    def skip(self, samples: int) -> None:
        """Some samples were done by an earlier run: they count, but not for the rate."""
        if not self.bar.disable:
            self.bar.initial += samples
            self.bar.n += samples
            self.bar.refresh()
