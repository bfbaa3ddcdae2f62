"""All causal language models of transformers, built tiny: their logits are the head of their hidden states."""

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.causal_lms import PAGE, Outcome, causal_lms, quietly, tiny_causal_lm, try_class
from pocl import heads
from pocl.models import head_of, project, view_of

# Why a class is not equal, in the words it is refused with or that its configuration fails with. A class that is not in
# this list must be equal.
REFUSED = {
    "cpmant": "sees the tokens that it is to predict",
    "prophetnet": "predict one token at a position",
    "xlnet": "sees the tokens that it is to predict",
}
NOT_BUILT = {
    "blt": "parameters",  # its patcher's tables are no sizes of the configuration
    "cohere_compass_text": "KeyError",
    "dots3_note": "num_key_value_heads",
    "gemma3n": "timm",
    "gemma4_assistant": "hidden_size_per_layer_input",
    "gemma4_unified": "parameters",
    "gemma4_unified_assistant": "layer types",
    "musicgen": "dropout",
    "musicgen_melody": "dropout",
    "phi4_multimodal": "parameters",
    "zamba": "tie_weights_keys",
}
CHUNKS = 12


def is_on_the_page(outcome: Outcome) -> bool:
    """Whether docs/models.md lists it under what came of it."""
    words = {"backbone": "| equal, of the backbone", "head input": "| equal, of what enters"}
    kind = words.get(outcome.path, f"| {outcome.result}:")
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(kind))
    return outcome.model_type in {item.split(" (")[0] for item in row.split("|")[2].strip().split(", ")}


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_class_that_can_be_built_is_equal_or_refused_in_words(chunk: int) -> None:
    found = []
    with quietly():
        for model_type, name in causal_lms()[chunk::CHUNKS]:
            outcome = try_class(model_type, name)
            reasons = {"refused": REFUSED, "not built": NOT_BUILT}.get(outcome.result, {})
            if outcome.result != "equal" and reasons.get(model_type, "no reason known") not in outcome.reason:
                found.append(outcome)
            assert is_on_the_page(outcome), f"python -m benchmarks.causal_lms --save: {outcome}"
    assert found == []


@pytest.mark.parametrize("model_type", ["bert", "modernbert-decoder", "minicpm3", "rembert", "llama", "cohere2"])
def test_gradients_are_those_of_the_whole_models_logits(model_type: str) -> None:
    with quietly():
        model = tiny_causal_lm(model_type)
    input_ids = torch.randint(3, 90, (2, 7))
    own = model(input_ids=input_ids).logits
    weights = torch.randn_like(own)
    (own * weights).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for again in range(2):  # what the first pass finds out, later ones use
        model.zero_grad()
        ours = project(head_of(model), heads.hidden_states(model, input_ids))
        (ours * weights).sum().backward()
        for name, gradient in expected.items():
            error = (dict(model.named_parameters())[name].grad - gradient).norm()
            assert error <= 1e-4 * gradient.norm() + 1e-5, (name, again)


def test_the_head_is_not_run_on_the_way_to_the_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    for model_type, enters in (("bert", False), ("llama", True)):
        with quietly():
            model = tiny_causal_lm(model_type)
        calls: list[int] = []
        model.get_output_embeddings().register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for _ in range(2):
            heads.hidden_states(model, torch.randint(3, 90, (1, 5)))
        assert calls == []
        assert view_of(model)._enters is enters
