"""A row is the template's own text, whatever the template and the conversation; what cannot be is refused in words."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

from pocl.data import Conversation, load_examples, render_prompt
from pocl.data.encoder import IGNORE_INDEX, Encoder
from pocl.data.templates import answer_ends
from tests.pocl.data.chat_templates import FAMILIES, tokenizer_of

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": {"city": "string"}},
}


def _turns(*said: str | tuple[str, str]) -> list[dict[str, Any]]:
    """Turns from words; a letter names the role."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[text[0]], "content": text[2:]} for text in said]


def _call(*names: str, content: str | None = None) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": name, "arguments": {"city": "Rome"}}} for name in names]
    return {"role": "assistant", "content": content, "tool_calls": calls}


THINK = "<think>\nHm.\nTwo and two.\n</think>\n\n"
TALKS: dict[str, Conversation] = {
    "one question": Conversation(tuple(_turns("u:What is the time?", "a:Noon."))),
    "with a system turn": Conversation(tuple(_turns("s:Be brief.", "u:What is the time?", "a:Noon."))),
    "several turns": Conversation(tuple(_turns("u:Hi", "a:Hello!", "u:2 + 2?", "a:4", "u:Sure?", "a:Yes."))),
    "white space everywhere": Conversation(
        tuple(_turns("u:  \n\nHi \n", "a:\n\n  Hello  the\n", "u:\tnext\n\n", "a:\n x\n\n"))
    ),
    "letters of all kinds": Conversation(
        tuple(_turns("s:日本", "u:Grüße 🙂🙃 עברית", "a:e\u0301 🙂", "u:\u00a0", "a:🙂"))
    ),
    "thoughts in the text": Conversation(tuple(_turns("u:2 + 2?", f"a:{THINK}4", "u:Sure?", f"a:{THINK}Yes."))),
    "thoughts of their own": Conversation(
        (*_turns("u:2 + 2?"), {"role": "assistant", "content": "4", "reasoning_content": "Hm.\nTwo."})
    ),
    "no thinking": Conversation(tuple(_turns("u:Hi", "a:Hello!")), template_kwargs={"enable_thinking": False}),
    "tools": Conversation(
        (*_turns("u:Rain in Rome?"), _call("weather"), *_turns("t:22 C", "a:No.", "u:Thanks", "a:Welcome.")), [TOOL]
    ),
    "a call as the answer": Conversation((*_turns("s:Call.", "u:Rain?"), _call("weather")), [TOOL]),
    "two calls at once": Conversation(
        (*_turns("u:Rain?"), _call("weather", "news"), *_turns("t:22", "t:none", "a:No."))
    ),
    "empty tools": Conversation(tuple(_turns("u:Hi", "a:Hello!")), []),
    "an answer first": Conversation(tuple(_turns("a:Welcome!", "u:Hi", "a:Hello!"))),
    "two answers in a row": Conversation(tuple(_turns("u:Hi", "a:Hello!", "a:How are you?"))),
    "two questions in a row": Conversation(tuple(_turns("u:Hi", "u:Well?", "a:Hello!"))),
    "two system turns": Conversation(tuple(_turns("s:Be brief.", "s:Be kind.", "u:Hi", "a:Hello!"))),
    "a thought left open": Conversation(tuple(_turns("u:Hi", "a:<think>Hm", "u:So?", "a:</think>Hello!"))),
    "the same again": Conversation(tuple(_turns("u:Hi", "a:Hi", "u:Hi", "a:Hi", "u:Hi", "a:Hi"))),
}


def _example(talk: Conversation, sample_id: int = 7) -> dict[str, Any]:
    *before, last = talk.turns
    text = last["content"] or "a call"
    return {
        "id": sample_id,
        "prompt": "".join(t["content"] or "" for t in before),
        "response": text,
        "conversation": talk.to_json(),
    }


def _whole(
    tokenizer: Any, talk: Conversation, turns: int | None = None, *, prompt: bool = False
) -> tuple[str, list[int]] | None:
    """What the library of the template makes of a conversation: text and ids, None if it refuses."""
    options = {"tools": talk.tools, "add_generation_prompt": prompt, **talk.template_kwargs}
    turns_of = [dict(turn) for turn in talk.turns[:turns]]
    try:
        text = tokenizer.apply_chat_template(turns_of, tokenize=False, **options)
    except Exception:
        return None
    return text, tokenizer.apply_chat_template(turns_of, return_dict=False, **options)


@cache
def _encoder(name: str, **options: Any) -> Encoder:
    return Encoder(tokenizer_of(name), "chat", 4096, 2048, **options)


def _encode(encoder: Encoder, talk: Conversation) -> tuple[dict[str, Any] | None, str]:
    """The row of a conversation, or why there is none."""
    try:
        return encoder(_example(talk)), ""
    except ValueError as error:
        return None, str(error)


def _runs(row: dict[str, Any]) -> list[list[int]]:
    """The labelled runs of a row."""
    runs: list[list[int]] = []
    for i, label in enumerate(row["labels"]):
        if label != IGNORE_INDEX:
            if not i or row["labels"][i - 1] == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(label)
    return runs


