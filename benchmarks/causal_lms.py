"""Every causal language model of transformers, built tiny: are its logits the head of its hidden states?

    python -m benchmarks.causal_lms              # one line a class, and the counts
    python -m benchmarks.causal_lms --save       # writes the table of docs/models.md

A class is built from its own configuration with small sizes. What a configuration calls its sizes, and which of them
must fit each other, differs; so a few variants are tried until one runs. Weights are random, biases and norms too, as
zeros and ones would hide a forgotten term.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pocl.models import head_of, project, verify_head, view_of

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
_BEGIN, _END = "<!-- generated: python -m benchmarks.causal_lms --save -->\n", "<!-- end of generated -->\n"
VOCABULARY = 96
_LARGEST = 4_000_000  # parameters; more is a size that nobody has made small

# By the names that configurations have for them.
_SIZES: dict[str, Any] = (
    dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY)
    | dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff"), 48)
    | dict.fromkeys(("d_inner", "dim_ff", "ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp"), 48)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4)
    | dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_key_value_heads"), 2)
    | dict.fromkeys(("head_dim", "d_head", "d_kv", "dim_head", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "kv_lora_rank", "q_lora_rank"), 16)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    | dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1)
    | dict.fromkeys(
        ("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "state_size", "ssm_state_size"), 8
    )
    | dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads"), 4)
    | dict.fromkeys(("mamba_chunk_size", "chunk_size", "rotary_dim", "sliding_window", "attention_window_size"), 8)
    | dict.fromkeys(("image_size", "hidden_size_per_layer_input", "patch_size"), 8)
    | dict.fromkeys(("pad_token_id",), 0)
    | dict.fromkeys(("bos_token_id",), 1)
    | dict.fromkeys(("eos_token_id",), 2)
    | {"num_experts_per_tok": 2, "mamba_d_head": 16, "is_decoder": True, "causal": True}
    | {"num_kv_shared_layers": 0, "use_cache": False, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]}
    | {"lru_width": 32, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8}
    | {"pronunciation_vocab_size": 32, "shape_vocab_size": 32, "pronunciation_embed_dim": 8, "shape_embed_dim": 8}
    | {"languages": ["en"], "default_language": "en", "depth": 1, "out_hidden_size": 32, "output_channels": 32}
)
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 4, "num_key_value_heads": 4},
    {"head_dim": None},
    {"num_hidden_layers": 6},
)
# What sizes alone do not say.
_OF_TYPE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_d_head": 8},
    "zaya": {"num_experts_per_tok": 1},
    "bamba": {"attn_layer_indices": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba": {"layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}


# What a part of an error message means, for the table.
_REASONS = {
    "sees the tokens": "sees the tokens that it is to predict",
    "one token at a position": "predicts several tokens at a position",
    "parameters": "parts whose size no configuration sets",
    "timm": "needs timm",
    "validate_architecture": "its sizes do not fit each other",
    "layer types": "its sizes do not fit each other",
    "KeyError": "its sizes do not fit each other",
    "has no attribute": "transformers cannot build it from its own configuration",
    "tie_weights_keys": "transformers cannot tie its shared layers at this size",
}


@dataclass(frozen=True)
class Outcome:
    """What came of one class."""

    model_type: str
    name: str
    result: str
    """`equal`, `refused`, `crashed` or `not built`."""
    reason: str = ""
    path: str = ""
    """Where the hidden states come from: `backbone`, or `head input` where more lies between the two."""


def causal_lms() -> list[tuple[str, str]]:
    """(model type, class name) of transformers' own mapping, in order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())


