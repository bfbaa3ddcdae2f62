"""What a person gets wrong: each ends with exit code 2 and words on what came and what to do, and loses nothing.

What can be known of a recipe, a command line or a file is told before a model is loaded.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import pocl, write_recipe

GOOD = '{"prompt": "w1 w2", "completion": "w3"}\n'


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_folder: Path, tiny_pairs: list[dict[str, str]]
) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs))
    write_recipe(folder, tiny_teacher_folder, folder / "pairs.jsonl")
    return folder


def refused(message: str, *words: Any) -> str:
    result = pocl(*words)
    told = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "_pydantic" not in told
    assert re.search(message, told), told
    return told


RECIPES = {
    "empty": ("", "expected `key: value` lines, got nothing: it is empty"),
    "a list": ("- a\n- b\n", "expected `key: value` lines, got list"),
    "a word": ("quickstart", "expected `key: value` lines, got str"),
    "TOML": ("seed = 3\n[student]\ncut = 2\n", "not valid YAML|expected `key: value` lines, got"),
    "JSON lines": (GOOD * 2, "not valid YAML"),
    "tabs": ("student:\n\tcut: 2\n", r"line 2, column 1.*indent with spaces"),
    "cut off": ("student: {cut: 2", "not valid YAML"),
    "a date that is none": ("name: 2026-13-45\nstudent: small\n", "recipe.yaml: .*(not valid YAML|name)"),
    "no student": ("teacher: big\n", r"student: required; name a model, or write `student: \{cut: 6\}`"),
    "student of nothing": ("student:\n", "student: is a section, got None; write `student:` and below it any of model"),
    "model and cut": ("student: {model: a, cut: 2}\n", "name one of `model`.*`cut`.*`drop`"),
    "two keys": ("student: a\nseed: 1\nseed: 2\n", "'seed' stands twice, in lines 2 and 3; keep one"),
    "two keys below": ("student: {cut: 2, cut: 3}\n", "'cut' stands twice"),
    "a section misspelt": (
        "student: a\ncuriculum: {skew: 0.1}\n",
        r"curiculum: unknown key; did you mean curriculum\?",
    ),
    "an unknown key": ("student: a\nfoo: 1\n", "foo: unknown key; known are name, output, seed, teacher.*`pocl keys`"),
    "a key without its section": ("student: a\nbatch_size: 4\n", r"unknown key; did you mean training.batch_size\?"),
    "a key of another section": (
        "student: a\nloss: {temperature: 2}\n",
        r"loss.temperature: unknown key; did you mean \w+.temperature\?",
    ),
    "a key that none has": ("student: a\nloss: {qqq: 2}\n", "loss.qqq: unknown key; known are loss.divergence"),
    "a number for a section": (
        "student: a\ntraining: 4\n",
        "training: is a section, got 4; .* below it any of batch_size",
    ),
    "a list for a section": ("student: a\nranking: [rouge_l]\n", "ranking: is a section, got .*any of criteria"),
    "a key that is a number": ("student: a\n3: x\n", "3: unknown key"),
    "a typo in a section": ("student: a\ntraining: {batchsize: 4}\n", r"did you mean training.batch_size\?"),
    "three problems": ("student: {cut: 0}\nseed: -1\nx: 1\n", "3 problem.*seed: .*student.cut.*x: unknown key"),
    "an adapter that is none": ("student: a\nteacher: [a, b]\n", "teacher: is a section"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, tmp_path: Path) -> None:
    text, message = RECIPES[name]
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    refused(message, "distill", file, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("encoding", "message"),
    [("latin-1", "iconv -f LATIN1 -t UTF-8"), ("utf-16", "iconv -f UTF-16 -t UTF-8"), ("cp1252", "not UTF-8 text")],
)
def test_recipes_in_other_encodings(encoding: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes("name: Schüler\nstudent: a\n".encode(encoding))
    assert str(file) in refused(message, "distill", file)


@pytest.mark.parametrize("command", ["distill", "rank", "cache-teacher", "evaluate", "compare"])
def test_recipes_that_are_not_there(command: str, tmp_path: Path) -> None:
    refused("no recipe at .*shipped recipes are: .*quickstart", command, tmp_path / "none.yaml")
    refused("is a folder, and not that of a run", command, tmp_path)
    refused(r"did you mean quickstart\?", command, "quikstart")
    refused("no recipe is named", command, "--seed", "3")


WORDS = {
    "--dryrun": r"unknown key dryrun; did you mean --dry-run\?",
    "--chnage": r"unknown key chnage; did you mean --change\?",
    "--jobs 3": "this command has no --jobs, others have",
    "--seed": "--seed has no value: write --seed VALUE",
    "--seed --epochs 3": "--seed has no value",
    "seed=3": "unexpected argument 'seed=3': settings are given as --key value",
    "seed 3": "unexpected argument 'seed'",
    "-s 3": "unexpected argument '-s'",
    "--temperature 1": "--temperature is ambiguous: write one of --warmup.temperature",
    "--training 4": "--training is a section; set one of its keys: training.batch_size",
    "--curiculum.skew 0.1": r"unknown key curiculum.skew; did you mean curriculum.skew\?",
    "--training.batchsize 4": r"did you mean training.batch_size\?",
    "--nonsense 4": "unknown key nonsense; known are name, output",
    "--batch_size four": "training.batch_size: .*got 'four'",
    "--batch_size 4.5": "training.batch_size: .*got 4.5",
    "--batch_size 0": "training.batch_size: must be greater than 0, got 0",
    "--batch_size [": r"--batch_size: '\[' is no value: .*a list is written '\[1, 2\]'",
    "--seed -1": "seed: must be greater than or equal to 0, got -1",
    "--seed true": "seed: takes no true and no false, got True",
    "--curriculum.temperature [true,2]": "temperature: takes no true",
    "--curriculum.learning_rate -0.1": "learning_rate.0: must be greater than 0, got -0.1",
    "--curriculum.learning_rate fast": "learning_rate.0: .*got 'fast'",
    "--curriculum.temperature 0": "temperature.0: must be greater than 0",
    "--curriculum.temperature nan": "temperature.0: .*nan",
    "--curriculum.temperature .inf": "temperature.0: .*inf",
    "--curriculum.temperature 1,2,3": "temperature must have 1 or 2 numbers with 2 stages, got 3",
    "--curriculum.temperature 1;2": "temperature.0: .*got '1;2'",
    "--num_stages 100": "samples cannot fill the 100 stages of curriculum.num_stages",
    "--num_stages 100 --num_train 64": "data.num_train = 64 samples cannot fill curriculum.num_stages = 100",
    "--divergence kl": "loss.divergence: must be 'fkl', 'rkl'",
    "--criteria rougeL": "criteria.0.measure: must be 'rouge_l'",
    "--criteria rouge_l,rouge_l": "criteria name a measure twice",
    "--template chatml": "data.template: must be 'auto', 'chat'",
    "--max_length 32": "max_prompt_length must be below max_length = 32, got 32",
    "--max_length 7": "data.max_length: must be greater than or equal to 8",
    "--num_validation 0": "need validation samples: set data.num_validation above 0",
    "--student.cut 9": "student.cut must lie in 1 to 3, the layers of the teacher, got 9",
    "--student.cut 0": "student.cut: must be greater than 0",
    "--student.drop 7": "student.drop names the layers 7; the teacher has 3 layers, 0 to 2",
    "--student.drop 0-2": "student.drop names all 3 layers of the teacher; leave at least one",
    "--output /proc/pocl": "output: .*/proc/pocl (cannot be made .*choose another|needs at least .*another disk)",
    "--student.drop last": "'last' is no layer and no range of layers",
    "--save_every often": "save_every",
    "--save_every 0": "save_every",
    "--teacher_cache.mode disk": "teacher_cache.mode: must be 'auto', 'cached'",
    "--precision float16": "training.precision is float16, which needs a GPU, and there is none here",
    "--precision fp16": "training.precision: must be 'float32'",
    "--student.dtype float16": "student.dtype is float16",
    "--report_to nosuch": "report_to: there is no reporter 'nosuch'",
    "--report_to tensorbord": r"did you mean tensorboard\?",
    "--report_to wandb": "wandb needs a package that is not installed: pip install wandb",
    "--on_policy.share 2": "on_policy.share: must be less than or equal to 1, got 2",
    "--words latin": "ambiguous",
    "--teacher ./none": r"there is no folder './none' here .*give the folder of a model, or a hub id",
    "--student ./none": "there is no folder './none' here",
    "--teacher org/none": "there is no folder 'org/none' here",
    "--data.source none.jsonl": "'none.jsonl' does not exist",
    "--data.source data/*.jsonl": r"data/\*.jsonl",
    "--data.test none.jsonl": "none.jsonl",
    "--num_test 48": "leave none to train on",
    "--template_kwargs 3": "template_kwargs: .*got 3",
}


@pytest.mark.parametrize("words", WORDS)
def test_words_of_the_command_line(words: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    refused(WORDS[words], "distill", place / "recipe.yaml", "--output", tmp_path / "run", *words.split())
    assert not (tmp_path / "run" / "teacher-cache").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("3", "training.extra: .*got 3"),
        ("{adam_beta: 3}", r"TrainingArguments have no field adam_beta; did you mean adam_beta1\?"),
        ("{learning_rate: 0.1}", "learning_rate is decided by the recipe already; set curriculum.learning_rate"),
        ("{eval_steps: 4}", "eval_steps is decided by the recipe already; set training.eval_every"),
        ("{dataloader_prefetch_factor: two}", "dataloader_prefetch_factor must be a valid integer, .*got 'two'"),
        ("{adam_epsilon: [1]}", r"adam_epsilon must be a valid number, got \[1\]"),
    ],
)
def test_further_fields_of_training_arguments(extra: str, message: str, place: Path, tmp_path: Path) -> None:
    words = ["--output", tmp_path / "run", "--training.extra", extra]
    refused(message, "distill", place / "recipe.yaml", *words)
    assert not (tmp_path / "run" / "data").exists()


def test_settings_before_the_recipe_are_read_like_those_behind_it(place: Path) -> None:
    before = pocl("distill", "--seed", "3", "--temperature=2", place / "recipe.yaml", "--dry-run")
    assert "--temperature is ambiguous" in before.stderr
    words = ["--dry-run", "--seed", "3", "--num_stages=1", place / "recipe.yaml", "--curriculum.temperature", "2"]
    result = pocl("distill", *words)
    assert result.exit_code == 0, result.output
    refused(r"did you mean --dry-run\?", "distill", "--dryrun", place / "recipe.yaml")


def rows(text: str) -> bytes:
    """24 rows with prompts of their own."""
    return "".join(text % number + "\n" for number in range(24)).encode()


DATA: dict[str, tuple[str, bytes, str]] = {
    "empty": ("x.jsonl", b"", "x.jsonl"),
    "blank lines": ("x.jsonl", b"\n\n\n", "x.jsonl"),
    "no columns of ours": ("x.jsonl", b'{"foo": "a", "bar": "b"}\n', "foo.*bar|instruction"),
    "prompts alone": ("x.jsonl", b'{"prompt": "a"}\n', "prompt.*completion|response"),
    "broken line": ("x.jsonl", GOOD.encode() + b'{"prompt": "a", "comp', "line 2 is no JSON"),
    "words as lines": ("x.jsonl", b'"a"\n"b"\n', "line 1|row 0|object"),
    "numbers as lines": ("x.jsonl", b"1\n2\n", "line 1|row 0|object"),
    "Latin-1": ("x.jsonl", '{"prompt": "für", "completion": "ß"}\n'.encode("latin-1"), "UTF-8|iconv"),
    "UTF-16": ("x.jsonl", (GOOD * 9).encode("utf-16"), "UTF-8|iconv"),
    "all responses empty": ("x.jsonl", rows('{"prompt": "w%d", "completion": ""}'), r"24 dropped|empty response"),
    "all responses null": ("x.jsonl", rows('{"prompt": "w%d", "completion": null}'), "empty|null"),
    "only user turns": ("x.jsonl", rows('{"messages": [{"role": "user", "content": "w%d"}]}'), "assistant"),
    "unknown roles": ("x.jsonl", b'{"messages": [{"role": "x", "content": "a"}]}\n' * 24, "role"),
    "messages that are text": ("x.jsonl", b'{"messages": "hello"}\n' * 24, "messages"),
    "turns without content": ("x.jsonl", b'{"messages": [{"role": "user"}]}\n' * 24, "content"),
    "equal prompts": ("x.jsonl", GOOD.encode() * 64, "num_validation is 4, but no prompt of 64 samples"),
    "a PDF": ("x.pdf", b"%PDF-1.4", r"x\.pdf.*\.jsonl"),
    "a Parquet file that is none": ("x.parquet", b"not parquet", "x.parquet"),
    "a gzip file that is none": ("x.jsonl.gz", GOOD.encode(), "x.jsonl.gz"),
    "a CSV with a header alone": ("x.csv", b"prompt,completion\n", "x.csv"),
    "a JSON number": ("x.json", b"3", "x.json"),
    "text without columns": ("x.txt", b"hello\n" * 24, "prompt|corpus"),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, place: Path, tmp_path: Path) -> None:
    file, content, message = DATA[name]
    (tmp_path / file).write_bytes(content)
    words = ["--data.source", tmp_path / file, "--output", tmp_path / "run"]
    refused(message, "distill", place / "recipe.yaml", *words)
    assert not (tmp_path / "run" / "teacher-cache").exists()


def test_a_folder_without_data(place: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    refused("none", "distill", place / "recipe.yaml", "--data.source", tmp_path / "none", "--output", tmp_path / "run")


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def swap_words(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        r"model.safetensors is damaged or cut off \(5,000 bytes\); get it again",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "a pointer of Git LFS": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3),
        "is a Git LFS pointer",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no model, for it has no config.json"),
    "a config cut off": (lambda f: (f / "config.json").write_text('{"model'), "config.json is damaged"),
    "no tokenizer": (
        lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "has no tokenizer",
    ),
    "another tokenizer": (swap_words, "w1"),
    "an unknown kind": (lambda f: edit_config(f, model_type="nosuch"), "does not know .*model_type nosuch"),
    "no language model": (lambda f: edit_config(f, model_type="vit"), "no causal language model|vit"),
    "other shapes": (lambda f: edit_config(f, hidden_size=64), "other shapes than its config.json says"),
    "a short context": (
        lambda f: edit_config(f, max_position_embeddings=8),
        "the context of the (student|teacher).* is 8",
    ),
}


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, role: str, place: Path, tmp_path: Path, make_tiny_folder: Callable[..., Path]) -> None:
    change, message = MODELS[name]
    folder = make_tiny_folder(seed=2, hidden_size=48, num_layers=3)
    change(folder)
    words = [f"--{role}", folder, "--output", tmp_path / "run"]
    words += ["--student", yaml.safe_load((place / "recipe.yaml").read_text())["teacher"]] if role == "teacher" else []
    refused(message, "distill", place / "recipe.yaml", *words)
    assert not (tmp_path / "run" / "teacher-cache").exists()


def test_places_that_are_no_run_folder(place: Path, tmp_path: Path) -> None:
    recipe = place / "recipe.yaml"
    file = tmp_path / "file"
    file.write_text("mine")
    refused("file", "distill", recipe, "--output", file)
    refused("file", "distill", recipe, "--output", file / "below")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    refused("is not empty and holds no recipe.yaml.*Choose another with --output", "distill", recipe, "--output", full)
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]
    assert file.read_text() == "mine"
    (full / "recipe.yaml").write_text("student: mine  # a file of one's own\n")
    refused(
        "recipe.yaml is another recipe, and no run has begun there", "distill", recipe, "--output", full, "--change"
    )
    assert (full / "recipe.yaml").read_text() == "student: mine  # a file of one's own\n"
    for command in ("report", "status"):
        refused("not the folder of a run", command, tmp_path / "nowhere")
    refused("no trained student yet", "evaluate", recipe, "--output", tmp_path / "nowhere")
    refused("set teacher_cache.mode to cached", "cache-teacher", recipe, "--teacher_cache.mode", "online")


def test_finished_runs_are_not_lost(finished: Path, copied_run: Path) -> None:
    recipe, before = finished / "recipe.yaml", {f: f.stat().st_mtime_ns for f in copied_run.rglob("*.safetensors")}
    words = [recipe, "--output", copied_run]
    refused(r"--change", "distill", *words, "--seed", "4")
    refused("there is no 'nobody' in this run", "evaluate", *words, "--models", "nobody")
    refused("none.jsonl", "evaluate", *words, "--data", "none.jsonl")
    refused("name must be of letters", "evaluate", *words, "--name", "../x")
    refused("trains nothing", "evaluate", *words, "--seed", "4")
    refused("student", "distill", *words, "--student.cut", "9")
    (copied_run / "manifest.json").write_text("{")
    refused("manifest.json is not readable", "distill", *words)
    assert {f: f.stat().st_mtime_ns for f in copied_run.rglob("*.safetensors")} == before


def test_words_that_are_no_command() -> None:
    refused(r"No such command 'distil'", "distil", "x.yaml")
    refused("No such option", "--seed", "3")
    refused("Missing argument", "distill")
    refused("there is no benchmark 'nothing'; there are", "bench", "nothing")
    refused("No such option", "keys", "--dryrun")
