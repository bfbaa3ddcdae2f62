"""The first table of bad inputs, row by row: which case holds each of them now, and what is read where it should be.

The rows were tried by hand on an early version. A row that ends in words is a case of `test_bad_inputs`, or a test of
its own elsewhere; a row that is no mistake gives the rows named here.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pocl.data import load_examples, tokenize
from pocl.recipe import load_recipe

from . import test_bad_inputs as cases
from .conftest import pocl

HERE = Path(__file__).parent

# A row of the table: the cases of `test_bad_inputs`, as TABLE: KEY, and the tests of other files, as FILE: NAME.
REFUSED = {
    "data path missing": ["WORDS: --data.source none.jsonl"],
    "glob p/*.jsonl": ["WORDS: --data.source data/*.jsonl"],
    "teacher or student missing, hub id offline": [
        "WORDS: --teacher ./none",
        "WORDS: --student ./none",
        "WORDS: --teacher org/none",
    ],
    "teacher with other tokenizer": ["MODELS: another tokenizer"],
    "student.cut 9 of 3": ["WORDS: --student.cut 9"],
    "model and cut both in YAML": ["RECIPES: model and cut"],
    "truncated weights": ["MODELS: cut off weights"],
    "student without tokenizer, folder that is no model": ["MODELS: no tokenizer", "MODELS: no config"],
    "key typo": ["RECIPES: a typo in a section", "WORDS: --training.batchsize 4"],
    "section typo": ["RECIPES: a section misspelt", "WORDS: --curiculum.skew 0.1"],
    "unknown top key": ["RECIPES: an unknown key", "WORDS: --nonsense 4"],
    "batch_size four, 4.5, 0": ["WORDS: --batch_size four", "WORDS: --batch_size 4.5", "WORDS: --batch_size 0"],
    "training: 4": ["RECIPES: a number for a section"],
    "learning_rate -0.1, fast; temperature 0; seed -1": [
        "WORDS: --curriculum.learning_rate -0.1",
        "WORDS: --curriculum.learning_rate fast",
        "WORDS: --curriculum.temperature 0",
        "WORDS: --seed -1",
    ],
    "temperature of three for 2 stages": ["WORDS: --curriculum.temperature 1,2,3"],
    "num_stages 100 > samples": ["WORDS: --num_stages 100", "WORDS: --num_stages 100 --num_train 64"],
    "divergence kl, criteria rougeL, template chatml": [
        "WORDS: --divergence kl",
        "WORDS: --criteria rougeL",
        "WORDS: --template chatml",
    ],
    "max_length = max_prompt_length": ["WORDS: --max_length 32"],
    "max_length over the model's context": ["MODELS: a short context"],
    "float16 on CPU": ["WORDS: --precision float16", "WORDS: --student.dtype float16"],
    "report_to nosuch, a package missing": ["WORDS: --report_to nosuch", "WORDS: --report_to wandb"],
    "--key without value; key=value without dashes": ["WORDS: --seed", "WORDS: seed=3"],
    "--temperature (ambiguous)": ["WORDS: --temperature 1"],
    "--dryrun": ["WORDS: --dryrun"],
    "recipe missing, is a folder": ["test_bad_inputs.py: test_recipes_that_are_not_there"],
    "recipe with tabs": ["RECIPES: tabs"],
    "duplicate keys (2 forms)": ["RECIPES: two keys", "RECIPES: two keys below"],
    "recipe list, empty, toml, jsonl": [
        "RECIPES: a list",
        "RECIPES: empty",
        "RECIPES: TOML",
        "RECIPES: JSON lines",
    ],
    "recipe Latin-1": ["test_bad_inputs.py: test_recipes_in_other_encodings"],
    "output is a file; below a file": ["test_bad_inputs.py: test_places_that_are_no_run_folder"],
    "read-only mount; immutable folder": [
        "test_errors.py: test_errors_of_the_system_say_what_and_where_without_numbers"
    ],
    "disk full": [
        "pipeline/test_dry_run.py: test_a_disk_that_is_too_small_ends_the_run_before_it_begins",
        "test_run_folder.py: test_a_full_disk_is_told_as_the_step_tells_it",
    ],
    "two, three runs in one folder": [
        "test_run_lock.py: test_a_second_process_is_refused_with_who_is_there",
        "test_races.py: test_starts_at_random_moments_are_refused_and_the_run_is_undisturbed",
    ],
    "empty file; empty folder": ["DATA: empty", "test_bad_inputs.py: test_a_folder_without_data"],
    "missing column; other column names": ["DATA: prompts alone", "DATA: no columns of ours"],
    ".txt": ["DATA: text without columns"],
    "data Latin-1; UTF-16": ["DATA: Latin-1", "DATA: UTF-16"],
    "broken line; file cut off": ["DATA: broken line"],
    "JSON strings as lines": ["DATA: words as lines", "DATA: numbers as lines"],
    "null or empty responses (all)": ["DATA: all responses null", "DATA: all responses empty"],
    "only user turns": ["DATA: only user turns"],
    "tool calls": ["data/test_forms.py: test_calls_of_every_form_are_the_same_call_and_the_response_is_never_empty"],
    "64 equal prompts": ["DATA: equal prompts"],
    "report, evaluate on nothing or unfinished": ["test_bad_inputs.py: test_places_that_are_no_run_folder"],
    "corrupt manifest; truncated or deleted student; data changed": [
        "test_bad_inputs.py: test_finished_runs_are_not_lost",
        "test_run_folder.py: test_a_missing_or_truncated_output_makes_its_step_run_again",
        "test_cli.py: test_changed_data_under_the_same_name_is_refused",
    ],
}


@pytest.mark.parametrize("row", REFUSED)
def test_a_row_that_ends_in_words_has_its_case(row: str) -> None:
    for place, _, name in (reference.partition(": ") for reference in REFUSED[row]):
        if place.endswith(".py"):
            assert f"\ndef {name}(" in (HERE / place).read_text(), name
        else:
            assert name in getattr(cases, place), name


def lines(row: Any) -> bytes:
    """24 rows; `row(i)` is the i-th."""
    return "".join(json.dumps(row(i)) + "\n" for i in range(24)).encode()


def pair(i: int) -> dict[str, Any]:
    return {"prompt": f"w{i} w1", "completion": "w3"}


def turns(*roles: str, first: str = "user") -> Any:
    def row(i: int) -> dict[str, Any]:
        said = [{"role": role, "content": f"w{i} w1" if role == first else "w3"} for role in roles]
        return {"messages": said}

    return row


PAIRS = lines(pair)
PLAIN = ("w0 w1", "w3")
# A row of the table: the file, its content, the first prompt and response, and how many of 24 are kept.
READ: dict[str, tuple[str, bytes, tuple[str, str], int]] = {
    "ShareGPT conversations": (
        "x.jsonl",
        lines(lambda i: {"conversations": [{"from": "human", "value": f"w{i} w1"}, {"from": "gpt", "value": "w3"}]}),
        PLAIN,
        24,
    ),
    "CSV": ("x.csv", b"prompt,completion\n" + b"".join(b"w%d w1,w3\n" % i for i in range(24)), PLAIN, 24),
    "JSON array in .json": ("x.json", json.dumps([pair(i) for i in range(24)]).encode(), PLAIN, 24),
    "JSON array in .jsonl": ("x.jsonl", json.dumps([pair(i) for i in range(24)]).encode(), PLAIN, 24),
    ".gz": ("x.jsonl.gz", gzip.compress(PAIRS), PLAIN, 24),
    "data BOM": ("x.jsonl", b"\xef\xbb\xbf" + PAIRS, PLAIN, 24),
    "CRLF and blank lines": ("x.jsonl", PAIRS.replace(b"\n", b"\r\n\r\n"), PLAIN, 24),
    "extra columns in some rows": ("x.jsonl", lines(lambda i: pair(i) | ({"more": i} if i % 3 else {})), PLAIN, 24),
    "numbers as output; mixed": (
        "x.jsonl",
        lines(lambda i: pair(i) | {"completion": 7 if i % 2 == 0 else "w3"}),
        ("w0 w1", "7"),
        24,
    ),
    "null responses (some)": (
        "x.jsonl",
        lines(lambda i: pair(i) | ({"completion": None} if i % 4 == 3 else {})),
        PLAIN,
        18,
    ),
    "null input": (
        "x.jsonl",
        lines(lambda i: {"instruction": f"w{i} w1", "input": None, "output": "w3"}),
        PLAIN,
        24,
    ),
    "100k-character prompt and response": (
        "x.jsonl",
        lines(lambda i: pair(i) | ({"prompt": "w6 " * 33_000, "completion": "w5 " * 33_000} if i == 7 else {})),
        PLAIN,
        24,
    ),
    "messages with system": ("x.jsonl", lines(turns("system", "user", "assistant")), PLAIN, 24),
    "messages ending with user": ("x.jsonl", lines(turns("user", "assistant", "user")), PLAIN, 24),
    "multi-turn": ("x.jsonl", lines(turns("user", "assistant", "user", "assistant")), PLAIN, 24),
    "roles human and gpt": ("x.jsonl", lines(turns("human", "gpt", first="human")), PLAIN, 24),
    "content as parts": (
        "x.jsonl",
        lines(
            lambda i: {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": f"w{i} w1"}]},
                    {"role": "assistant", "content": "w3"},
                ]
            }
        ),
        PLAIN,
        24,
    ),
    "NUL and a special token in text": (
        "x.jsonl",
        lines(lambda i: {"prompt": f"w{i}\x00 <eos> w1", "completion": "w3"}),
        ("w0\x00 <eos> w1", "w3"),
        24,
    ),
}


@pytest.mark.parametrize("row", READ)
def test_a_row_that_is_no_mistake_is_read(row: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    name, content, (prompt, response), kept = READ[row]
    (tmp_path / name).write_bytes(content)
    examples = load_examples(str(tmp_path / name))
    assert len(examples) == 24
    assert prompt in examples[0]["prompt"]
    assert examples[0]["response"] == response
    words = {"template": "plain", "max_length": 64, "max_prompt_length": 32, "workers": 1, "progress": False}
    tokens, report = tokenize(examples, tiny_tokenizer, **words)
    assert (len(tokens), report.num_samples, report.num_examples) == (kept, kept, 24)
    assert all(len(ids) <= 64 for ids in tokens["input_ids"])
    ends = [ids.count(tiny_tokenizer.eos_token_id) for ids in tokens["input_ids"]]
    assert max(ends) == 1  # the end of the answer; text of a special token stays text


BASE = "teacher: a\nstudent: {cut: 2}\ncurriculum: {learning_rate: 0.0002}\n"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(BASE.encode(), id="YAML"),
        pytest.param(b"\xef\xbb\xbf" + BASE.encode(), id="recipe BOM"),
        pytest.param(BASE.replace("\n", "\r\n").encode(), id="recipe CRLF"),
        pytest.param(
            b'{"teacher": "a", "student": {"cut": 2}, "curriculum": {"learning_rate": 2e-4}}', id="recipe JSON"
        ),
        pytest.param(BASE.replace("0.0002", "2e-4").encode(), id="2e-4"),
    ],
)
def test_a_recipe_is_read_however_it_is_written(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    recipe = load_recipe(tmp_path / "recipe.yaml", ["--output", "~/runs/x"])
    assert recipe.curriculum.learning_rate == (2e-4,)
    assert (recipe.teacher.model, recipe.student.cut) == ("a", 2)
    assert recipe.output == str(Path.home() / "runs" / "x")


PLANNED = {
    "model in YAML, --student.cut 2": (["--student.cut", "2"], "38 training samples"),
    "temperature 1,2 on CLI": (["--curriculum.temperature", "1,2"], "1     0-1     38      1      5     2"),
    "batch 100000": (["--batch_size", "100000"], "1     0-1     38      1      1     2"),
    "num_train 1000 of fewer": (["--num_train", "1000"], "38 training samples"),
    "--seed before recipe": (["--seed", "3"], "38 training samples"),
}


@pytest.mark.parametrize("row", PLANNED)
def test_a_row_that_is_no_mistake_is_planned(row: str, recipe: Path) -> None:
    words, expected = PLANNED[row]
    if row == "model in YAML, --student.cut 2":
        recipe.write_text(recipe.read_text().replace("student:\n  cut: 2\n", "student: of-my-own\n"))
        assert "of-my-own" in recipe.read_text()
    result = pocl("distill", *words, recipe, "--dry-run")
    assert result.exit_code == 0, result.output
    assert expected in result.output
