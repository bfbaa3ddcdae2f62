"""The forms of rows: what each makes of its columns, what it refuses, and that equal conversations come out equal."""

import json
from typing import Any

import pytest
from datasets import Dataset

from pocl.data import Conversation, conversation_of, load_examples

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
CALL = {"name": "look_up", "arguments": {"city": "Rome"}}
WRAPPED = {"type": "function", "function": CALL}
SCHEMA = {"name": "look_up", "parameters": {"type": "object"}}


def read(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = load_examples([row])[0]
    return found


def turns(row: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(turn["role"], turn["content"]) for turn in conversation_of(read(row)).turns]


HISTORY = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "hi"), ("assistant", "yo")]
IN_ROLES = [{"role": role, "content": text} for role, text in HISTORY]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
IN_VALUES = [{"from": NAMES[role], "value": text} for role, text in HISTORY]
SAME_CONVERSATION: dict[str, dict[str, Any]] = {
    "messages": {"messages": IN_ROLES},
    "conversations": {"conversations": IN_ROLES},
    "sharegpt": {"conversations": IN_VALUES},
    "sharegpt under messages": {"messages": IN_VALUES},
    "sharegpt with a system column": {"conversations": IN_VALUES[1:], "system": "Be brief."},
    "role and value": {"conversations": [{"role": role, "value": text} for role, text in HISTORY]},
    "human and gpt as roles": {"messages": [{"role": NAMES[role], "content": text} for role, text in HISTORY]},
    "JSON text": {"messages": json.dumps(IN_ROLES)},
    "JSON text of sharegpt": {"conversations": json.dumps(IN_VALUES)},
    "content as parts": {
        "messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in HISTORY]
    },
    "content as several parts": {
        "messages": [
            {"role": role, "content": [{"type": "text", "text": letter} for letter in text]}
            for role, text in HISTORY
        ]
    },
    "system beside messages": {"messages": IN_ROLES[1:], "system": "Be brief."},
    "system of parts": {"messages": IN_ROLES[1:], "system": [{"type": "text", "text": "Be brief."}]},
    "the same system text twice": {"messages": IN_ROLES, "system": "Be brief."},
    "prompt and completion of turns": {"prompt": IN_ROLES[:-1], "completion": IN_ROLES[-1:]},
    "completion as one turn": {"prompt": IN_ROLES[:-1], "completion": IN_ROLES[-1]},
    "prompt of turns, completion a text": {"prompt": IN_ROLES[:-1], "completion": "yo"},
    "prompt of turns as JSON text": {"prompt": json.dumps(IN_ROLES[:-1]), "completion": json.dumps(IN_ROLES[-1:])},
    "prompt of turns beside system": {"prompt": IN_ROLES[1:-1], "completion": "yo", "system": "Be brief."},
    "Alpaca with history": {
        "instruction": "hi", "input": "", "output": "yo", "system": "Be brief.", "history": [["a", "b"]]
    },
    "Alpaca with history as JSON text": {
        "instruction": "hi", "output": "yo", "system_prompt": "Be brief.", "history": '[["a", "b"]]'
    },
    "Alpaca with history of turns": {
        "instruction": "hi", "output": "yo", "system": "Be brief.", "history": IN_ROLES[1:3]
    },
    "trailing turns": {"messages": [*IN_ROLES, USER, {"role": "tool", "content": "x"}]},
    "an answer not to be learned": {"messages": [*IN_ROLES, USER, ANSWER | {"weight": 0}]},
    "an example again": {"conversation": Conversation(tuple(IN_ROLES)).to_json()},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME_CONVERSATION)
def test_every_form_of_one_conversation_gives_the_same_turns(name: str) -> None:
    row = SAME_CONVERSATION[name]
    assert [turn[:2] for turn in turns(row)] == HISTORY
    found = read(row)
    assert (found["prompt"], found["response"]) == ("Be brief.\n\na\n\nb\n\nhi", "yo")
    assert load_examples(Dataset.from_list([row])).to_list() == [found]


