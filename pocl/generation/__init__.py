"""Answers from a causal language model: greedy, or sampled with a seed per sample.

An answer depends on its prompt, the settings and, when sampling, on its own id; not on the prompts beside it (in exact
arithmetic: where two tokens are equally likely up to rounding, another batch may round the other way). Sampling uses
one uniform number u a token from a generator seeded by (seed, sample id): the token is the first one whose cumulative
probability exceeds u.
"""

from pocl.generation.answers import BACKENDS, generate, resolve_backend
from pocl.generation.memory import rows_that_fit
from pocl.generation.sampling import NgramBan, choose, uniforms
from pocl.generation.settings import GenerationSettings, Request, check_prompts, end_tokens
from pocl.generation.slots import Prefilled, SlotEngine, maskable_attention, prefill

__all__ = [
    "BACKENDS",
    "GenerationSettings",
    "NgramBan",
    "Prefilled",
    "Request",
    "SlotEngine",
    "check_prompts",
    "choose",
    "end_tokens",
    "generate",
    "maskable_attention",
    "prefill",
    "resolve_backend",
    "rows_that_fit",
    "uniforms",
]