REFUSED = r"sample 7\b.*(leave the sample out|leave it out)"


@pytest.mark.parametrize("labels", ["last", "all"])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_the_templates_own_ids(name: str, talk: str, labels: str) -> None:
    tokenizer, family, conversation = tokenizer_of(name), FAMILIES[name], TALKS[talk]
    expected = _whole(tokenizer, conversation)
    opening = _whole(tokenizer, conversation, -1, prompt=True)
    row, error = _encode(_encoder(name, labels=labels), conversation)
    if error:
        assert re.search(REFUSED, error), error
        lost = "leaves out" in error
        assert expected is None or opening is None or lost, "what the template writes in full is not refused"
        return
    assert expected is not None
    assert opening is not None
    assert row is not None
    ids, own_end = list(row["input_ids"]), family.end is None
    if own_end:  # the tokenizer's end stands in for the one that the template does not have
        assert ids.pop() == tokenizer.eos_token_id
    assert ids == expected[1][: len(ids)]
    rest = tokenizer.decode(expected[1][len(ids) :])
    assert rest.strip() in ("", "<|endoftext|>")  # nothing of the turn is left out, and nothing follows it
    ends = [tokenizer.eos_token_id if own_end else tokenizer.convert_tokens_to_ids(family.end)]
    assert row["input_ids"][-1] in ends
    assert {i for i, label in enumerate(row["labels"]) if label not in (IGNORE_INDEX, row["input_ids"][i])} == set()
    _check_prompt(tokenizer, row, expected, opening)
    if labels == "last":
        assert row["labels"] == [IGNORE_INDEX] * row["prompt_length"] + row["input_ids"][row["prompt_length"] :]
    else:
        _check_all(tokenizer, row, conversation, ends)


def _check_prompt(tokenizer: Any, row: dict[str, Any], expected: Any, opening: Any) -> None:
    """The prompt is the generation prompt, but for what the template takes back and tokens across the border."""
    prompt = row["input_ids"][: row["prompt_length"]]
    if expected[0].startswith(opening[0]) and expected[1][: len(opening[1])] == opening[1]:
        assert prompt == opening[1]
    else:
        shared = tokenizer.decode(prompt)
        assert shared == tokenizer.decode(expected[1])[: len(shared)]
        tail = opening[0][opening[0].rfind("<|im_start|>") :]
        assert len(opening[1]) - len(prompt) <= 2 or "<think>" in tail or shared.endswith(tail)


def _check_all(tokenizer: Any, row: dict[str, Any], talk: Conversation, ends: list[int]) -> None:
    """Every answer is labelled, with its end, and nothing of the other turns."""
    runs = _runs(row)
    texts = [tokenizer.decode(run) for run in runs]
    answers = [turn for turn in talk.turns if turn["role"] == "assistant"]
    said = [str(turn["content"] or "weather").rpartition("</think>")[2].strip() for turn in answers]
    if ends[0] in row["input_ids"][:-1]:
        assert all(run[-1] in ends for run in runs)
        assert sum(token in ends for run in runs for token in run) == len(answers)
        texts = [text for joined in texts for text in joined.split(tokenizer.decode(ends))[:-1]]  # neighbours
    assert len(texts) == len(answers)
    for text, words in zip(texts, said, strict=True):
        assert words in text
    others = [str(turn["content"]).strip() for turn in talk.turns if turn["role"] != "assistant"]
    assert not any(other in text for other in others for text in texts if len(other) > 2 and other not in said)


def test_the_matrix_refuses_only_what_templates_refuse_or_lose() -> None:
    """How many cells of the table are equal, so that a template cannot come to refuse everything in silence."""
    rows = [_encode(_encoder(name), talk)[0] for name in FAMILIES for talk in TALKS.values()]
    assert sum(row is not None for row in rows) == 261


def test_answers_end_by_the_tokenizers_eos_and_by_the_templates_own_token() -> None:
    for name, family in FAMILIES.items():
        tokenizer = tokenizer_of(name)
        ends = {tokenizer.eos_token, family.end} - {None}
        assert {tokenizer.convert_ids_to_tokens(i) for i in answer_ends(tokenizer)} == ends


def test_a_template_that_opens_a_thought_and_takes_it_back_is_followed() -> None:
    tokenizer = tokenizer_of("deepseek-r1")
    encoder = Encoder(tokenizer, "chat", 512, 256)
    row = encoder(_example(TALKS["thoughts in the text"]))
    assert row is not None
    assert tokenizer.decode(row["input_ids"][row["prompt_length"] :]) == "Yes.<|end_of_sentence|>"
    assert tokenizer.decode(row["input_ids"][: row["prompt_length"]]).endswith("<|Assistant|>")
    assert encoder.report(1, 1).dropped_thoughts == 1
    assert "1 lose their last thought to the chat template" in str(encoder.report(1, 1))
    thinking = _encoder("qwen-3-thinking")(_example(TALKS["thoughts in the text"]))
    assert thinking is not None
    said = tokenizer_of("qwen-3-thinking").decode(thinking["input_ids"][thinking["prompt_length"] :])
    assert said == "Hm.\nTwo and two.\n</think>\n\nYes.<|im_end|>"