PLAIN: dict[str, dict[str, Any]] = {
    "prompt and completion": {"prompt": "hi", "completion": "yo"},
    "prompt and response": {"prompt": "hi", "response": "yo"},
    "instruction and output": {"instruction": "hi", "input": "", "output": "yo"},
    "instruction and response": {"instruction": "hi", "input": None, "response": "yo"},
    "two turns": {"messages": [USER, ANSWER]},
    "nulls of another form": {"prompt": "hi", "completion": "yo", "messages": None, "text": None, "instruction": None},
    "nothing beside": {"prompt": "hi", "completion": "yo", "system": "", "history": [], "images": [], "tools": None},
    "a completion of one turn": {"prompt": "hi", "completion": [ANSWER]},
    "a prompt of one turn": {"prompt": USER, "completion": "yo"},
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_question_and_an_answer_need_no_conversation_of_their_own(name: str) -> None:
    found = read(PLAIN[name])
    assert (found["prompt"], found["response"], found["conversation"]) == ("hi", "yo", None)
    assert turns(PLAIN[name]) == [("user", "hi"), ("assistant", "yo")]


def test_alpaca_rows_keep_instruction_and_input_apart() -> None:
    for context in ("input", "context"):
        found = read({"instruction": "Add.", context: "1 2", "output": "3", "category": "x"})
        assert [found[name] for name in ("prompt", "instruction", "input")] == ["Add.\n\n1 2", "Add.", "1 2"]
    assert read({"instruction": "Add.", "output": "3"})["input"] == ""


def test_a_table_of_examples_is_read_as_the_same_examples() -> None:
    rows = [*SAME_CONVERSATION.values(), *PLAIN.values(), {"instruction": "a", "input": "b", "output": "c"}]
    table = load_examples([*rows, {"messages": [USER, {"role": "assistant", "tool_calls": [WRAPPED]}], "tools": []}])
    assert load_examples(table).to_list() == table.to_list()
    assert load_examples(table.to_list()).to_list() == table.to_list()


def test_rows_of_mixed_forms_are_each_read_by_their_own() -> None:
    rows = [*SAME_CONVERSATION.values(), *PLAIN.values()]
    assert [row["response"] for row in load_examples(rows)] == ["yo"] * len(rows)
    mixed = [{"prompt": "a", "completion": "b"}, {"messages": [USER, ANSWER]}, {"instruction": "c", "output": "d"}, {}]
    whole = load_examples(mixed).to_list()
    assert [(row["prompt"], row["response"]) for row in whole] == [("a", "b"), ("hi", "yo"), ("c", "d"), ("", "")]
    columns = dict.fromkeys(column for row in mixed for column in row)
    table = Dataset.from_dict({column: [row.get(column) for row in mixed] for column in columns})
    assert load_examples(table).to_list() == whole  # though Arrow gives each row all columns


# -------------------------------------------------------------------------------------------------------------- tools


TOOL_ROWS: dict[str, dict[str, Any]] = {
    "tool_calls": {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [WRAPPED]}]},
    "tool_calls without content": {"messages": [USER, {"role": "assistant", "tool_calls": [WRAPPED]}]},
    "tool_calls as JSON text": {"messages": [USER, {"role": "assistant", "tool_calls": json.dumps([WRAPPED])}]},
    "function_call of OpenAI": {"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL}]},
    "function_call of ShareGPT": {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": json.dumps(CALL)}]
    },
    "completion of a call": {"prompt": "hi", "completion": [{"role": "assistant", "tool_calls": [WRAPPED]}]},
}


@pytest.mark.parametrize("name", TOOL_ROWS)
def test_calls_of_every_form_are_the_same_call_and_the_response_is_never_empty(name: str) -> None:
    found = read(TOOL_ROWS[name])
    answer = conversation_of(found).turns[-1]
    assert answer == {"role": "assistant", "content": None, "tool_calls": [WRAPPED]}
    assert json.loads(found["response"]) == WRAPPED


def test_content_and_calls_and_all_keys_of_a_turn_are_kept() -> None:
    answer = {"role": "assistant", "content": "Looking.", "tool_calls": [WRAPPED, WRAPPED], "reasoning_content": "hm"}
    result = {"role": "tool", "content": [{"type": "text", "text": "22 C"}], "tool_call_id": "1", "name": "look_up"}
    found = read(
        {"messages": [{"role": "developer", "content": "x"}, USER, answer, result, {**answer, "own": {"k": None}}]}
    )
    kept = conversation_of(found).turns
    assert kept[0]["role"] == "developer"
    assert kept[2] == answer
    assert kept[3] == result | {"content": "22 C"}
    assert kept[4] == answer | {"own": {"k": None}}
    assert found["response"] == "\n".join(["Looking.", json.dumps(WRAPPED), json.dumps(WRAPPED)])


