"""The hidden states that enter the output embedding, without running it.

Of most models they are what the backbone returns, and calling the backbone is all there is to do. Some have more
between the two: a dense layer and a norm (the BERT-like heads, ModernBERT's decoder), a division. There the model's own
forward runs up to its output embedding, which hands over its input in place of projecting it.

Which kind a model is shows itself at its first pass: the tensor that enters the output embedding is the one that the
backbone returned, or another.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from pocl.models.wrappers import unwrapped

_NEW_NAMES = {"past_key_values": "cache"}  # from transformers 5.24 on


class _Reached(Exception):  # noqa: N818  not an error: it ends the forward where nothing more is wanted of it
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of the model that ends with the last hidden states.

    Raises:
        ValueError: the model has no backbone apart from its head, or is an encoder-decoder.
    """
    model = unwrapped(model)
    check_is_decoder(model)
    backbone = getattr(model, "base_model", model)
    if backbone is model:  # a prefix that names nothing here (Llama 4's text model)
        backbone = getattr(model, "model", model)
    if backbone is model:
        raise ValueError(
            f"model: {type(model).__name__} has no backbone of its own; pass a causal language model with "
            "a head (AutoModelForCausalLM)"
        )
    return backbone


def output_embedding_of(model: Any) -> Any:
    """The module that projects to the vocabulary, an adapter around it included.

    Raises:
        ValueError: the model has none, or is an encoder-decoder.
    """
    model = unwrapped(model)
    check_is_decoder(model)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None or not hasattr(output, "weight"):
        raise ValueError(
            f"model: {type(model).__name__} has no linear output embedding; pass a causal language model "
            "(AutoModelForCausalLM)"
        )
    return output


def check_is_decoder(model: Any) -> None:
    """Raise a ValueError where the model has an encoder that reads another text than the one it goes on with."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: {type(model).__name__} is an encoder-decoder; only decoders can be distilled. Pass a causal "
            "language model (AutoModelForCausalLM)"
        )


def backbone_states(backbone: nn.Module, inputs: dict[str, Any]) -> Tensor:  # [B, L, H]
    """What the backbone returns first."""
    hidden: Tensor = backbone(**_taken_by(type(backbone).forward, inputs))[0]
    return hidden


def entering_states(model: Any, backbone: nn.Module | None, inputs: dict[str, Any]) -> tuple[Tensor, bool]:
    """What enters the output embedding [B, L, H], and whether it is what the backbone returned.

    Args:
        model: unwrapped.
        backbone: watched; None where the model has none.
        inputs: of the model's forward.

    Raises:
        ValueError: the model's forward does not call its output embedding.
    """
    returned: list[Tensor] = []

    def watch(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) or len(output):
            returned.append(output if isinstance(output, Tensor) else output[0])

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else next(iter(kwargs.values())))

    embedding = output_embedding_of(model)
    hooks = [embedding.register_forward_pre_hook(stop, with_kwargs=True)]
    if backbone is not None:
        hooks.append(backbone.register_forward_hook(watch))
    try:
        # the class's own forward: the instance's may be the one that ends in a loss and asks for these states
        type(model).forward(model, **_taken_by(type(model).forward, inputs))
    except _Reached as reached:
        hidden = reached.hidden
    else:
        raise ValueError(
            f"model: {type(model).__name__} does not call its output embedding, {type(embedding).__name__}, on its "
            "hidden states; pocl cannot tell what its logits are made of"
        )
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, bool(returned) and _is_same(hidden, returned[-1])


def states_and_router_loss(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What enters the output embedding [B, L, H], and the balance loss of a mixture of experts.

    The forward runs to its end, with one zero in place of each position's logits.

    Args:
        model: unwrapped.
        inputs: of the model's forward.

    Raises:
        ValueError: the model's forward gives no such loss.
    """
    embedding = output_embedding_of(model)
    seen: list[Tensor] = []

    def without_logits(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(hidden)
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    embedding.forward = without_logits
    try:
        output = type(model).forward(model, **_taken_by(type(model).forward, {**inputs, "output_router_logits": True}))
    finally:
        del embedding.forward
    loss = getattr(output, "aux_loss", None)
    if not seen or not isinstance(loss, Tensor):
        raise ValueError(
            f"model: its config has output_router_logits=True, but the forward of {type(model).__name__} gives no "
            "aux_loss; set output_router_logits=False"
        )
    return seen[-1], loss


def _is_same(a: Tensor, b: Any) -> bool:
    """Whether two tensors are one and the same memory, seen in the same way."""
    if a is b:
        return True
    return (
        isinstance(b, Tensor)
        and a.data_ptr() == b.data_ptr()
        and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    )


def _taken_by(forward: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that a forward takes, by the names that it gives them.

    Raises:
        ValueError: it takes no mask, and the mask is not one of padding on the right, which a causal model ignores.
    """
    parameters = inspect.signature(forward).parameters
    if "past_key_values" in inputs and "cache" in parameters and "past_key_values" not in parameters:
        inputs = {_NEW_NAMES.get(name, name): value for name, value in inputs.items()}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return inputs
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and "attention_mask" not in parameters and not bool(mask[:, 0].all()):
        raise ValueError(f"attention_mask: {forward.__qualname__} takes none, so rows must be padded on the right")
    return {name: value for name, value in inputs.items() if name in parameters}
