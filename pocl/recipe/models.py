"""The sections of a recipe for the two models."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pocl.recipe.comparing import Section
from pocl.recipe.training import as_tuple

Dtype = Literal["float32", "bfloat16", "float16"]
EngineName = Literal["transformers", "vllm"]


class TeacherSection(Section):
    """The model to learn from. A plain string stands for `model`."""

    model: str = "embedded"
    """Hub id, folder, or `embedded`, SmolLM2-135M-Instruct from the Python registry. With `server`, its name there."""
    adapt_epochs: NonNegativeInt = 0
    """Passes over the training samples that fine-tune the teacher on the references first, as the paper does."""
    adapt_learning_rate: PositiveFloat = 3e-5
    """Peak of the teacher's learning rate, cosine to 0."""
    dtype: Dtype = "float32"
    """Number format of the weights in memory."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights. Only for authors you trust."""
    store: Literal["auto", "hidden", "top_k"] = "auto"
    """What is kept of the teacher: hidden states, which lose nothing, or the likeliest tokens of each position. auto:
    hidden states, but of a server, which gives none."""
    top_k: PositiveInt = 64
    """How many likely tokens of each position are kept, 8 bytes each."""
    tail: Literal["bucket", "renormalise", "zero", "uniform"] = "bucket"
    """What is assumed of all other tokens: one outcome with what is left of the probability; no probability, the likely
    ones scaled to 1; none, and no scaling; or equal shares of what is left."""
    engine: EngineName = "transformers"
    """Who runs the teacher once over the samples: this process, or vLLM, which spreads it over GPUs. With vLLM and a
    student of your own the teacher is never loaded otherwise."""
    engine_args: dict[str, Any] = {}  # noqa: RUF012
    """Arguments of `vllm.LLM`, such as `{tensor_parallel_size: 4}`."""
    server: str | None = None
    """URL of an OpenAI-compatible server that runs the teacher and gives log-probabilities of prompts, as vLLM's does,
    such as `http://localhost:8000`. Empty: the teacher is run here."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's key. Empty: it wants none."""
    in_flight: PositiveInt = 16
    """Questions to the server at a time."""

    @model_validator(mode="after")
    def _one_place(self) -> TeacherSection:
        if self.engine_args and self.engine != "vllm":
            raise ValueError(f"engine_args are arguments of vLLM, and engine is {self.engine}: set engine to vllm")
        if self.server is None:
            if self.api_key_env:
                raise ValueError("api_key_env is for a server: name its URL as server, or leave it out")
            return self
        if self.model == "embedded":
            raise ValueError("server needs model, the name that the server lists it under")
        if self.engine != "transformers":
            raise ValueError(f"server runs the teacher already: leave out engine = {self.engine}")
        if self.store == "hidden":
            raise ValueError("a server gives no hidden states: set store to top_k, or leave it out")
        if self.adapt_epochs:
            raise ValueError("a teacher on a server cannot be adapted: set adapt_epochs to 0")
        return self


def _as_layers(value: Any) -> Any:
    """`10-19,25`, a number or a list of both, as the numbers they stand for, ascending."""
    if value is None or isinstance(value, bool):
        return value
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    found: list[int] = []
    for part in map(str, parts):
        limits = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(limits[1]), int(limits[2] or limits[1])) if limits else (0, -1)
        if last < first:
            raise ValueError(
                f"{part!r} is no layer and no range of layers; write 12, 10-19 or 10-19,25, counted from 0"
            )
        found += range(first, last + 1)
    if twice := sorted({layer for layer in found if found.count(layer) > 1}):
        raise ValueError(f"layer {twice[0]} is named twice; name each once")
    return tuple(sorted(found))


Layers = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_as_layers), Field(min_length=1)]


class LoraSection(Section):
    """Train low-rank adapters (LoRA, by the library peft) in place of the student's weights."""

    r: PositiveInt = 16
    """Rank: columns of the two small matrices that stand for the change of a weight."""
    alpha: PositiveFloat | None = None
    """Their product is scaled by alpha / r. Empty: twice r."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of an adapter's input, in training. The head (`lm_head`) takes none."""
    targets: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)] = ("all-linear",)
    """Modules that get an adapter, by the end of their names, such as `[q_proj, v_proj]`. all-linear: every linear
    layer but the head; name the head to adapt it, too."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(r), so that large ranks learn as fast."""
    dora: bool = False
    """DoRA: learn the length of each weight's columns besides."""
    merge: bool = False
    """Save the student with its adapter merged into the weights, an ordinary model. Else `student/` holds the adapter
    alone, which names its base; `pocl merge` makes one of the other later."""

    @property
    def scale(self) -> float:
        """Alpha, chosen or not."""
        return self.alpha or 2.0 * self.r


class StudentSection(Section):
    """The model to train: one of your own, or layers cut from the teacher. A plain string stands for `model`."""

    model: str | None = None
    """Hub id or folder of a student of your own, with the teacher's tokenizer, or `recipe:NAME`: the student that this
    recipe makes, made at the first use and kept in pocl's cache folder."""
    cut: PositiveInt | None = None
    """Instead of `model`: this many evenly spaced layers of the teacher."""
    drop: Layers | None = None
    """Instead of `model`: the teacher without these layers, counted from 0, as in `10-19`, `4,7` or `10-19,25`. The
    middle ones are missed least."""
    dtype: Dtype = "float32"
    """Number format of the weights in memory; keep float32 for training and set `training.precision`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights. Only for authors you trust."""
    engine: EngineName = "transformers"
    """Who answers for the student in ranking and evaluation: this process, or vLLM."""
    engine_args: dict[str, Any] = {}  # noqa: RUF012
    """Arguments of `vllm.LLM`, such as `{gpu_memory_utilization: 0.5}`."""
    lora: LoraSection | None = None
    """Train adapters of low rank in place of the weights of `model`: `{}`, or some of r, alpha, dropout, targets,
    rank_stabilized, dora, merge. Empty: all weights are trained."""

    @model_validator(mode="after")
    def _one_source(self) -> StudentSection:
        if sum(source is not None for source in (self.model, self.cut, self.drop)) != 1:
            raise ValueError(
                "name one of `model` (a student of your own), `cut` (how many layers of the teacher to keep) and "
                "`drop` (which layers of the teacher to leave out)"
            )
        if self.engine_args and self.engine != "vllm":
            raise ValueError(f"engine_args are arguments of vLLM, and engine is {self.engine}: set engine to vllm")
        if self.lora and self.from_teacher:
            raise ValueError(
                f"lora adapts a student that can speak, and one made by `{'cut' if self.cut else 'drop'}` has to "
                "learn it anew with all its weights: leave lora out, or train that student first and name its folder "
                "as `model`"
            )
        return self

    @property
    def from_teacher(self) -> bool:
        """Whether the student is made of the teacher's layers."""
        return self.model is None
