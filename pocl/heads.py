"""From a Hugging Face causal language model to the two things a fused loss needs: hidden states and a `Head`.

    logits = head(hidden_states(model, ids))        # exactly the model's own logits

A causal language model is a backbone, whose last hidden states come after the final norm, and a projection to the
vocabulary, which some families scale (Cohere, Granite, Falcon-H1, ...) or cap (Gemma 2 to 4, RecurrentGemma, xLSTM). A
loss that takes hidden states must not forget either, so `verify_head` compares both paths on a few tokens.

Shapes: B sequences, L positions, H hidden size, V vocabulary, N valid (response) tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pocl_kernels import Head
from pocl_kernels.head import whole_tensor

IGNORE_INDEX = -100

# The entries of a batch that a backbone takes.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")

# (config field, exponent): the logits are multiplied by value ** exponent before the softcap.
_SCALE_FIELDS = (
    ("logit_scale", 1),  # Cohere, Cohere 2
    ("lm_head_multiplier", 1),  # Falcon-H1
    ("output_multiplier", 1),  # Muse
    ("logits_mup_width_multiplier", -1),  # Inkling
    ("logits_scaling", -1),  # Granite; HyperCLOVA X multiplies by the field of the same name
)
_SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Padding a vocabulary to a multiple never adds more rows than this (multiples of 512 and less are in use).
_MAX_VOCABULARY_PADDING = 512


def unwrapped(model: Any) -> Any:
    """The Hugging Face causal language model inside PEFT, DDP and compile wrappers."""
    while True:
        if hasattr(model, "get_base_model"):  # PEFT; `peft_config` alone also sits on the model inside
            model = model.base_model.model
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of the model that ends with the last hidden states.

    Raises:
        ValueError: the model has no backbone apart from its head, or is an encoder-decoder.
    """
    model = unwrapped(model)
    backbone = getattr(model, "base_model", model)
    if backbone is model:  # a prefix that names nothing here (Llama 4's text model)
        backbone = getattr(model, "model", model)
    if backbone is model:
        raise ValueError(
            f"model: {type(model).__name__} has no backbone of its own; pass a causal language model with "
            "a head (AutoModelForCausalLM)"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: {type(model).__name__} is an encoder-decoder; only decoders can be distilled")
    return backbone


def head_of(model: Any) -> Head:
    """The projection to the vocabulary: weight [V, H], bias [V] or None, scale and softcap, gradients attached.

    The tensors are the model's parameters themselves (a tied weight is the embedding's), except where they cannot be: a
    LoRA adapter on the head is merged differentiably, a sharded weight is gathered once.

    Raises:
        ValueError: the model has no linear output embedding.
    """
    model = unwrapped(model)
    output = model.get_output_embeddings()
    if output is None or not hasattr(output, "weight"):
        raise ValueError(
            f"model: {type(model).__name__} has no linear output embedding; pass a causal language model "
            "(AutoModelForCausalLM)"
        )
    weight, bias = _weight_and_bias(output)
    config = _text_config(model)
    rows = getattr(config, "unpadded_vocab_size", None)
    if rows is not None and rows < weight.shape[0]:
        weight, bias = weight[:rows], bias if bias is None else bias[:rows]
    return Head(weight, bias, scale=_scale(config), softcap=_softcap(config))


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,  # [B, L] int64
    attention_mask: Tensor | None = None,  # [B, L]
    position_ids: Tensor | None = None,  # [B, L]
    **kwargs: Any,
) -> Tensor:  # [B, L, H]
    """Last hidden states after the final norm, in the model's dtype; the head is not run.

    Further keyword arguments go to the backbone. Inside DDP or FSDP call this from within the wrapper's forward.
    """
    if position_ids is not None:
        kwargs["position_ids"] = position_ids
    output = backbone_of(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
    return output[0]


def shifted_labels(labels: Tensor) -> Tensor:
    """Labels aligned with the logits: position i of the result is `labels[i + 1]`, the last one is ignored.

    Args:
        labels: [..., L] int64 in the Hugging Face convention (`labels[i]` is `input_ids[i]` or -100).
    """
    aligned = torch.full_like(labels, IGNORE_INDEX)
    aligned[..., :-1] = labels[..., 1:]
    return aligned


def label_positions(batch: Mapping[str, Tensor]) -> Tensor:  # [N] int64
    """Places, in the flattened batch, of the positions that predict a label: row-major, on the device of the labels.

    A loader may have found them before (`label_positions`): finding them on a GPU makes the host wait for it.
    """
    known = batch.get("label_positions")
    if known is not None:
        return known.to(batch["labels"].device)
    return (shifted_labels(batch["labels"]).flatten() != IGNORE_INDEX).nonzero().flatten()


def at_positions(states: Tensor, positions: Tensor) -> Tensor:
    """Rows [N, H] of hidden states [B, L, H] at flattened positions [N]."""
    return states.flatten(0, 1).index_select(0, positions)


def verify_head(model: nn.Module, tolerance: float = 1e-3, length: int = 8) -> None:
    """Compare `head_of` and `hidden_states` with the model's own logits on a few tokens, without gradients.

    Args:
        tolerance: largest allowed difference relative to the largest logit.
        length: number of tokens tried.

    Raises:
        ValueError: they differ, which means that this family transforms its logits in a way unknown to pocl.
    """
    inner = unwrapped(model)
    device = inner.get_input_embeddings().weight.device
    input_ids = (torch.arange(length, device=device) + 1).remainder(_text_config(inner).vocab_size).unsqueeze(0)
    was_training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            own = type(inner).forward(inner, input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
            ours = project(head_of(inner), hidden_states(inner, input_ids, torch.ones_like(input_ids)))
    finally:
        inner.train(was_training)
    error = (own.float() - ours.float()).abs().max().item() if own.shape == ours.shape else float("inf")
    if not error <= tolerance * max(1.0, own.float().abs().max().item()):
        raise ValueError(
            f"model: the logits of {type(inner).__name__} are not its head applied to its last hidden states "
            f"(largest difference {error:.3g}); pocl does not know this family's logit transform. Add its config field "
            "to pocl/heads.py"
        )


def separates_packed_rows(model: nn.Module, tolerance: float = 1e-3) -> bool:
    """Whether two rows behind one another, with positions that start anew, have the hidden states they have alone."""
    inner = unwrapped(model)
    device = inner.get_input_embeddings().weight.device
    rows = [torch.arange(start, start + length, device=device).unsqueeze(0) + 1 for start, length in ((0, 5), (2, 4))]
    rows = [row.remainder(_text_config(inner).vocab_size) for row in rows]
    positions = torch.cat([torch.arange(row.shape[1], device=device) for row in rows]).unsqueeze(0)
    was_training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            alone = torch.cat([hidden_states(inner, row) for row in rows], 1).float()
            packed = hidden_states(inner, torch.cat(rows, 1), position_ids=positions).float()
    except (TypeError, ValueError, RuntimeError):  # a backbone without positions, or one that wants a mask
        return False
    finally:
        inner.train(was_training)
    return (alone - packed).abs().max().item() <= tolerance * alone.abs().max().item()


def project(head: Head, hidden: Tensor) -> Tensor:
    """Logits [..., V] float32 of hidden states [..., H]: projection, bias, scale, softcap, in this order."""
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    logits = nn.functional.linear(hidden, head.weight.to(hidden.dtype), bias).float() * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def check_vocabularies(student: Any, teacher: Any) -> int:
    """Number of token ids that student and teacher share.

    Args:
        student, teacher: each a tokenizer, a mapping from token to id, or a number of rows. Two numbers can only be
            compared by size: they may differ by padding, that is by fewer than 512 rows.

    Returns:
        The shared number of ids; surplus rows of either head are padding.

    Raises:
        ValueError: the two disagree on the meaning of an id, or differ by more than padding.
    """
    if isinstance(student, int) and isinstance(teacher, int):
        if abs(student - teacher) > _MAX_VOCABULARY_PADDING:
            raise ValueError(
                f"teacher: its vocabulary has {teacher} entries and the student's {student}; they may only differ by"
                f" padding (at most {_MAX_VOCABULARY_PADDING}). Choose a pair that shares its tokenizer"
            )
        return min(student, teacher)
    of_student, of_teacher = _vocabulary(student), _vocabulary(teacher)
    if of_student != of_teacher:
        tokens = of_student.keys() | of_teacher.keys()
        differing = [token for token in sorted(tokens) if of_student.get(token) != of_teacher.get(token)]
        shown = ", ".join(f"{t!r}: {of_student.get(t)} and {of_teacher.get(t)}" for t in differing[:3])
        raise ValueError(
            f"teacher: its tokenizer gives {len(differing)} tokens another id than the student's (student and teacher: "
            f"{shown}); distillation needs one tokenizer. Choose a pair that shares it"
        )
    return max(of_student.values()) + 1


def _vocabulary(source: Any) -> Mapping[str, int]:
    vocabulary = source if isinstance(source, Mapping) else getattr(source, "get_vocab", lambda: None)()
    if not vocabulary:
        raise ValueError(
            f"check_vocabularies: expected two sizes, or tokenizers or mappings from token to id, "
            f"got {type(source).__name__}"
        )
    return vocabulary


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _scale(config: Any) -> float:
    scale = 1.0
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


def _weight_and_bias(output: Any) -> tuple[Tensor, Tensor | None]:
    """Effective weight and bias of the output embedding, looking through PEFT wrappers and DTensors."""
    modules_to_save = getattr(output, "modules_to_save", None)
    if modules_to_save is not None and getattr(output, "active_adapters", None):
        output = modules_to_save[output.active_adapters[0]]
    base = output.get_base_layer() if hasattr(output, "get_base_layer") else output
    weight, bias = whole_tensor(base.weight), whole_tensor(getattr(base, "bias", None))
    if base is not output and hasattr(output, "get_delta_weight") and not getattr(output, "merged", False):
        for adapter in () if getattr(output, "disable_adapters", False) else output.active_adapters:
            if adapter in getattr(output, "lora_A", {}):
                weight = weight + output.get_delta_weight(adapter)
    return weight, bias