def test_an_empty_thought_that_the_template_writes_is_learnt_with_the_answer() -> None:
    row = _encoder("qwen-3")(_example(TALKS["two answers in a row"]))
    assert row is not None
    said = tokenizer_of("qwen-3").decode(row["input_ids"][row["prompt_length"] :])
    assert said == "<think>\n\n</think>\n\nHow are you?<|im_end|>"


def test_a_turn_that_another_token_closes_ends_there() -> None:
    tokenizer = tokenizer_of("llama-3")
    talk = Conversation(TALKS["tools"].turns, [TOOL], {"builtin_tools": True})
    row = _encoder("llama-3", labels="all")(_example(talk))
    assert row is not None
    texts = [tokenizer.decode(run) for run in _runs(row)]
    assert texts[0] == '{"name": "weather", "parameters": {"city": "Rome"}}<|eom_id|>'
    assert texts[1:] == ["No.<|eot_id|>", "Welcome.<|eot_id|>"]


def test_arguments_reach_the_template_from_the_recipe_and_a_rows_own_come_first() -> None:
    tokenizer = tokenizer_of("qwen-3")
    encoder = Encoder(
        tokenizer, "chat", 512, 256, template_kwargs={"default_system": "Be kind.", "enable_thinking": True}
    )
    plain, own = (encoder(_example(TALKS[talk])) for talk in ("one question", "no thinking"))
    assert plain is not None
    assert own is not None
    assert tokenizer.decode(plain["input_ids"]).startswith("<|im_start|>system\nBe kind.<|im_end|>")
    prompts = [tokenizer.decode(row["input_ids"][: row["prompt_length"]]) for row in (plain, own)]
    assert prompts[0].endswith("<|im_start|>assistant\n")
    assert prompts[1].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(ValueError, match="template_kwargs holds tokenize, tools, which the library sets itself"):
        Encoder(tokenizer, "chat", 512, 256, template_kwargs={"tools": [], "tokenize": True})


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_marked_as_one_to_pass_over_has_no_labels(name: str) -> None:
    turns = _turns("u:Hi", "a:Hello!", "u:2 + 2?", "a:5", "u:Sure?", "a:No, 4.")
    marked = [{**turn, "train": False} if turn["content"] == "5" else turn for turn in turns]
    row, plain = (_encode(_encoder(name, labels="all"), Conversation(tuple(some)))[0] for some in (marked, turns))
    assert row is not None
    assert plain is not None
    assert row["input_ids"] == plain["input_ids"]
    first, second, third = _runs(plain)
    assert _runs(row) == [first, third]
    assert "5" in tokenizer_of(name).decode(second)


def test_tools_that_a_template_does_not_write_are_counted() -> None:
    encoder = Encoder(tokenizer_of("chatml"), "chat", 512, 256)
    assert encoder(_example(Conversation(TALKS["one question"].turns, [TOOL]))) is not None
    assert "1 have tools, which the chat template does not write" in str(encoder.report(1, 1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma", r"refuses sample 7 \(roles system, user, assistant\): System role not supported; "),
        ("command-r", r"sample 7: the chat template leaves out tool calls \(weather\)"),
        ("chatml", r"cannot render sample 7 .*the template writes no tool calls: use a model whose template does"),
    ],
)
def test_a_refusal_names_the_sample_among_others_and_says_what_to_do(name: str, message: str) -> None:
    good = _example(TALKS["one question"], 6)
    with pytest.raises(ValueError, match=message):
        _encoder(name).encode_batch([good, _example(TALKS["a call as the answer"]), good])


# ------------------------------------------------------------------------------------------------- the other templates


def test_a_conversation_has_a_form_in_alpacas_text_and_in_none_at_all() -> None:
    turns = _turns("s:Be brief.", "u:Hi", "a:Hello!", "u:2 + 2?", "a:4")
    row = load_examples([{"messages": turns}])[0]
    tokenizer = tokenizer_of("chatml")
    assert render_prompt(row, tokenizer, "alpaca") == (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!\n\n### Instruction:\n2 + 2?\n\n### Response:\n"
    )
    assert render_prompt(row, tokenizer, "plain") == "Be brief.\n\nHi\n\nHello!\n\n2 + 2?"
    for template in ("alpaca", "plain"):
        encoder = Encoder(tokenizer, template, 512, 256, labels="all")
        with pytest.raises(ValueError, match=r"sample 0 has several answers, .* closes none but the last"):
            encoder({**row})
        with pytest.raises(ValueError, match=r"sample 7 has role tool, tools, tool calls, which template='\w+' cannot"):
            Encoder(tokenizer, template, 512, 256)(_example(TALKS["tools"]))
