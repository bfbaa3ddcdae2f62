"""PEFT adapters: which of them a hidden state and a head can stand for, and what a head weighs under its own.

An adapter in the body acts as always, since the body is run. One on the output embedding is never run: its head needs
the *effective* weight, made of base and adapter so that gradients reach both.

    LoRA                 W + scaling * B A, and its bias
    trainable tokens     W with the rows of those tokens exchanged
    modules_to_save      the copy that is trained
    any other            whatever affine map the layer is: PEFT's own forward on the unit vectors, a product of H rows.
                         So DoRA, IA3, LoHa, LoKr, OFT, BOFT, VeRA and the rest need no formula of ours.

Parameters that an engine has sharded are gathered first, as the base weight is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pocl.models.wrappers import peft_wrapper
from pocl_kernels.head import whole_tensor

# They do not change weights but go round the model or choose by token, so that the model inside is another one.
_AROUND_THE_MODEL = frozenset({"XLORA", "POLY", "CARTRIDGE", "SHADOW"})


def check_adapters(model: Any) -> None:
    """Raise a ValueError where the model inside PEFT's wrapper is not what answers: prompt tuning and its kin."""
    wrapper = peft_wrapper(model)
    for config in [] if wrapper is None else getattr(wrapper, "peft_config", {}).values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False) or kind in _AROUND_THE_MODEL:
            raise ValueError(
                f"model: its PEFT adapter is {kind.lower()}, which adds tokens or a second pass around the model, so "
                "its hidden states are not those of the rows; use an adapter that changes weights (LoraConfig, ...), "
                "or train the model without one"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                "model: an activated LoRA (alora_invocation_tokens) works on some tokens of a row only, which the loss "
                "does not tell it; use a plain LoraConfig"
            )


def check_head_dropout(output: Any) -> None:
    """Raise a ValueError where an adapter on the head drops inputs at random: no weight is equal to that."""
    rates = [
        module.p
        for name, module in output.named_modules()
        if isinstance(module, nn.Dropout) and module.p > 0 and "dropout" in name and hasattr(output, "base_layer")
    ]
    if rates:
        raise ValueError(
            f"model: the adapter on its head has a dropout of {max(rates):g}, and the fused loss sees a head as one "
            "weight; set the adapter's dropout to 0, or leave the head (lm_head) out of target_modules"
        )


def weight_and_bias(output: Any) -> tuple[Tensor, Tensor | None]:
    """Effective weight [V, H] and bias [V] or None of an output embedding, gradients attached."""
    if getattr(output, "modules_to_save", None) is not None and _active(output):
        output = output.modules_to_save[_active(output)[0]]
    elif hasattr(output, "token_adapter"):
        output = output.token_adapter
    elif hasattr(output, "original_module"):  # a copy is there to be trained, and switched off
        output = output.original_module
    if not hasattr(output, "base_layer"):
        return whole_tensor(output.weight), whole_tensor(getattr(output, "bias", None))
    if getattr(output, "merged", False) or not _active(output):
        return weight_and_bias(output.get_base_layer())
    # at full precision whatever the step's autocast says: the loss rounds the sum, not its parts
    with _gathered(output), torch.autocast(output.get_base_layer().weight.device.type, enabled=False):
        if hasattr(output, "get_merged_weights"):
            return output.get_merged_weights(_active(output)), None  # whose own forward takes no bias
        if _is_plain_lora(output):
            return _with_lora(output)
        return _affine_map(output)


def _active(layer: Any) -> list[str]:
    """The adapters of a layer that take part."""
    return [] if getattr(layer, "disable_adapters", False) else list(getattr(layer, "active_adapters", None) or [])


def _is_plain_lora(layer: Any) -> bool:
    if not isinstance(getattr(layer, "lora_B", None), nn.ModuleDict):  # AdaLoRA has parameters there
        return False
    return not any(name in (getattr(layer, "lora_variant", None) or {}) for name in _active(layer))


def _with_lora(layer: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = weight_and_bias(layer.base_layer)
    for name in _active(layer):
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name)
            if (of_lora := layer.lora_B[name].bias) is not None:
                scaled = layer.scaling[name] * of_lora
                bias = scaled if bias is None else bias + scaled
    return weight, bias


def _affine_map(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer that maps hidden states to logits by any affine map."""
    base = layer.get_base_layer()
    units = torch.eye(base.in_features, dtype=base.weight.dtype, device=base.weight.device)
    if base.bias is None and not any("bias" in name for name, _ in layer.named_parameters()):
        return layer(units).T, None
    rows = layer(torch.cat([units, torch.zeros_like(units[:1])]))
    return (rows[:-1] - rows[-1]).T, rows[-1]


@contextmanager
def _gathered(layer: nn.Module) -> Iterator[None]:
    """Sharded parameters of a layer and its adapters are whole meanwhile."""
    sharded = [
        (module, name, parameter)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if hasattr(parameter, "full_tensor")
    ]
    try:
        for module, name, parameter in sharded:
            module._parameters[name] = whole_tensor(parameter)
        yield
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter
