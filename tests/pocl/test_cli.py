"""Whole runs of the command line on a random model of two or three layers and 1,000 words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pocl.cli import app
from pocl.report.run import read_log

STEPS = ["models", "data", "teacher-cache", "warm-up", "ranking", "training", "evaluation", "report"]


def pocl(*words: Any) -> Any:
    """Run `pocl` with words; returns exit code and output."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["steps"]


@pytest.fixture
def copied(finished: Path, copied_run: Path) -> Callable[..., Any]:
    """Run `pocl` on a copy of the finished run: a call with the command and further words."""

    def call(command: str, *words: Any) -> Any:
        return pocl(command, finished / "recipe.yaml", "--output", copied_run, *words)

    return call


def test_distill_makes_a_loadable_student_and_a_report(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = finished / "run"
    assert list(manifest(run)) == STEPS
    assert all(record["state"] == "finished" for record in manifest(run).values())
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert student.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(run / "student").eos_token == "<eos>"
    results = {file.stem: json.loads(file.read_text()) for file in (run / "evaluation").glob("*.json")}
    assert set(results) == {"teacher", "student-initial", "student-warmup", "student-final"}
    assert results["teacher"]["kl_to_teacher"] == 0
    assert results["student-final"]["kl_to_teacher"] < results["student-initial"]["kl_to_teacher"]
    page = (run / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == page.count("<img") == 5


def test_the_output_explains_each_step_and_ends_with_table_and_paths(finished: Path) -> None:
    text = (finished / "output.txt").read_text()
    assert all(f"[{number}/{len(STEPS)}] {name}" in text for number, name in enumerate(STEPS, start=1))
    assert "after the stages" in text
    assert "on disk and one pass of the teacher replace 1.5 further passes. " in text  # why the teacher is cached
    assert f"Student:  {finished / 'run' / 'student'}" in text
    assert f"Report:   {finished / 'run' / 'report' / 'index.html'}" in text


def test_a_second_run_skips_everything_and_changes_nothing(
    copied: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr("pocl.pipeline.context.Context.load_model", lambda *_: pytest.fail("a model was loaded"))
    result = copied("distill")
    assert result.exit_code == 0
    assert result.output.count("done before") == len(STEPS)
    assert {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp} <= {"recipe.yaml"}


def test_another_recipe_is_refused_and_redone_from_where_it_differs_on_request(
    copied: Callable[..., Any], tmp_path: Path
) -> None:
    result = copied("distill", "--curriculum.kd_ratio", "0.5")
    assert result.exit_code == 2
    assert "curriculum.kd_ratio: [0.7, 1.0] in the folder, [0.5] now" in result.stderr
    assert manifest(tmp_path / "run")["training"]["state"] == "finished"
    result = copied("distill", "--curriculum.kd_ratio", "0.5", "--change")
    assert result.exit_code == 0, result.output
    assert result.output.count("done before") == STEPS.index("training")


def test_changed_data_under_the_same_name_is_refused(
    copied: Callable[..., Any], finished: Path, tmp_path: Path
) -> None:
    data = finished / "pairs.jsonl"
    whole = data.read_text()
    try:
        data.write_text("".join(whole.splitlines(keepends=True)[:-1]))
        result = copied("distill")
    finally:
        data.write_text(whole)
    assert result.exit_code == 2
    assert "the step 'data' of other inputs" in result.stderr
    assert "content.source: what lies there has changed since the folder was made" in result.stderr
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_ctrl_c_tells_how_to_go_on_and_the_next_run_goes_on(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocl.trainer import POCLTrainer

    trained: list[int] = []
    plain = POCLTrainer.training_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        trained.append(self.stage.index)
        if trained.count(1) == 2:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(POCLTrainer, "training_step", counted)
    monkeypatch.setattr("sys.argv", ["pocl", "distill", str(recipe)])
    result = pocl("distill", recipe)
    assert result.exit_code == 130
    assert f"pocl distill {recipe}" in result.output
    trained.clear()
    monkeypatch.setattr(POCLTrainer, "training_step", plain)
    entered: list[int] = []
    enter = POCLTrainer._enter
    monkeypatch.setattr(
        POCLTrainer, "_enter", lambda self, stage, args: (entered.append(stage.index), enter(self, stage, args))
    )
    result = pocl("distill", recipe)
    assert result.exit_code == 0, result.output
    assert "goes on where it was cut off" in result.output
    assert entered == [1]


def test_rank_alone_writes_a_data_set_that_other_trainers_can_use(recipe: Path, tmp_path: Path) -> None:
    from pocl.pipeline.context import read_parquet

    result = pocl("rank", recipe, "--warmup.epochs", "0", "--teacher_cache.mode", "online")
    assert result.exit_code == 0, result.output
    table = read_parquet(tmp_path / "run" / "ranking" / "ranked.parquet")
    assert {"instruction", "input", "output", "student_response", "rank", "subset", "cross_entropy", "rouge_l"} <= set(
        table.column_names
    )
    assert sorted(table["rank"]) == list(range(1, len(table) + 1))
    assert set(table["subset"]) == {0, 1}
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    pairs = {row["instruction"]: row["output"] for row in map(json.loads, lines)}
    assert all(pairs[prompt] == answer for prompt, answer in zip(table["instruction"], table["output"], strict=True))
    assert list(manifest(tmp_path / "run")) == ["models", "data", "ranking"]


def test_a_ranking_with_a_student_of_ones_own_needs_no_teacher(
    recipe: Path, tmp_path: Path, tiny_model_folder: Path, tiny_teacher_folder: Path
) -> None:
    words = ["--student.model", tiny_model_folder, "--warmup.epochs", "0"]
    result = pocl("rank", recipe, *words, "--teacher", tmp_path / "nowhere")
    assert result.exit_code == 0, result.output
    assert list(manifest(tmp_path / "run")) == ["data", "ranking"]
    result = pocl("distill", recipe, *words, "--teacher", tiny_teacher_folder, "--change")
    assert result.exit_code == 0, result.output
    assert result.output.count("done before") == 2


def test_a_teacher_is_cached_before_the_ranking_only_where_a_warm_up_needs_it(recipe: Path, tmp_path: Path) -> None:
    result = pocl("rank", recipe, "--warmup.epochs", "0", "--teacher_cache.mode", "cached")
    assert result.exit_code == 0, result.output
    assert list(manifest(tmp_path / "run")) == ["models", "data", "ranking"]


def test_rank_fuses_the_criteria_of_the_recipe_and_generates_only_for_rouge(recipe: Path, tmp_path: Path) -> None:
    from pocl.pipeline.context import read_parquet

    criteria = "[{measure: kl_to_teacher, direction: descending}, {measure: response_length, weight: 2}]"
    result = pocl("rank", recipe, "--warmup.epochs", "0", "--criteria", criteria, "--plot")
    assert result.exit_code == 0, result.output
    table = read_parquet(tmp_path / "run" / "ranking" / "ranked.parquet").to_dict()
    assert "student_response" not in table
    assert "rouge_l" not in table
    assert [table["kl_to_teacher"][table["rank_kl_to_teacher"].index(r)] for r in range(1, 39)] == sorted(
        table["kl_to_teacher"], reverse=True
    )
    fused = [
        1 / (60 + a) + 2 / (60 + b) for a, b in zip(table["rank_kl_to_teacher"], table["rank_num_tokens"], strict=True)
    ]
    assert table["rrf_score"] == pytest.approx(fused, rel=1e-15)


def test_plot_draws_the_ranking_and_prints_both_its_ends(recipe: Path, tmp_path: Path) -> None:
    words = ["rank", recipe, "--warmup.epochs", "0", "--plot"]
    result = pocl(*words)
    assert result.exit_code == 0, result.output
    from pocl.pipeline.context import read_parquet

    table = read_parquet(tmp_path / "run" / "ranking" / "ranked.parquet").to_dict()
    ends = [table["instruction"][table["rank"].index(r)] for r in (1, 2, 3, 4, 5, 34, 35, 36, 37, 38)]
    assert all(f"question: {prompt}" in result.output for prompt in ends)
    assert (tmp_path / "run" / "report" / "difficulty.png").stat().st_size > 5_000
    assert f"Report:   {tmp_path / 'run' / 'report' / 'index.html'}" in result.output
    assert pocl(*words).output.count("done before") == 3


def test_a_student_of_ones_own_and_a_single_stage_without_held_out_samples(
    recipe: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    words = ["--student.model", tiny_model_folder, "--warmup.epochs", "0", "--teacher_cache.mode", "online"]
    words += ["--curriculum.kind", "constant", "--curriculum.temperature", "2", "--curriculum.kd_ratio", "1"]
    words += [
        "--data.num_validation",
        "0",
        "--data.num_test",
        "0",
        "--curriculum.start",
        "last",
        "--loss.divergence",
        "jsd",
    ]
    result = pocl("distill", recipe, *words)
    assert result.exit_code == 0, result.output
    assert list(manifest(tmp_path / "run")) == ["models", "data", "training", "report"]
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
    assert (tmp_path / "run" / "report" / "index.html").exists()


@pytest.mark.parametrize(("mode", "cached"), [("cached", True), ("auto", False)])
def test_batches_may_hold_responses_that_the_student_samples(
    mode: str, cached: bool, recipe: Path, tmp_path: Path
) -> None:
    words = ["--on_policy.share", "0.5", "--on_policy.max_new_tokens", "6", "--teacher_cache.mode", mode]
    words += ["--warmup.epochs", "0", "--data.num_test", "0", "--training.metric", "loss"]
    result = pocl("distill", recipe, *words)
    assert result.exit_code == 0, result.output
    assert ("teacher-cache" in manifest(tmp_path / "run")) is cached
    assert "50% of them with responses of the student's own" in (tmp_path / "run" / "student" / "README.md").read_text()


def test_dry_run_prints_the_stages_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    result = pocl("distill", recipe, "--dry-run")
    assert result.exit_code == 0
    assert "38 training samples" in result.output
    assert "runs once" in result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert ["stage", "subsets", "samples", "epochs", "steps", "T", "kd_ratio", "skew", "learning_rate", "time"] in rows
    assert ["0", "0", "19", "1", "3", "1", "0.7", "-", "0.0001", "~0.0", "min"] in rows
    assert ["1", "0-1", "38", "1", "5", "2", "1", "-", "0.0001", "~0.0", "min"] in rows
    assert not (tmp_path / "run").exists()


def test_a_plan_is_possible_where_the_data_cannot_be_reached(recipe: Path) -> None:
    words = ["distill", recipe, "--dry-run", "--data.source", "no-one/no-such-data"]
    result = pocl(*words)
    assert result.exit_code == 0
    assert "An unknown number of samples (the data cannot be read: " in result.output
    result = pocl(*words, "--data.num_train", "1000")
    assert "1,000 training samples (at most; the data cannot be read: " in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill", "RECIPE", "--training.batch_sise", "3"], "did you mean training.batch_size?"),
        (["distill", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["evaluate", "RECIPE"], "has no trained student yet: run pocl distill"),
        (["cache-teacher", "RECIPE", "--teacher_cache.mode", "online"], "set teacher_cache.mode to cached"),
        (["report", "nowhere"], "not the folder of a run"),
        (["distill", "RECIPE", "--data.source", "missing.jsonl"], "'missing.jsonl' does not exist"),
        (["distill", "RECIPE", "--data.source", "DAMAGED"], "damaged.jsonl cannot be read: line 2 is no JSON"),
        (["distill", "RECIPE", "--student", "./nofolder"], "there is no folder './nofolder' here"),
        (
            ["rank", "RECIPE", "--student", "nofolder", "--warmup.epochs", "0"],
            "reached, and there is no folder 'nofolder'",
        ),
        (["distill", "RECIPE", "--teacher", "org/none"], "reached, and there is no folder 'org/none' here"),
        (["distill", "RECIPE", "--data.num_test", "44"], "leave none to train on"),
    ],
)
def test_mistakes_are_told_in_words_with_exit_code_2(words: list[str], message: str, recipe: Path) -> None:
    damaged = recipe.with_name("damaged.jsonl")
    damaged.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp')
    result = pocl(*[{"RECIPE": recipe, "DAMAGED": damaged}.get(word, word) for word in words])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_vocabularies_that_differ_are_refused_before_anything_is_trained(
    recipe: Path, tmp_path: Path, make_tiny_folder: Callable[..., Path]
) -> None:
    other = make_tiny_folder(seed=3)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = pocl("distill", recipe, "--student.model", other)
    assert result.exit_code == 2
    assert "w1" in result.stderr
    assert not (tmp_path / "run" / "warmup").exists()


def test_empty_responses_are_dropped_and_counted(recipe: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    with data.open("a") as file:
        file.write(json.dumps({"instruction": "w1 w2", "input": "", "output": " "}) + "\n")
    result = pocl("cache-teacher", recipe)
    assert result.exit_code == 0, result.output
    assert "1 dropped (empty response)" in result.output
    assert manifest(tmp_path / "run")["teacher-cache"]["summary"]["cached"]


@pytest.mark.parametrize(
    "command", ["quickstart", "rank", "cache-teacher", "distill", "evaluate", "report", "status", "bench", "keys"]
)
def test_every_command_has_help(command: str) -> None:
    assert command in pocl("--help").output
    result = pocl(command, "--help")
    assert result.exit_code == 0
    text = " ".join(result.output.split())  # lines are broken to the terminal's width
    assert ("Further words override the recipe: --" in text) is (command not in ("report", "status", "bench", "keys"))


def test_keys_are_listed_by_section_and_for_programs() -> None:
    listed = pocl("keys", "warmup").output
    assert "warmup.epochs" in listed
    assert "training." not in listed
    rows = json.loads(pocl("keys", "batch_size", "--json").stdout)
    assert [(row["key"], row["default"]) for row in rows] == [("training.batch_size", "16")]
    assert json.loads(pocl("keys", "--schema").stdout)["properties"]["seed"]["default"] == 10
    result = pocl("keys", "trainin")
    assert (result.exit_code, "did you mean training?" in result.stderr) == (2, True)


def test_options_that_are_suggested_are_those_of_the_commands() -> None:
    import typer.main

    from pocl.recipe.reader import COMMAND_OPTIONS

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    own = {
        option
        for name in ("quickstart", "distill", "rank", "cache-teacher", "evaluate", "compare")
        for parameter in commands[name].params
        for option in parameter.opts
        if option.startswith("--")
    }
    assert own | {"--help"} == set(COMMAND_OPTIONS)


def test_a_benchmark_that_is_stopped_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pocl.bench.run_benchmark", stopped)
    monkeypatch.setattr("sys.argv", ["pocl", "bench", "loss"])
    result = pocl("bench", "loss")
    assert result.exit_code == 130
    assert "Nothing is kept of it; to start again:\n  pocl bench loss" in result.output


def test_a_control_is_trained_as_long_from_the_same_start_and_judged_beside(
    copied: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    student = (run / "student" / "model.safetensors").read_bytes()
    result = copied("distill", "--curriculum.control", "true", "--change")
    assert result.exit_code == 0, result.output
    assert result.output.count("done before") == STEPS.index("training") + 1
    assert (run / "student" / "model.safetensors").read_bytes() == student
    stages, control = (manifest(run)[name]["summary"]["stage_steps"] for name in ("training", "control"))
    assert control == [sum(stages)]
    first, last = (read_log(run / name / "log.jsonl") for name in ("training", "control"))
    begun = [next(line for line in lines if "eval_kl_to_teacher" in line) for lines in (first, last)]
    assert [line["step"] for line in begun] == [0, 0]
    assert begun[0]["eval_kl_to_teacher"] == begun[1]["eval_kl_to_teacher"]  # the same student on the same samples
    results = {file.stem: json.loads(file.read_text()) for file in (run / "evaluation").glob("*.json")}
    assert results["student-control"]["kl_to_teacher"] not in (
        results["student-final"]["kl_to_teacher"],
        results["student-warmup"]["kl_to_teacher"],
    )
    text = (run / "report" / "report.md").read_text()
    assert "| plain, as many steps |" in text
    assert "Plain distillation from the same start, for as many steps, ends at" in text
