"""Launching a whole run again, cut off in training and finished, with about 1 GB of weights.

Student and teacher are of 135M parameters in float32; six questions and three steps are enough, as none is measured.
Of a run that was cut off, what counts is the time until training goes on, without the imports and the loading of models
and checkpoint; of a finished one, the whole command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STEPS = 3


def prepare(data: Path, folder: Path) -> Path:
    """A recipe with its student and rows, in a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pocl.embedded import teacher_folder

    teacher = str(teacher_folder())
    student = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        student.model.norm.weight.mul_(1.01)  # another model than the teacher
    student.save_pretrained(folder / "student")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder / "student")
    lines = data.read_text(encoding="utf-8").splitlines()[: 2 * STEPS]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = {
        "output": str(folder / "run"),
        "teacher": {"model": teacher},
        "student": {"model": str(folder / "student")},
        "data": {"source": str(folder / "rows.jsonl"), "num_validation": 0, "num_test": 0}
        | {"max_length": 32, "max_prompt_length": 16},
        "teacher_cache": {"mode": "online"},
        "warmup": {"epochs": 0},
        "curriculum": {"kind": "constant", "epochs": 1, "temperature": 1.0, "kd_ratio": 1.0, "start": "last"},
        "training": {"batch_size": 2, "save_every": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return folder / "recipe.yaml"


def until_training(recipe: str, steps: str) -> dict[str, float]:
    """Runs a recipe, and ends this process before it would train the step behind `steps`; what took how long."""
    started = time.perf_counter()
    import accelerate
    import datasets
    import torch
    import transformers.trainer

    import pocl.difficulty
    import pocl.generation
    import pocl.trainer.trainer
    from pocl.pipeline import run
    from pocl.recipe import load_recipe

    del accelerate, datasets, torch
    imported = time.perf_counter()
    spent = {"loading": 0.0}
    trained: list[float] = []
    original = pocl.trainer.trainer.POCLTrainer.training_step

    def step(trainer: Any, *words: Any, **options: Any) -> Any:
        if len(trained) == int(steps):
            whole = time.perf_counter() - imported
            found = {"imports": imported - started, "loading": spent["loading"], "beyond": whole - spent["loading"]}
            print(json.dumps(found), flush=True)
            os._exit(0)
        trained.append(time.perf_counter())
        return original(trainer, *words, **options)

    pocl.trainer.trainer.POCLTrainer.training_step = step  # type: ignore[method-assign]
    trainer = transformers.trainer.Trainer
    from pocl.pipeline.context import Context

    for owner, name in (
        (Context, "load_model"),
        (trainer, "_load_from_checkpoint"),
        (trainer, "_load_optimizer_and_scheduler"),
    ):
        setattr(owner, name, _timed(getattr(owner, name), spent))
    run(load_recipe(recipe))
    raise AssertionError("the run ended before the step")


def _timed(function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    @contextmanager
    def timer() -> Iterator[None]:
        before = time.perf_counter()
        yield
        spent["loading"] += time.perf_counter() - before

    def timed(*words: Any, **options: Any) -> Any:
        with timer():
            return function(*words, **options)

    return timed


def whole_command(recipe: Path, tree: Path) -> float:
    """Seconds of `pocl distill`."""
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "kernels")))}
    command = [sys.executable, "-m", "pocl", "distill", str(recipe)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | paths)
    return time.perf_counter() - started


def make_runs(data: Path, tree: Path, folder: Path, measured: Callable[..., dict[str, float]]) -> tuple[Path, Path]:
    """The recipes of two runs, one of them cut off in training and one finished."""
    folder.mkdir()
    cut_off, finished = prepare(data, folder), folder / "finished.yaml"
    measured(tree, until_training, cut_off, STEPS - 1)
    shutil.copytree(folder / "run", folder / "finished")
    recipe = json.loads(cut_off.read_text(encoding="utf-8")) | {"output": str(folder / "finished")}
    finished.write_text(json.dumps(recipe), encoding="utf-8")
    whole_command(finished, tree)
    return cut_off, finished


def relaunches(
    recipes: tuple[Path, Path], tree: Path, runs: int, measured: Callable[..., dict[str, float]]
) -> dict[str, Any]:
    """Seconds of launches of the run that was cut off (imports, loading, beyond), and of the finished one."""
    cut_off = [measured(tree, until_training, recipes[0], 0) for _ in range(runs)]
    finished = [whole_command(recipes[1], tree) for _ in range(runs)]
    sizes = [file.stat().st_size for file in (recipes[0].parent / "student").glob("*.safetensors")]
    return {
        "mib": round(2 * sum(sizes) / 2**20),
        "now": {key: [one[key] for one in cut_off] for key in cut_off[0]} | {"finished": finished},
    }
