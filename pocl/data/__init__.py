"""Prompt/response data: reading it, putting it through a template, cutting it to length, batching it.

`docs/data.md` lists the forms of rows: conversations, prompts with completions, Alpaca's columns, texts. Whatever came
in, `load_examples` gives columns `id`, `prompt`, `response` and `conversation` (see `Conversation`), and
`tokenize` gives `sample_id`, `input_ids`, `labels`, `prompt_length`. Only response tokens carry labels.
"""

from pocl.data.batching import Collator
from pocl.data.conversation import Conversation, conversation_of, text_of_turn
from pocl.data.encoding import (
    IGNORE_INDEX,
    TEMPLATES,
    DataReport,
    Encoder,
    check_columns,
    render_prompt,
    resolve_template,
    tokenize,
)
from pocl.data.reading import load_examples

__all__ = [
    "IGNORE_INDEX",
    "TEMPLATES",
    "Collator",
    "Conversation",
    "DataReport",
    "Encoder",
    "check_columns",
    "conversation_of",
    "load_examples",
    "render_prompt",
    "resolve_template",
    "text_of_turn",
    "tokenize",
]
