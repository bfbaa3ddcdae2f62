"""One cell of a comparison: an arm with a seed, trained and judged; its result is a small file.

folder/
    compare.json              whose comparison this is
    shared/<mark>/            a run folder up to the ranking, for all arms that have these steps in common
    cells/<arm>-<seed>/       a run folder that finds those steps done, removed when its result is written
    results/<arm>-<seed>.json what is left of it
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl.compare.arms import Arm
from pocl.pipeline.context import Context
from pocl.pipeline.engine import Step, fingerprints
from pocl.pipeline.made import recipe_mark
from pocl.pipeline.steps import TRAINING, build_steps
from pocl.recipe import Recipe
from pocl.run_folder import RunFolder, RunFolderError, differences, fingerprint, write_text

METRICS = ("kl_to_teacher", "cross_entropy", "rouge_l", "exact_match")


@dataclass(frozen=True)
class Cell:
    """An arm with a seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.key}-{self.seed}"

    @property
    def recipe(self) -> Recipe:
        training = self.arm.recipe.training.model_copy(update={"seed": self.seed})
        return self.arm.recipe.model_copy(update={"training": training})

    def mark(self) -> str:
        """Stands for all that the result depends on."""
        return recipe_mark(self.recipe, judged=True)

    def settings(self) -> dict[str, Any]:
        """The recipe's settings that are no defaults, to tell what differs."""
        values = self.recipe.model_dump(mode="json", exclude_defaults=True)
        return {key: value for key, value in values.items() if key not in ("name", "output", "compare")}


def result_file(folder: Path, cell: Cell) -> Path:
    return folder / "results" / f"{cell.name}.json"


