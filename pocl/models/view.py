"""One view of a causal language model, made once and asked by everyone who runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pocl.models.head import head_of
from pocl.models.hidden import backbone_of, backbone_states, entering_states, states_and_router_loss
from pocl.models.wrappers import context_of, text_config, unwrapped
from pocl_kernels import Head

_KEY = "_pocl_view"


class LanguageModel:
    """What ranking, generation, evaluation, teachers and the trainer need to know of a Hugging Face causal LM.

    Get it with `view_of(model)`: it is made at the first call and kept with the model, inside all wrappers, so that
    what was found out stays known. It holds no copy of weights: `head()` is that of the moment.

    Attributes:
        model: the language model itself, inside PEFT, DDP and compile wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = unwrapped(model)
        self._enters: bool | None = (
            None  # whether the backbone's output enters the output embedding; None: not yet known
        )

    @property
    def name(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__

    @property
    def config(self) -> Any:
        """Of the language model; where it also sees or hears, of its text part."""
        return text_config(self.model)

    @property
    def device(self) -> torch.device:
        """Of the input embedding: where token ids go."""
        return next(self.model.get_input_embeddings().parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def backbone(self) -> nn.Module:
        """The part that ends with the last hidden states; see `hidden_states` for what enters the head."""
        return backbone_of(self.model)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def context(self) -> int | None:
        """Tokens the model can see at once, None if its config sets no limit."""
        value = context_of(self.config)
        if value is None:
            return None
        for name, module in self.model.named_modules():
            # RoBERTa and its kin begin to count behind the padding's position
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return value - module.padding_idx - 1
        return value

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding: ids below it can be read."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def attention(self) -> tuple[list[str], int | None]:
        """The kinds of attention among the layers (`full_attention`, `sliding_attention`, ...), and the window."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
        return sorted(set(kinds)), window

    @property
    def router_coefficient(self) -> float:
        """Weight of the experts' balance loss where the config asks for it (`output_router_logits`), else 0."""
        if not getattr(self.config, "output_router_logits", False):
            return 0.0
        names = ("router_aux_loss_coef", "aux_loss_coef")  # of most; of JetMoE
        found = (getattr(owner, name, None) for owner in (self.model, self.config) for name in names)
        return float(next((value for value in found if value is not None), 0.0))

    def head(self) -> Head:
        """See `pocl.models.head_of`."""
        return head_of(self.model)

    def hidden_states(
        self,
        input_ids: Tensor,  # [B, L] int64
        attention_mask: Any = None,
        **inputs: Any,
    ) -> Tensor:  # [B, L, H]
        """What enters the output embedding, in the model's dtype; the head is not run.

        Args:
            input_ids: token ids.
            attention_mask: [B, L], or what the model takes in its place.
            **inputs: further arguments of the model's forward: `position_ids`, `past_key_values` with `use_cache=True`.

        Raises:
            ValueError: an encoder-decoder, or a model whose logits do not come from its output embedding.
        """
        inputs = _inputs(input_ids, attention_mask, inputs)
        if self._enters:
            return backbone_states(self.backbone, inputs)
        hidden, enters = entering_states(self.model, self._watched(), inputs)
        if self._enters is None:
            self._enters = enters
        return hidden

    def states_and_router_loss(
        self, input_ids: Tensor, attention_mask: Any = None, **inputs: Any
    ) -> tuple[Tensor, Tensor]:  # [B, L, H], a scalar
        """`hidden_states`, and the balance loss of these tokens, not yet multiplied by `router_coefficient`.

        Raises:
            ValueError: as `hidden_states`; or the model's forward gives no such loss.
        """
        return states_and_router_loss(self.model, _inputs(input_ids, attention_mask, inputs))

    def _watched(self) -> nn.Module | None:
        if self._enters is None:
            try:
                return self.backbone
            except ValueError:  # a model that is not made of two parts
                pass
        return None


def _inputs(input_ids: Tensor, attention_mask: Any, further: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in further.items() if value is not None}
    return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **given}


def view_of(model: nn.Module | LanguageModel) -> LanguageModel:
    """The view of a model, whatever wraps it; the same one at every call."""
    if isinstance(model, LanguageModel):
        return model
    inner = unwrapped(model)
    view = vars(inner).get(_KEY)
    if view is None or view.model is not inner:  # a copy of a model carries the view of the original
        view = vars(inner)[_KEY] = LanguageModel(inner)
    return view
