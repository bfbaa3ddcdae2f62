"""What a run will take: rates of this machine times what each step does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pocl.pipeline import estimate as estimates
from pocl.pipeline.estimate import Estimate, Lengths, estimate
from pocl.pipeline.rates import Rates, Shape, measure, shape_of
from pocl.pipeline.steps import build_steps
from pocl.recipe import load_recipe

from ..conftest import pocl

RATES = Rates(read=1e-3, learn=3e-3, judge=1e-3, compare=2e-3, answer=1e-3, step=1e-2, update=0.1)
SMALL = Shape(layers=3, hidden=48, inner=96, heads=4, kv_heads=2, head_size=12, vocabulary=99, parameters=60_000)
COUNTS = {"train": 38, "validation": 4, "test": 6}
NAMES = ["models", "data", "teacher-cache", "warm-up", "ranking", "training", "evaluation", "report"]


def made(recipe: Path, *words: str, counts: dict[str, int] = COUNTS, **options: Any) -> Estimate:
    lengths = Lengths([10, 20, 30], [4, 5, 6], 1e-3)
    found = estimate(load_recipe(recipe, list(words)), NAMES, counts, lengths, **options)
    assert found is not None
    return found


def seconds(found: Estimate) -> dict[str, float]:
    return {step.name: step.seconds for step in found.steps}


@pytest.fixture
def rated(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe, on a machine whose speed is known."""
    monkeypatch.setattr(estimates, "measure", lambda *_, **__: RATES)
    return recipe


def test_a_step_takes_what_its_tokens_take(rated: Path) -> None:
    found = made(rated)
    rows = Lengths([10, 20, 30], [4, 5, 6], 0).padded(8)
    assert 8 * 20 < rows < 8 * 30
    assert found.seconds_per_step == pytest.approx(1.25 * (rows * 3e-3 + 8 * 5 * 2e-3 + 0.1))
    online = made(rated, "--teacher_cache.mode", "online")
    assert online.seconds_per_step - found.seconds_per_step == pytest.approx(1.25 * rows * 1e-3)
    twice = made(rated, "--gradient_accumulation_steps", "2").seconds_per_step - 1.25 * 0.1
    assert twice == pytest.approx(2 * (found.seconds_per_step - 1.25 * 0.1))


def test_the_whole_is_the_sum_of_its_steps(rated: Path) -> None:
    found = made(rated)
    assert [step.name for step in found.steps] == NAMES
    assert found.seconds == pytest.approx(sum(seconds(found).values()))
    assert all(value > 0 for value in seconds(found).values())
    assert 0 < sum(found.stages) < seconds(found)["training"]
    assert found.stages[0] < found.stages[1]  # all rows against half of them


def test_more_rows_and_longer_answers_take_longer(rated: Path) -> None:
    before = seconds(made(rated))
    more = seconds(made(rated, counts={**COUNTS, "test": 600}))
    assert {name for name in NAMES if more[name] > before[name]} == {"data", "evaluation"}
    longer = seconds(made(rated, "--ranking.max_new_tokens", "80"))
    assert {name for name in NAMES if longer[name] > before[name]} == {"ranking", "training"}  # which validates so
    unanswered = seconds(made(rated, corpus=True))
    assert {name for name in NAMES if unanswered[name] < before[name]} == {"ranking", "training", "evaluation"}


def test_every_step_that_a_recipe_can_have_is_estimated(rated: Path) -> None:
    words = ["--curriculum.control", "true", "--teacher.adapt_epochs", "1", "--hub", "me/mine"]
    recipe = load_recipe(rated, words)
    names = [step.name for step in build_steps(recipe, content=lambda *_: "")]
    assert {"control", "adaptation", "upload"} < set(names)
    found = estimate(recipe, names, COUNTS, Lengths([10, 20, 30], [4, 5, 6], 1e-3))
    assert found is not None
    assert seconds(found)["control"] == seconds(found)["training"]
    assert seconds(found)["evaluation"] > seconds(made(rated))["evaluation"]


def test_sampled_responses_take_time(rated: Path) -> None:
    assert made(rated, "--on_policy.share", "0.5").seconds_per_step > made(rated).seconds_per_step


def test_a_shape_is_read_from_configurations_of_any_names(tmp_path: Path) -> None:
    from transformers import GPT2Config, LlamaConfig

    gpt2 = shape_of(GPT2Config(n_embd=64, n_layer=5, n_head=4, vocab_size=77), 1000)
    assert (gpt2.hidden, gpt2.layers, gpt2.heads, gpt2.kv_heads, gpt2.inner) == (64, 5, 4, 4, 256)
    options = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = shape_of(LlamaConfig(**options, intermediate_size=96, head_dim=32), 1000, trained=7)
    assert (llama.inner, llama.kv_heads, llama.head_size, llama.trained) == (96, 2, 32, 7)


@pytest.mark.parametrize("trained", [None, 500])
def test_rates_are_measured_on_this_machine(trained: int | None) -> None:
    student = Shape(**{**SMALL.__dict__, "trained": trained})
    found = measure(student, length=20, rows=2, responses=8, answering=6, teacher=SMALL, precision="float32")
    assert all(0 <= value < 1 for value in found.__dict__.values())
    assert min(found.read, found.learn, found.judge, found.compare, found.update) > 0
    read = measure(SMALL, length=20, rows=2, responses=8, answering=6, teacher=None, precision="float32")
    assert read.learn == read.compare == read.update == 0 < read.read


def test_a_plan_tells_time_and_disk_of_what_is_to_be_done(recipe: Path, finished: Path) -> None:
    told = json.loads(pocl("distill", recipe, "--json").stdout)["estimate"]
    assert [step["name"] for step in told["steps"]] == NAMES
    sizes = {step["name"]: step["bytes"] for step in told["steps"]}
    for name, folder in (("models", "student-initial"), ("warm-up", "warmup"), ("training", "student")):
        true = sum(file.stat().st_size for file in (finished / "run" / folder).rglob("*.safetensors"))
        assert sizes[name] == pytest.approx(true, rel=0.05), name
    result = pocl("distill", recipe, "--dry-run").stdout
    assert "training ~" in result
    assert "in the end, by layers of the models' shapes timed on this machine" in " ".join(result.split())
    redone = pocl("distill", finished / "recipe.yaml", "--json")
    assert json.loads(redone.stdout)["estimate"]["seconds"] == 0
    assert json.loads(pocl("distill", recipe, "--teacher", "org/none", "--json").stdout)["estimate"] is None


def test_a_process_that_plans_imports_no_compiler_and_no_models(recipe: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pocl.cli", "distill", str(recipe), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"torch._dynamo", "sympy", "transformers.modeling_utils", "peft"} & imported
    assert "training ~" in done.stdout
