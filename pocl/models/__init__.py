"""What there is to know of a Hugging Face causal language model, in one place.

    view = view_of(model)
    logits = project(view.head(), view.hidden_states(ids))        # exactly the model's own logits

`view_of(model)` is made once and asked by ranking, generation, evaluation, teachers and the trainer. `docs/models.md`
says which models work.
"""

from pocl.models.head import head_of, project
from pocl.models.hidden import backbone_of
from pocl.models.loading import adapter_base, load_causal_lm, load_tokenizer, with_merged_adapters
from pocl.models.verify import is_out_of_order, separates_packed_rows, tolerance_of, verify_head
from pocl.models.view import LanguageModel, view_of
from pocl.models.vocabulary import check_no_further_token, check_vocabularies, further_tokens
from pocl.models.wrappers import in_evaluation_mode, text_config, unwrapped

__all__ = [
    "LanguageModel",
    "adapter_base",
    "backbone_of",
    "check_no_further_token",
    "check_vocabularies",
    "further_tokens",
    "head_of",
    "in_evaluation_mode",
    "is_out_of_order",
    "load_causal_lm",
    "load_tokenizer",
    "project",
    "separates_packed_rows",
    "text_config",
    "tolerance_of",
    "unwrapped",
    "verify_head",
    "view_of",
    "with_merged_adapters",
]
