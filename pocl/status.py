"""What a run has done, what it is at, how long it will still take, and how much room it takes: `pocl status FOLDER`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl.pipeline.foresight import seconds_left
from pocl.report.run import read_log
from pocl.run_folder import MANIFEST, RECIPE, RunFolderError
from pocl.run_lock import LOCK, user_of

if TYPE_CHECKING:
    from rich.console import Console

_TIMES = ("_runtime", "_per_second", "_time")  # of an evaluation, which say nothing of the student
_FIGURES = ("divergence", "cross_entropy", "student_entropy", "learning_rate", "tokens_per_second")


def status_of(folder: Path) -> dict[str, Any]:
    """What is known about a run, as plain values; loads no model and reads no data.

    Returns:
        `name`; `state`: finished, running, stopped or empty; `user` (host, pid, since) while it runs; `steps`: each
        with `name`, `state` (finished, running, stopped, waiting), `seconds` and `seconds_left`; `seconds_left` of the
        whole run, steps not begun among it, None where nothing tells; `training`: optimizer `step` of `steps`,
        `seconds_left` of it, the last `figures` and `validation`; `results` by model; `bytes` on disk.

    Raises:
        RunFolderError: the folder is not that of a run.
    """
    if not ((folder / RECIPE).is_file() and ((folder / MANIFEST).is_file() or (folder / LOCK).is_file())):
        raise RunFolderError(f"{folder} is not the folder of a run: it has no {RECIPE} and {MANIFEST}")
    recipe, planned = _plan(folder)
    records: Mapping[str, Any] = {}
    if (folder / MANIFEST).is_file():
        records = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["steps"]
    user = user_of(folder)
    training = _training(folder, recipe, records)
    left = seconds_left(folder, planned, records, _progress(folder, recipe, records, training), running=bool(user))
    steps = []
    for name in planned:
        record = records.get(name, {})
        state = record.get("state", "waiting")
        state = {"started": "running" if user else "stopped"}.get(state, state)
        step = {"name": name, "state": state, "seconds": record.get("seconds")}
        steps.append(step | {"seconds_left": None if left is None else round(left[1].get(name, 0.0))})
    states = {step["state"] for step in steps}
    state = "running" if user else "finished" if states == {"finished"} else "stopped" if records else "empty"
    return {
        "name": recipe.name,
        "folder": str(folder),
        "state": state,
        "user": user,
        "steps": steps,
        "seconds_left": 0 if states == {"finished"} else None if left is None else round(left[0]),
        "training": training,
        "results": records.get("evaluation", {}).get("summary", {}).get("metrics", {}),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def _plan(folder: Path) -> tuple[Any, list[str]]:
    from pocl.pipeline.steps import build_steps
    from pocl.recipe import load_recipe

    recipe = load_recipe(folder / RECIPE, ["--output", str(folder)])
    return recipe, [step.name for step in build_steps(recipe, content=lambda *_: "")]


def _training(folder: Path, recipe: Any, records: Mapping[str, Any]) -> dict[str, Any]:
    """How far the stages are, by their log."""
    from pocl.pipeline.training import curriculum_of

    lines = read_log(folder / "training" / "log.jsonl")
    steps = [line for line in lines if "divergence" in line]
    if not steps:
        return {}
    last = steps[-1]
    found: dict[str, Any] = {
        "step": last["step"],
        "stage": last["stage"],
        "figures": {name: last[name] for name in _FIGURES if name in last},
        "validation": {
            key.removeprefix("eval_"): value
            for line in lines
            for key, value in line.items()
            if key.startswith("eval_") and not key.endswith(_TIMES)
        },
    }
    count = records.get("data", {}).get("summary", {}).get("counts", {}).get("train")
    if not count:
        return found
    parts = recipe.curriculum.num_stages
    subsets = [min(i // max(1, count // parts), parts - 1) for i in range(count)]
    rows = recipe.training.batch_size * recipe.training.gradient_accumulation_steps
    curriculum = curriculum_of(recipe)
    samples = curriculum.rows(subsets)
    total = sum(stage.steps(len(chosen), rows) for stage, chosen in zip(curriculum.stages, samples, strict=True))
    found["steps"] = max(total, last["step"])
    record = records.get("training", {})
    if record.get("state") == "started" and "started_at" in record:
        spent = record["seconds"] + time.time() - record["started_at"]
        found["seconds_left"] = round(spent / last["step"] * (found["steps"] - last["step"]))
    return found


def _progress(folder: Path, recipe: Any, records: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, float]:
    """Of steps that tell it by what they wrote, the share that is done."""
    found = {}
    if records.get("training", {}).get("state") == "started" and training.get("steps"):
        found["training"] = training["step"] / training["steps"]
    if records.get("evaluation", {}).get("state") == "started":
        students = 2 + bool(recipe.warmup.epochs) + recipe.curriculum.control
        models = students + recipe.evaluation.include_teacher
        found["evaluation"] = min(1.0, len(list((folder / "evaluation").glob("*.json"))) / models)
    return found


def print_status(found: Mapping[str, Any], console: Console) -> None:
    """The same for a person."""
    from pocl.pipeline.engine import duration

    console.print(f"[bold]{found['name']}[/bold] in {found['folder']}: {found['state']}", highlight=False)
    if found["user"]:
        user = found["user"]
        console.print(
            f"  process {user.get('pid')} on host {user.get('host')} since {user.get('since')}", highlight=False
        )
    for step in found["steps"]:
        done = f" in {duration(step['seconds'])}" if step["state"] == "finished" else ""
        done = f", about {duration(step['seconds_left'])} left" if step["seconds_left"] else done
        console.print(f"  {step['state']:9} {step['name']}{done}", highlight=False)
    if found["state"] != "finished" and found["seconds_left"] is not None:
        console.print(f"About {duration(found['seconds_left'])} left in all", highlight=False)
    training = found["training"]
    if training:
        of = f" of {training['steps']:,}" if "steps" in training else ""
        left = f", about {duration(training['seconds_left'])} left" if training.get("seconds_left") else ""
        console.print(f"Step {training['step']:,}{of} (stage {training['stage']}){left}", highlight=False)
        figures = {**training["figures"], **{f"validation {k}": v for k, v in training["validation"].items()}}
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        console.print(f"  {shown}", highlight=False, soft_wrap=True)
    for model, metrics in found["results"].items():
        kl, rouge = metrics.get("kl_to_teacher"), metrics.get("rouge_l")
        words = [f"cross-entropy {metrics['cross_entropy']:.3f}"]
        words += [f"KL to teacher {kl:.3f}"] if kl is not None else []
        words += [f"ROUGE-L {rouge:.4f}"] if rouge is not None else []
        console.print(f"  {model:16} {', '.join(words)}", highlight=False)
    console.print(f"{found['bytes'] / 1e6:,.1f} MB on disk", highlight=False)
