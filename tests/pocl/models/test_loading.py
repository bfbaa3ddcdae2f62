"""A folder with a PEFT adapter stands for the model that it makes of its base, as teacher, as student and to be cut."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pocl.embedded import cut_layers
from pocl.models import adapter_base, load_causal_lm, load_tokenizer
from pocl.pipeline.context import Context, source_fingerprint
from pocl.pipeline.prepare import prepare_data, prepare_models
from pocl.recipe import build_recipe

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
IDS = torch.arange(3, 12).unsqueeze(0)


@pytest.fixture
def base(make_tiny_folder: Callable[..., Path]) -> Path:
    return make_tiny_folder(seed=1, hidden_size=48, num_layers=3, tie_word_embeddings=False)


def adapted(base: Path, **options: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(load_causal_lm(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    adapted(base).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("trained", [False, True])
def test_an_adapter_folder_is_the_adapted_model(base: Path, adapter: Path, trained: bool) -> None:
    model = load_causal_lm(adapter, trained=trained)
    torch.manual_seed(0)
    expected = peft.PeftModel.from_pretrained(load_causal_lm(base), str(adapter))
    assert not torch.equal(expected(IDS).logits, load_causal_lm(base)(IDS).logits)
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in names) is trained
    assert hasattr(model, "peft_config") is trained
    assert adapter_base(adapter) == str(base)
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(base).get_vocab()


def test_a_base_may_lie_beside_the_adapter(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(base, adapter.parent / "base")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "../base"}))
    assert load_causal_lm(adapter)(IDS).logits.shape == (1, 9, 1000)


def test_tokens_added_with_an_adapter_find_their_rows(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<new>", "<newer>"])
    grown = load_causal_lm(base)
    grown.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    model = peft.get_peft_model(grown, config).eval()
    model.save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    torch.testing.assert_close(load_causal_lm(tmp_path / "grown")(IDS).logits, model(IDS).logits)


def test_the_fingerprint_of_an_adapter_follows_its_base(base: Path, adapter: Path) -> None:
    before = source_fingerprint(str(adapter))
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.125}))
    assert source_fingerprint(str(adapter)) != before


def test_layers_are_cut_from_the_merged_weights(base: Path, adapter: Path) -> None:
    apart = load_causal_lm(adapter, trained=True)
    whole = cut_layers(apart, 3)
    torch.testing.assert_close(whole(IDS).logits, apart(IDS).logits)
    assert not hasattr(whole, "peft_config")
    assert "lm_head.lora_A.default.weight" in dict(apart.base_model.model.named_parameters())


@pytest.mark.parametrize("student", ["cut", "adapter"])
def test_a_recipe_takes_adapter_folders(
    student: str, base: Path, adapter: Path, tmp_path: Path, make_tiny_folder: Callable[..., Path]
) -> None:
    values: dict[str, Any] = {"teacher": str(adapter), "student": {"cut": 2}, "output": str(tmp_path)}
    if student == "adapter":
        adapted(make_tiny_folder(tie_word_embeddings=False)).save_pretrained(tmp_path / "student")
        values["student"] = str(tmp_path / "student")
    context = Context(build_recipe(values), tmp_path, Console(quiet=True))
    sizes = prepare_models(context)["parameters"]
    assert sizes["teacher"] == sum(p.numel() for p in load_causal_lm(base).parameters())
    trained = context.load_student(context.student_source(), trained=True)
    assert hasattr(trained, "peft_config") is (student == "adapter")
    assert not hasattr(context.load_student(context.student_source()), "peft_config")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "pickled weights are not read"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is no JSON object"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "does not name its base model"),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/not/here"}'),
            "there is no such folder",
        ),
    ],
)
def test_a_broken_adapter_folder_says_what_is_wrong(adapter: Path, change: Callable[[Path], Any], words: str) -> None:
    change(adapter)
    with pytest.raises(ValueError, match=words):
        load_causal_lm(adapter)


def test_a_prompt_tuned_teacher_is_refused(base: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(load_causal_lm(base), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="prompt_tuning"):
        load_causal_lm(tmp_path / "prompt")


# ----------------------------------------------------------------------------------------- tokens of the student alone


def context_with_further_token(
    make_tiny_folder: Callable[..., Path], teacher: Path, tmp_path: Path, answer: str
) -> Context:
    folder = make_tiny_folder(tie_word_embeddings=False)
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    tokenizer.add_tokens(["<call>"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    rows = [{"prompt": f"w{i}", "completion": f"w{i} w2"} for i in range(12)]
    rows[7]["completion"] = answer
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(tmp_path / "rows.jsonl"), "num_validation": 2, "num_test": 0}
    values = {"teacher": str(teacher), "student": str(tmp_path / "student"), "data": data, "output": str(tmp_path)}
    return Context(build_recipe(values | {"curriculum": {"num_stages": 2}}), tmp_path, Console(quiet=True))


def test_the_student_may_have_tokens_that_no_sample_uses(
    make_tiny_folder: Callable[..., Path], tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    context = context_with_further_token(make_tiny_folder, tiny_teacher_folder, tmp_path, "w7 w2")
    context.summaries["models"] = prepare_models(context)
    prepare_data(context)


def test_a_sample_that_uses_one_is_named(
    make_tiny_folder: Callable[..., Path], tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    context = context_with_further_token(make_tiny_folder, tiny_teacher_folder, tmp_path, "w7 <call>")
    context.summaries["models"] = prepare_models(context)
    with pytest.raises(ValueError, match=r"sample 7 has the token '<call>' \(id 1000\)"):
        prepare_data(context)
