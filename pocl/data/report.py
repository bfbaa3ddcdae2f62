"""What became of the examples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataReport:
    """What `tokenize` did with the examples; every count is in samples unless it says tokens."""

    num_examples: int
    """Examples that came in."""
    num_samples: int
    """Samples that went out."""
    empty_prompts: int
    """Dropped: the prompt had no text."""
    empty_responses: int
    """Dropped: the response had no text."""
    cut_prompts: int
    """Kept, but the prompt lost tokens on its left."""
    cut_responses: int
    """Kept, but the response alone did not fit and lost tokens on its right."""
    prompt_tokens: int
    """Tokens without a label."""
    response_tokens: int
    """Tokens with a label."""
    special_as_text: int = 0
    """Their text writes special tokens, which stay text."""
    added_ends: int = 0
    """The chat template closes no turn: the tokenizer's EOS was put behind the answer."""
    dropped_thoughts: int = 0
    """The chat template leaves the thought before the answer out."""
    unwritten_tools: int = 0
    """They have tools, and the chat template does not write them."""

    def __str__(self) -> str:
        parts = [f"{self.num_samples} of {self.num_examples} samples kept"]
        dropped = [(self.empty_prompts, "empty prompt"), (self.empty_responses, "empty response")]
        parts += [f"{count} dropped ({reason})" for count, reason in dropped if count]
        parts += [f"{self.cut_prompts} prompts cut from the left"] if self.cut_prompts else []
        parts += [f"{self.cut_responses} responses cut from the right"] if self.cut_responses else []
        notes = [
            (self.special_as_text, "write special tokens, which stay text"),
            (self.added_ends, "end with the tokenizer's EOS, for the chat template closes no turn"),
            (self.dropped_thoughts, "lose their last thought to the chat template"),
            (self.unwritten_tools, "have tools, which the chat template does not write"),
        ]
        parts += [f"{count} {note}" for count, note in notes if count]
        parts += [f"{self.prompt_tokens} prompt tokens, {self.response_tokens} response tokens"]
        return "; ".join(parts)
