"""The projection to the vocabulary: weight, bias, scale and softcap.

Some families scale their logits (Cohere, Granite, Falcon-H1, ...) or cap them (Gemma 2 to 4, RecurrentGemma, xLSTM).
The tensors of a head are gathered and merged here and nowhere else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pocl.models.adapters import weight_and_bias
from pocl.models.hidden import output_embedding_of
from pocl.models.wrappers import text_config
from pocl_kernels import Head

# (config field, exponent): the logits are multiplied by value ** exponent before the softcap.
_SCALE_FIELDS = (
    ("logit_scale", 1),  # Cohere, Cohere 2
    ("lm_head_multiplier", 1),  # Falcon-H1
    ("output_multiplier", 1),  # Muse
    ("logits_scaling", -1),  # Granite; HyperCLOVA X multiplies by the field of the same name
)
# Families that divide before the head, so that their hidden states hold the scale already.
_SCALED_BEFORE = ("minicpm3",)
_SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def head_of(model: Any) -> Head:
    """The projection to the vocabulary: weight [V, H], bias [V] or None, scale and softcap, gradients attached.

    The tensors are the model's parameters themselves (a tied weight is the embedding's), except where they cannot be:
    an adapter on the head is merged differentiably (`pocl.models.adapters`), a sharded weight is gathered once.

    Raises:
        ValueError: the model has no linear output embedding, or a quantised one.
    """
    output = output_embedding_of(model)
    weight, bias = weight_and_bias(output)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"model: the weight of its output embedding, {type(output).__name__}, is {tuple(weight.shape)} of "
            f"{weight.dtype}; a head must be [vocabulary, hidden] floating numbers. Leave the head out of the "
            "quantisation (llm_int8_skip_modules, modules_to_not_convert)"
        )
    config = text_config(model)
    rows = getattr(config, "unpadded_vocab_size", None)
    if rows is not None and rows < weight.shape[0]:
        weight, bias = weight[:rows], bias if bias is None else bias[:rows]
    return Head(weight, bias, scale=_scale(config), softcap=_softcap(config))


def project(head: Head, hidden: Tensor) -> Tensor:
    """Logits [..., V] float32 of hidden states [..., H]: projection, bias, scale, softcap, in this order."""
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    logits = nn.functional.linear(hidden, head.weight.to(hidden.dtype), bias).float() * head.scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def _scale(config: Any) -> float:
    scale = 1.0
    if config.model_type in _SCALED_BEFORE:
        return scale
    for field, exponent in _SCALE_FIELDS:
        value = getattr(config, field, None)
        if value is not None:
            multiplies = exponent == 1 or str(config.model_type).startswith("hyperclovax")
            scale *= float(value) if multiplies else 1.0 / float(value)
    return scale


def _softcap(config: Any) -> float | None:
    for field in _SOFTCAP_FIELDS:
        value = getattr(config, field, None)
        if value is not None:
            return float(value)
    return None
