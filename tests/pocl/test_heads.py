"""Heads and hidden states of Hugging Face models: together they are the model's own logits."""

from typing import Any

import pytest
import torch

from pocl import heads
from pocl.models import check_no_further_token, further_tokens

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_SIZES = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama-tied": ("llama", SIZES | {"tie_word_embeddings": True}),
    "llama-untied": ("llama", SIZES | {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", SIZES),
    "mistral": ("mistral", SIZES),
    "gemma2-softcap": ("gemma2", SIZES | {"final_logit_softcapping": 0.5}),
    "gemma3-softcap": ("gemma3_text", SIZES | {"final_logit_softcapping": 0.5}),
    "cohere-scale": ("cohere", SIZES | {"logit_scale": 0.25}),
    "cohere2-scale": ("cohere2", SIZES | {"logit_scale": 0.25}),
    "granite-scale": ("granite", SIZES | {"logits_scaling": 8.0}),
    "phi-bias": ("phi", SIZES | {"num_key_value_heads": 4}),
    "phi3": ("phi3", SIZES),
    "gptj-bias": ("gptj", GPT_SIZES | {"rotary_dim": 8, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", GPT_SIZES),
    "gpt_neox": ("gpt_neox", SIZES),
    "opt": (
        "opt",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "pad_token_id": 1,
        },
    ),
    "falcon_h1-scale": (
        "falcon_h1",
        SIZES
        | {
            "lm_head_multiplier": 0.5,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
}


# PEFT 0.21 asks models for a property by the name it had before transformers 5.20.
PEFT_ASKS_OLD_NAME = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def tiny(family: str, **further: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model_type, fields = FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, **fields | further)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # zero biases and tiny weights would hide a forgotten term
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_hidden_states_is_the_models_own_logits(family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    input_ids = torch.randint(3, 96, (2, 7))
    mask = torch.ones_like(input_ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        own = model(input_ids=input_ids, attention_mask=mask).logits
        ours = heads.project(heads.head_of(model), heads.hidden_states(model, input_ids, mask))
    torch.testing.assert_close(ours[mask.bool()], own.float()[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2-softcap", "cohere-scale", "granite-scale", "falcon_h1-scale", "gptj-bias"])
def test_the_head_carries_what_the_family_adds(family: str) -> None:
    head = heads.head_of(tiny(family))
    plain = (head.scale, head.softcap, head.bias) == (1.0, None, None)
    assert not plain


def test_a_family_whose_logits_we_do_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    heads.verify_head(tiny("granite-scale"))
    monkeypatch.setattr("pocl.models.head._SCALE_FIELDS", ())
    with pytest.raises(ValueError, match="GraniteForCausalLM"):
        heads.verify_head(tiny("granite-scale"))


def test_head_shares_the_models_parameters_so_gradients_arrive() -> None:
    model = tiny("llama-tied")
    assert heads.head_of(model).weight is model.get_input_embeddings().weight


@PEFT_ASKS_OLD_NAME
def test_adapters_on_the_body_and_on_the_head_are_looked_through() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama-untied")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    input_ids = torch.randint(3, 96, (2, 7))
    own = adapted(input_ids=input_ids).logits
    ours = heads.project(heads.head_of(adapted), heads.hidden_states(adapted, input_ids))
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_" in n)


@PEFT_ASKS_OLD_NAME
def test_a_fully_trained_head_beside_adapters_is_used() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama-untied")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trainable = [p for n, p in adapted.named_parameters() if "lm_head" in n and p.requires_grad]
    assert heads.head_of(adapted).weight is trainable[0]


def test_shifted_labels_align_each_position_with_its_next_token() -> None:
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, 8, -100]])
    expected = torch.tensor([[-100, 5, 6, -100], [7, 8, -100, -100]])
    assert torch.equal(heads.shifted_labels(labels), expected)


def test_vocabularies_may_differ_by_padding_only() -> None:
    assert heads.check_vocabularies(151936, 152064) == 151936
    with pytest.raises(ValueError, match="50257"):
        heads.check_vocabularies(50257, 151936)
    assert heads.check_vocabularies({"a": 0, "b": 1}, {"a": 0, "b": 1}) == 2
    with pytest.raises(ValueError, match="'b': 1 and 2"):
        heads.check_vocabularies({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2, "c": 1})


def test_the_student_may_have_tokens_that_mean_nothing_to_the_teacher() -> None:
    teacher = {"a": 0, "b": 1}
    assert heads.check_vocabularies({**teacher, "new": 2}, teacher) == 2
    assert further_tokens({**teacher, "new": 2}, teacher) == {2: "new"}
    with pytest.raises(ValueError, match="'new': 1 and None"):  # an id that is another token there
        heads.check_vocabularies({"a": 0, "new": 1}, teacher)
    with pytest.raises(ValueError, match="could never learn to say them"):
        heads.check_vocabularies(teacher, {**teacher, "new": 2})
    check_no_further_token([{"sample_id": 4, "input_ids": [0, 1]}], {2: "new"})
    with pytest.raises(ValueError, match=r"sample 4 has the token 'new' \(id 2\)"):
        check_no_further_token([{"sample_id": 4, "input_ids": [0, 2]}], {2: "new"})


def test_an_encoder_decoder_and_a_headless_model_are_refused() -> None:
    headless = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("llama", **SIZES))
    with pytest.raises(ValueError, match="LlamaModel"):
        heads.backbone_of(headless)
    with pytest.raises(ValueError, match="LlamaModel"):
        heads.head_of(headless)
