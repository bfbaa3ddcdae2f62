"""The output projection of a language model: everything between its last hidden state and its logits."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from pocl_kernels.divergences import is_number


@dataclasses.dataclass(frozen=True)
class Head:
    """``logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    Args:
        weight: ``[V, H]``, any floating dtype.
        bias: ``[V]`` or None (Phi, GPT-J have one).
        scale: factor on the projection (Cohere multiplies by it; Granite's ``logits_scaling`` is its inverse).
        softcap: Gemma's soft cap, in units of the scaled logits; None for none.

    Raises:
        ValueError: if the shapes do not fit, the scale is no number or the softcap not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Tensor):
            raise ValueError(
                f"Head.weight is a {type(self.weight).__name__}: it must be a [vocabulary, hidden] tensor. Of a linear "
                "layer pass Head(layer.weight, layer.bias), of a whole model pocl.heads.head_of(model)"
            )
        if self.weight.dim() != 2 or 0 in self.weight.shape:
            raise ValueError(f"Head.weight must be [vocabulary, hidden], got shape {tuple(self.weight.shape)}")
        if self.bias is not None and tuple(self.bias.shape) != (self.weight.shape[0],):
            raise ValueError(
                f"Head.bias must have shape ({self.weight.shape[0]},), one value a row of the weight, got "
                f"{tuple(self.bias.shape)}"
            )
        if not is_number(self.scale):
            raise ValueError(f"Head.scale={self.scale!r} must be one number; 1 for a head without one")
        if self.softcap is not None and not (is_number(self.softcap) and self.softcap > 0):
            raise ValueError(f"Head.softcap={self.softcap!r} must be positive; pass None for a head without one")

    @property
    def vocab_size(self) -> int:
        """Number of rows of the weight, padding included."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """Number of columns of the weight."""
        return self.weight.shape[1]


def as_head(head: Head | Tensor) -> Head:
    """A bare ``[V, H]`` weight is a head without bias, scale or softcap."""
    return head if isinstance(head, Head) else Head(head)


def whole_tensor(x: Any) -> Any:
    """A DTensor gathered, with gradients averaged over its processes; anything else as it is."""
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial

    whole = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)
    if whole.requires_grad:
        size = x.device_mesh.size()
        whole.register_hook(lambda gradient: gradient / size)  # not Partial("avg"), which gloo cannot reduce
    return whole


def gathered(head: Head) -> Head:
    """A head whose tensors are whole: DTensors (FSDP2) are gathered once a call.

    Their gradients return to the shards as the mean over the processes, which is what DDP and FSDP make of it, and the
    gradient itself where all processes see the same tokens.
    """
    if not (hasattr(head.weight, "full_tensor") or hasattr(head.bias, "full_tensor")):
        return head
    return dataclasses.replace(head, weight=whole_tensor(head.weight), bias=whole_tensor(head.bias))