def read_result(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a cell; None if it is not there yet.

    Raises:
        RunFolderError: it was made with other settings, models or data.
    """
    file = result_file(folder, cell)
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if found["mark"] != cell.mark():
        lines = differences(found["settings"], json.loads(json.dumps(cell.settings())))
        listing = "\n  ".join(lines or ["the content of a model or of the data"])
        raise RunFolderError(
            f"{file} is the cell of another comparison:\n  {listing}\n"
            "Choose another folder with --output, or remove the file to make the cell again."
        )
    return found


def shared_steps(recipe: Recipe) -> list[Step]:
    """The steps before the stages, which cells have in common."""
    steps = build_steps(recipe)
    names = [step.name for step in steps]
    return steps[: names.index(TRAINING)]


def shared_folder(folder: Path, recipe: Recipe) -> Path:
    """Where the steps before a recipe's stages are done."""
    return folder / "shared" / fingerprint(fingerprints(shared_steps(recipe)))


def adopt(folder: Path, recipe: Recipe, others: Sequence[Path]) -> None:
    """Let the steps before the stages be found done in a run folder where another has done the same.

    Their files are linked, not copied: they are only read from there.
    """
    steps, path = shared_steps(recipe), folder
    marks = fingerprints(steps)
    own = RunFolder(path, change=True)
    own.claim(recipe.model_dump(mode="json"))
    for other in map(RunFolder, others):
        for step in steps:
            if not own.is_finished(step.name, marks[step.name]) and other.is_finished(step.name, marks[step.name]):
                for output in step.outputs:
                    target = path / output
                    if target.is_symlink() or target.is_file():
                        target.unlink()
                    elif target.is_dir():
                        shutil.rmtree(target)
                    if (other.path / output).exists():
                        target.symlink_to(os.path.relpath(other.path / output, path))
                own.adopt(step.name, other.record(step.name))


def run_cell(folder: Path, cell: Cell) -> dict[str, Any]:
    """Train and judge a cell, or go on where it was cut off; write its result and remove its models.

    Returns:
        What `results/<cell>.json` holds: metrics and those of each test sample, the curve, the cost.
    """
    from rich.console import Console

    from pocl.pipeline.evaluating import score_models
    from pocl.pipeline.run import run

    path, shared = folder / "cells" / cell.name, shared_folder(folder, cell.recipe)
    recipe = cell.recipe.model_copy(update={"output": str(path)})
    adopt(path, recipe, [shared])
    console = Console(quiet=True)
    result: dict[str, Any] = {
        "arm": cell.arm.name,
        "level": cell.arm.level,
        "seed": cell.seed,
        "mark": cell.mark(),
        "settings": cell.settings(),
        "start": start_mark(shared, recipe),
        "machine": machine(),
        "diverged": None,
    }
    context = Context(recipe, path, console)
    began = time.perf_counter()
    try:
        run(recipe, until=TRAINING, change=True, console=console)
        trained = time.perf_counter()
        key = "student-final"
        score_models(context, {key: str(path / "student")}, context.examples("test"), path / "evaluation")
        judged = json.loads((path / "evaluation" / f"{key}.json").read_text(encoding="utf-8"))
        result["metrics"] = {name: judged[name] for name in METRICS}
        result["of_each"] = judged["of_each"]
        result["seconds"] = {"training": _training_seconds(path), "evaluation": round(time.perf_counter() - trained, 1)}
    except (FloatingPointError, ValueError) as error:
        if not isinstance(error, FloatingPointError) and "non-finite" not in str(error):
            raise
        result |= {"diverged": str(error).splitlines()[0], "metrics": dict.fromkeys(METRICS), "of_each": {}}
        result["seconds"] = {"training": round(time.perf_counter() - began, 1), "evaluation": 0.0}
    result |= _course(path, recipe)
    write_text(result_file(folder, cell), json.dumps(result) + "\n")
    shutil.rmtree(path)
    return result


def _training_seconds(path: Path) -> float:
    """Of all processes that trained the cell, those that were cut off included."""
    return float(RunFolder(path).record(TRAINING)["seconds"])


def _course(path: Path, recipe: Recipe) -> dict[str, Any]:
    """Steps, teacher passes and the curve on validation samples: step, KL at temperature 1, cross-entropy, ROUGE-L."""
    from pocl.report.run import read_log

    lines = read_log(path / "training" / "log.jsonl")
    keys = ("eval_kl_to_teacher", "eval_cross_entropy", "eval_rouge_l")
    summary = RunFolder(path).record(TRAINING).get("summary", {})
    cached = (path / "teacher-cache").exists()
    steps = max((line["step"] for line in lines), default=0)
    return {
        "steps": steps,
        "stage_steps": summary.get("stage_steps", []),
        "teacher_samples": 0
        if cached
        else steps * recipe.training.batch_size * recipe.training.gradient_accumulation_steps,
        "curve": [[line["step"], *(line.get(key) for key in keys)] for line in lines if keys[0] in line],
    }


def start_mark(shared: Path, recipe: Recipe) -> str:
    """Stands for the weights that all cells start from, bit by bit."""
    from pocl.digests import content_fingerprint

    source = Path(Context(recipe, shared, None).warm_student_source())  # type: ignore[arg-type]
    weights = sorted(source.glob("*.safetensors"))  # a card or a tokenizer file may change with a library's version
    return fingerprint([content_fingerprint(file) for file in weights]) if weights else str(source)


def machine() -> dict[str, Any]:
    """What bits may depend on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "system": platform.machine(),
    }


def judge_start(folder: Path, recipe: Recipe, console: Any) -> Mapping[str, Mapping[str, Any]]:
    """The metrics of the teacher and of the student that all cells start from, measured once."""
    from pocl.pipeline.evaluating import evaluated_models, score_models

    shared = shared_folder(folder, recipe)
    context = Context(recipe, shared, console)
    models = {
        key: source
        for key, source in evaluated_models(context).items()
        if key not in ("student-control", "student-final")
    }
    found = score_models(context, models, context.examples("test"), shared / "judged")
    context.release()
    return found