def test_observations_and_functions_are_results_of_tools() -> None:
    said = [("human", "hi"), ("function_call", json.dumps(CALL)), ("observation", {"temperature": 22}), ("gpt", "22")]
    row: dict[str, Any] = {"conversations": [{"from": who, "value": value} for who, value in said]}
    assert turns(row)[2:] == [("tool", '{"temperature": 22}'), ("assistant", "22")]
    row = {"messages": [USER, {"role": "function", "name": "f", "content": "1"}, ANSWER]}
    assert conversation_of(read(row)).turns[1] == {"role": "tool", "name": "f", "content": "1"}


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([WRAPPED], [WRAPPED]),
        (json.dumps([WRAPPED]), [WRAPPED]),
        ([json.dumps(WRAPPED)], [WRAPPED]),
        ([SCHEMA], [SCHEMA]),
        ([], []),
        ("", None),
        (None, None),
    ],
)
def test_tools_reach_the_template_as_they_are(tools: Any, expected: Any) -> None:
    assert conversation_of(read({"messages": [USER, ANSWER], "tools": tools})).tools == expected
    assert conversation_of(read({"prompt": "hi", "completion": "yo", "tools": tools})).tools == expected
    assert conversation_of(read({"instruction": "hi", "output": "yo", "tools": tools})).tools == expected


def test_bare_functions_get_the_envelope_that_templates_look_into() -> None:
    wrapped = [{"type": "function", "function": SCHEMA}]
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    assert conversation_of(read({"conversations": sharegpt, "tools": json.dumps([SCHEMA])})).tools == wrapped
    assert conversation_of(read({"messages": [USER, ANSWER], "functions": [SCHEMA]})).tools == wrapped


@pytest.mark.parametrize("as_text", [False, True])
def test_template_arguments_of_a_row_are_kept(as_text: bool) -> None:
    arguments = {"enable_thinking": False, "custom": None, "tools": [WRAPPED]}
    row = {"prompt": "hi", "completion": "yo", "chat_template_kwargs": json.dumps(arguments) if as_text else arguments}
    found = conversation_of(read(row))
    assert (found.template_kwargs, found.tools) == ({"enable_thinking": False}, [WRAPPED])
    assert Conversation.from_json(found.to_json()) == found


# ----------------------------------------------------------------------------------------------------- what is refused


