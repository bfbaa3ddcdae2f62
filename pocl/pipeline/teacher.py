"""The teacher of a run: a model of this process, one behind an engine, or one on a server; and what is kept of it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pocl.pipeline.context import Context
from pocl.recipe import Recipe

if TYPE_CHECKING:
    from pocl.engines import Engine, ServerEngine
    from pocl.teacher import LikelyTokens, Teacher

FOLDER = "teacher-cache"
_SERVED_SHARD_MB = (
    4  # what a run that is cut off asks again is a shard at most: 8,192 answer tokens with 64 likely ones
)


def is_apart(recipe: Recipe) -> bool:
    """Whether no process of the run ever loads the teacher: it is on a server, or too large for all but vLLM."""
    teacher = recipe.teacher
    return teacher.server is not None or (teacher.engine == "vllm" and not recipe.student.from_teacher)


def stores_top_k(recipe: Recipe) -> bool:
    """Whether the cache is to hold likely tokens; `auto` is hidden states, which lose nothing, where there are any."""
    return recipe.teacher.server is not None or recipe.teacher.store == "top_k"


def plans_cache(recipe: Recipe) -> bool:
    """Whether the teacher is to be stored; a disk without room may decide against it later."""
    from pocl.pipeline.curricula import teacher_passes
    from pocl.teacher import choose_teacher

    mode, on_policy = recipe.teacher_cache.mode, recipe.on_policy.share > 0
    if is_apart(recipe):
        return True
    if mode == "auto":
        return choose_teacher(teacher_passes(recipe), 0, 0, on_policy=on_policy).cached
    return mode == "cached"


def cache_settings(recipe: Recipe) -> dict[str, Any]:
    """What decides the content of a cache besides `teacher_cache`; nothing where all is as ever."""
    teacher = recipe.teacher
    chosen: dict[str, Any] = {}
    if stores_top_k(recipe):
        chosen["top_k"] = teacher.top_k
    if teacher.engine != "transformers":
        chosen["engine"] = teacher.engine
    return chosen


def tail_settings(recipe: Recipe) -> dict[str, Any]:
    """What a training on likely tokens assumes of the others."""
    return {"tail": recipe.teacher.tail} if stores_top_k(recipe) and recipe.teacher.tail != "bucket" else {}


@contextlib.contextmanager
def teacher_engine(context: Context) -> Iterator[Engine]:
    """Whoever runs the teacher of the recipe; given back in the end."""
    from pocl.engines import LocalEngine, VLLMEngine

    recipe, section = context.recipe, context.recipe.teacher
    if section.server is not None:
        engine: Engine = server_engine(context)
    elif section.engine == "vllm":
        engine = VLLMEngine(
            context.teacher_source(),
            dtype=section.dtype,
            revision=section.revision,
            max_model_len=recipe.data.max_length + 1,
            engine_args=section.engine_args,
        )
    else:
        engine = LocalEngine(context.teacher(), batch_tokens=recipe.teacher_cache.batch_tokens)
    with contextlib.closing(engine):
        yield engine


def server_engine(context: Context) -> ServerEngine:
    """The server of the recipe, which must have one."""
    from pocl.engines import ServerEngine

    section = context.recipe.teacher
    assert section.server is not None
    return ServerEngine(
        section.server,
        section.model,
        tokenizer=context.tokenizer(),
        api_key_env=section.api_key_env,
        in_flight=section.in_flight,
    )


def cache_in_words(recipe: Recipe, tokens: int, hidden_size: int | None) -> str:
    """What the teacher of so many label tokens takes on disk in either form, and what is lost.

    Args:
        recipe: what is asked for.
        tokens: label tokens of all samples.
        hidden_size: of the teacher; None where nobody can tell.
    """
    from pocl.pipeline.disk import BYTES, size_in_words  # which knows the steps, and they know this

    k, sizes = recipe.teacher.top_k, []
    if hidden_size is not None and recipe.teacher.server is None:
        dtype = recipe.teacher_cache.dtype or recipe.teacher.dtype
        whole = hidden_size * BYTES[dtype]
        sizes.append(f"{size_in_words(tokens * whole)} as hidden states ({hidden_size} {dtype} numbers a token)")
    sizes.append(f"{size_in_words(tokens * k * 8)} as the {k} likeliest tokens ({k * 8} bytes a token)")
    kept = "Hidden states are kept, which lose nothing at any temperature."
    if stores_top_k(recipe):
        kept = (
            f"The likeliest tokens are kept: which of the others gets how much of the rest is lost (teacher.tail is "
            f"{recipe.teacher.tail})."
        )
    return f"{tokens:,} answer tokens of the teacher take {' or '.join(sizes)}. {kept}"


def cache_teacher(context: Context) -> Mapping[str, Any]:
    """Ask the teacher once about the training and validation samples, and keep what it says."""
    from datasets import concatenate_datasets

    from pocl.pipeline.disk import size_in_words
    from pocl.teacher import HiddenStateCache, TopKCache, choose_teacher

    recipe = context.recipe
    if is_apart(recipe) and int(os.environ.get("RANK", "0")):
        return {}  # one process asks the engine; the others wait at the step's end
    splits = [split for split in ("train", "validation") if context.has_rows(split)]
    rows = concatenate_datasets([context.rows(split) for split in splits])
    options: dict[str, Any] = {"tokenizer": context.tokenizer(), "template": context.template_name()}
    sparse, k = stores_top_k(recipe), recipe.teacher.top_k
    tokens = TopKCache.estimate_bytes(rows, 1) // 8
    with teacher_engine(context) as engine:
        head = None if recipe.teacher.server is not None else engine.head()
        context.say(cache_in_words(recipe, tokens, None if head is None else head.hidden_size))
        dtype = None if head is None else _dtype(recipe) or head.weight.dtype
        bytes_a_token = k * 8 if sparse or head is None or dtype is None else head.hidden_size * dtype.itemsize
        why = ""
        if recipe.teacher_cache.mode == "auto" and not is_apart(recipe):
            from pocl.pipeline.curricula import teacher_passes

            free, passes = shutil.disk_usage(context.path).free, teacher_passes(recipe, len(context.rows("train")))
            choice = choose_teacher(passes, tokens * bytes_a_token, free, on_policy=recipe.on_policy.share > 0)
            why = f"{choice.reason[:1].upper()}{choice.reason[1:]}."
            if not choice.cached:
                return {"cached": False, "note": why}
        place, size = context.path / FOLDER, size_in_words(tokens * bytes_a_token)
        if sparse:
            options |= {} if recipe.teacher.server is None else {"shard_mb": _SERVED_SHARD_MB}
            likely = TopKCache.build(place, engine, rows, top_k=k, **options)
            lost = f"the {k} likeliest tokens leave {likely.mean_tail():.2%} of the probability to all others"
            return {"cached": True, "note": f"{why} {likely.num_tokens} answer tokens in {size}; {lost}.".lstrip()}
        cache = HiddenStateCache.build(place, engine, rows, dtype=dtype, **options)
    return {
        "cached": True,
        "note": f"{why} {cache.num_tokens} answer tokens in {size}; exact at every temperature.".lstrip(),
    }


def _dtype(recipe: Recipe) -> Any:
    import torch

    return getattr(torch, recipe.teacher_cache.dtype) if recipe.teacher_cache.dtype else None


def teacher_for_training(context: Context, *, on_policy: bool = False) -> Teacher | LikelyTokens:
    """The cached teacher if the run has a cache, and who was asked behind it for sampled responses; else the model."""
    from pocl.teacher import HiddenStateCache, OnlineTeacher, TopKCache

    if not context.summaries.get("teacher-cache", {}).get("cached"):
        return OnlineTeacher(context.teacher())
    recipe = context.recipe
    options: dict[str, Any] = {
        "tokenizer": context.tokenizer(),
        "template": context.template_name(),
        "dataset": context.rows("train"),
    }
    if on_policy:
        served = recipe.teacher.server is not None
        options["fallback"] = server_engine(context) if served else OnlineTeacher(context.teacher())
    if stores_top_k(recipe):
        return TopKCache.open(context.path / FOLDER, tail=recipe.teacher.tail, **options)
    return HiddenStateCache.open(context.path / FOLDER, **options)