def tiny_causal_lm(model_type: str) -> Any:
    """A model of this type with a few thousand parameters, in evaluation mode.

    Raises:
        LookupError: no variant of small sizes runs; says what the first one said.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    first: Exception | None = None
    for variant in _VARIANTS:
        try:
            config = _small(CONFIG_MAPPING[model_type], _SIZES | variant | _OF_TYPE.get(model_type, {}))
            with torch.device("meta"):
                count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if count > _LARGEST:
                raise ValueError(f"{count:.1e} parameters")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            _randomize(model)
            ids = torch.randint(3, VOCABULARY, (1, 8))
            with torch.no_grad():
                own = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            if not own.isfinite().all():
                raise ValueError("its random weights give logits that are not finite")
            return model
        except Exception as error:
            first = first or error
    raise LookupError(f"{type(first).__name__}: {' '.join(str(first).split())[:160]}")


def _small(config_class: Any, sizes: dict[str, Any], depth: int = 0) -> Any:
    known = set(inspect.signature(config_class.__init__).parameters) | set(getattr(config_class, "attribute_map", {}))
    default = None
    with contextlib.suppress(Exception):
        default = config_class()
        known |= set(default.to_dict())
    fields = {name: value for name, value in sizes.items() if name in known and value is not None}
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        part = part if getattr(part, "model_type", "") else type(getattr(default, name, None))
        if depth < 2 and getattr(part, "model_type", ""):
            fields.setdefault(name, _small(part, sizes, depth + 1))
    return config_class(**fields)


def _randomize(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and ("bias" in name or "norm" in name.lower()):
                parameter.add_(0.2 * torch.randn_like(parameter))
        weight = model.get_output_embeddings().weight if model.get_output_embeddings() is not None else None
        if weight is not None:
            weight.mul_(5.0)


def try_class(model_type: str, name: str) -> Outcome:
    """Builds one class and compares; never raises."""
    try:
        model = tiny_causal_lm(model_type)
    except LookupError as error:
        return Outcome(model_type, name, "not built", str(error))
    try:
        verify_head(model)
        ids = torch.randint(3, VOCABULARY, (2, 9))
        with torch.no_grad():
            own = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
            ours = project(head_of(model), view_of(model).hidden_states(ids, torch.ones_like(ids)))
        error = ((own - ours).abs().max() / own.abs().max()).item()
        if error > 1e-4:
            return Outcome(model_type, name, "crashed", f"differs by {error:.1e}, and was not refused")
        return Outcome(model_type, name, "equal", "", "backbone" if view_of(model)._enters else "head input")
    except ValueError as error:
        return Outcome(model_type, name, "refused", str(error))
    except Exception as error:
        return Outcome(model_type, name, "crashed", f"{type(error).__name__}: {error}")


def rows_of_table(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The rows of the page's table by the first cell: every model type of a kind, and for the rest why."""
    import transformers

    version = transformers.__version__
    equal = {path: [o.model_type for o in outcomes if o.path == path] for path in ("backbone", "head input")}
    rows = {
        f"equal, of the backbone's output (transformers {version})": equal["backbone"],
        "equal, of what enters the head": equal["head input"],
    }
    for result in ("refused", "not built", "crashed"):
        rows[result] = [f"{o.model_type} ({_in_short(o.reason)})" for o in outcomes if o.result == result]
    return {f"{what}: {len(found)}": ", ".join(found) for what, found in rows.items() if found}


def _in_short(reason: str) -> str:
    for part, words in _REASONS.items():
        if part in reason:
            return words
    return reason.replace("|", "/")


def write_table(outcomes: Sequence[Outcome]) -> None:
    """Replaces the generated part of the page."""
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    after = rest.partition(_END)[2]
    table = [f"| {what} | {classes} |\n" for what, classes in rows_of_table(outcomes).items()]
    PAGE.write_text("".join([before, _BEGIN, "| result | model types |\n|---|---|\n", *table, _END, after]))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Tiny random models make transformers warn about everything."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("types", nargs="*", help="model types; all when left out")
    parser.add_argument("--save", action="store_true", help="write the table of docs/models.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    outcomes = []
    with quietly():
        for model_type, name in causal_lms():
            if not options.types or model_type in options.types:
                outcomes.append(try_class(model_type, name))
                found = outcomes[-1]
                print(
                    f"{found.model_type:34} {found.name:40} {found.result:10} {found.path} {found.reason}"[:260],
                    flush=True,
                )
    if options.save:
        write_table(outcomes)
    print({r: sum(o.result == r for o in outcomes) for r in ("equal", "refused", "crashed", "not built")})


if __name__ == "__main__":
    main()