BESIDE = {"prompt": "hi", "completion": "yo"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "`chosen` and `rejected` are two answers .* rename `chosen`"),
    ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "`chosen` and `rejected`"),
    ({"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}, "`chosen` and `rejected`"),
    ({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"}, "rejected": {}},
     "`chosen` and `rejected`"),
    ({"messages": [USER, ANSWER, USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "`chosen` and `rejected`"),
    (BESIDE | {"label": True}, "`label` says which answers are good"),
    ({"instruction": "a", "output": "b", "kto_tag": False}, "`kto_tag` says which answers are good"),
    ({"prompt": "a", "completions": ["b"], "labels": [True]}, "`completions` and `labels` are single steps"),
    ({"input_ids": [1], "labels": [1]}, "`input_ids` holds token ids"),
    ({"segments": [{"label": True, "text": "a"}]}, "`segments` are pieces"),
    (BESIDE | {"images": ["a.png"]}, "`images` holds what is no text"),
    ({"messages": [USER, ANSWER], "audio": "a.wav"}, "`audio` holds what is no text"),
    (BESIDE | {"context": "c"}, "`context` would change the prompt"),
    (BESIDE | {"instruction": "c"}, "`instruction` would change the prompt"),
    (BESIDE | {"history": [["a", "b"]]}, "`history` would change the prompt"),
    ({"messages": [USER, ANSWER], "context": "c"}, "`context` would change the prompt"),
    ({"messages": [USER, ANSWER], "documents": ["c"]}, "`documents` .* inside `chat_template_kwargs`"),
    ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "`input` and `context` both hold text"),
    ({"instruction": "a", "input": "", "output": "b", "reflection": "c", "corrected": "d"}, "`corrected` holds a"),
    ({"messages": IN_ROLES, "system": "Be long."}, "a system turn and another text in `system`"),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": True}}, "must not hold tokenize"),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": ["a"]}, "must be an object"),
    ({"messages": [USER, ANSWER], "tools": "look_up"}, "`tools` is text, and not the JSON of a list of tools"),
    ({"messages": [USER, ANSWER], "tools": [3]}, "`tools` holds a number; a tool is a JSON schema"),
    ({"messages": "hi"}, "`messages` is text, and not the JSON of a list of turns"),
    ({"messages": 3}, "`messages` is a number; it must be a list of turns"),
    ({"messages": ["hi", "yo"]}, "turn 1 of `messages` is text; it must be an object"),
    ({"messages": [USER, {"content": "yo"}]}, r"turn 2 of `messages` has no `role` \(its keys: content\)"),
    ({"messages": [{"role": "user", "text": "hi"}, ANSWER]}, r"turn 1 of `messages` has no `content` \(its keys: role"),
    ({"messages": [USER, {"role": "bot", "content": "yo"}]}, "no turn is the assistant's, and 'bot' may be it"),
    ({"conversations": [{"from": "narrator", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, "is from 'narrator'"),
    ({"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": "look it up"}]},
     "the function call in turn 2 of `conversations` is text"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": ["f"]}]}, "the `tool_calls` of turn 2"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "b"}]}, ANSWER]},
     "the content of turn 1 of `messages` has a part of type 'image'; only text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]}, "'image_url'"),
    ({"prompt": [{"role": "user", "content": [{"type": "input_audio"}]}], "completion": "b"}, "`prompt` has a part"),
    ({"messages": [USER | {"train": True}, ANSWER]}, "marked `train: true`, but its role is 'user'"),
    ({"messages": [USER, ANSWER | {"train_detail": [{"begin_offset": 0}]}]}, "marks parts of itself"),
    ({"instruction": "a", "output": "b", "history": ["a", "b"]}, "`history` must be a list of pairs"),
    ({"prompt": "a", "completion": float("nan")}, "`completion` is NaN, which is no text"),
    ({"prompt": ["a", "b"], "completion": ["c", "d"]}, "`prompt` is a list, and not of turns; write one prompt a row"),
    ({"instruction": ["a"], "output": "b"}, "`instruction` is a list, and not of turns"),
    ({"prompt": b"a", "completion": "b"}, "`prompt` is bytes, not text"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), REFUSED)
def test_what_would_be_lost_or_guessed_is_refused_by_row_and_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^list, row 2: .*{message}"):
        load_examples([BESIDE, row])


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a", "category": "b", "answer": "c"},
        {"INSTRUCTION": "a", "RESPONSE": "b"},
        {"question": "a", "choices": ["b"], "solution": "c", "explanation": "d"},
        {"article": "a", "summary": "b"},
        {"message_1": "a", "message_2": "b"},
        {"system_prompt": "a", "question": "b", "response": "c"},
        {"article": "a", "question": "b", "answer": "c"},
        {"context": "a", "question": "b", "answer": "c"},
        {"article": "a", "unanswerable_question": "b"},
        {"instruction": "a", "revision": "b"},
        {"scores": "a", "critiques": "b", "instruction": "c", "answer": "d"},
        {"prompt": "a", "generation": "b"},
        {"prompt": "a"},
        {"prompt": [USER]},
    ],
)
def test_columns_of_no_form_are_named_with_what_is_needed(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"columns .*{next(iter(row))}.*needed are .*`prompt` and `completion`"):
        load_examples([row])


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"prompt": [USER]}, {"instruction": "a", "input": "b"}])
def test_prompts_alone_are_told_to_need_answers(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Prompts alone teach nothing here"):
        load_examples([row])


def test_a_corpus_and_answers_in_one_source_are_refused() -> None:
    for rows in ([BESIDE, {"text": "a"}], [{"text": "a"}, BESIDE], [{}, {"text": "a"}, {"messages": [USER, ANSWER]}]):
        with pytest.raises(ValueError, match=f"row {len(rows)}: a corpus .* stand in one source"):
            load_examples(rows)
    assert load_examples([{"instruction": "a", "output": "", "text": "a b"}, BESIDE])["response"][:] == ["", "yo"]


def test_rows_without_an_answer_are_kept_empty_to_be_dropped_and_counted() -> None:
    rows = [{"messages": []}, {"messages": None}, {"messages": [USER]}, {"prompt": "a", "completion": None}, BESIDE]
    assert load_examples(rows)["response"][:] == ["", "", "", "", "yo"]
    assert load_examples(rows)["prompt"][:] == ["", "", "hi", "a", "hi"]


def test_two_system_turns_and_an_assistant_first_are_the_templates_to_judge() -> None:
    twice = [IN_ROLES[0], IN_ROLES[0], *IN_ROLES[1:]]
    assert len(turns({"messages": twice})) == 6
    assert turns({"messages": [ANSWER, USER, ANSWER]})[0] == ("assistant", "yo")
