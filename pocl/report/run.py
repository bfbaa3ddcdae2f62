"""Reading a run folder back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MODEL_NAMES = {
    "teacher": "teacher",
    "student-initial": "student before",
    "student-warmup": "after warm-up",
    "student-final": "after the stages",
}


@dataclass(frozen=True)
class Run:
    """What a run folder holds; whatever is missing is empty."""

    path: Path
    recipe: Mapping[str, Any]
    steps: Mapping[str, Mapping[str, Any]]
    """Manifest entries by step."""
    ranked: Mapping[str, Sequence[Any]]
    """Columns of ranking/ranked.parquet, with `prompt` and `response` (a corpus: `text`) as they were ranked."""
    test: Mapping[str, Sequence[Any]]
    """Columns of data/test.parquet."""
    results: Mapping[str, Mapping[str, Any]]
    """Evaluations by model, in the order of `MODEL_NAMES`."""
    benchmarks: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """Evaluations on other questions or by other settings, by name and model (`pocl evaluate`)."""
    warmup_log: Sequence[Mapping[str, Any]]
    log: Sequence[Mapping[str, Any]]
    """Training lines of the curriculum, one an entry of log.jsonl."""
    validation: Sequence[Mapping[str, Any]]
    """Its evaluation lines."""

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read what is there.

        Raises:
            ValueError: no recipe.yaml and manifest.json in `path`.
        """
        if not (path / "recipe.yaml").is_file() or not (path / "manifest.json").is_file():
            raise ValueError(f"{path} is not the folder of a run: it has no recipe.yaml and manifest.json")
        files = {key: path / "evaluation" / f"{key}.json" for key in MODEL_NAMES}
        lines = read_log(path / "training" / "log.jsonl")
        return cls(
            path=path,
            recipe=yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8")),
            steps=json.loads((path / "manifest.json").read_text(encoding="utf-8"))["steps"],
            ranked=_ranked(path),
            test=_columns(path / "data" / "test.parquet"),
            results={key: json.loads(f.read_text(encoding="utf-8")) for key, f in files.items() if f.is_file()},
            benchmarks=_benchmarks(path / "evaluation"),
            warmup_log=[x for x in read_log(path / "warmup" / "log.jsonl") if "divergence" in x],
            log=[line for line in lines if "divergence" in line],
            validation=[line for line in lines if "eval_cross_entropy" in line],
        )

    @property
    def parameters(self) -> Mapping[str, int]:
        """Parameter counts of `teacher` and `student`."""
        counts: Mapping[str, int] = self.steps.get("models", {}).get("summary", {}).get("parameters", {})
        return counts

    def stages(self) -> list[dict[str, Any]]:
        """For each stage: first and last step, samples, temperature, kd_ratio, first and last divergence."""
        samples = self.steps.get("training", {}).get("summary", {}).get("stage_samples", [])
        found: list[dict[str, Any]] = []
        for line in self.log:
            if not found or found[-1]["stage"] != line["stage"]:
                start = found[-1]["last_step"] if found else 0
                found.append({"stage": line["stage"], "first_step": start, "divergence": [line["divergence"]] * 2})
            found[-1] |= {key: line[key] for key in ("temperature", "kd_ratio")} | {"last_step": line["step"]}
            found[-1]["divergence"][1] = line["divergence"]
        for stage in found:
            stage["num_samples"] = samples[stage["stage"]] if stage["stage"] < len(samples) else 0
        return found


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log.jsonl; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def _benchmarks(folder: Path) -> dict[str, dict[str, Any]]:
    """What lies in the folders below `evaluation/`: the models of the run first, in their order."""
    found = {}
    for settings in sorted(folder.glob("*/settings.json")):
        files = {file.stem: file for file in sorted(settings.parent.glob("*.json")) if file != settings}
        keys = [*(key for key in MODEL_NAMES if key in files), *(key for key in files if key not in MODEL_NAMES)]
        found[settings.parent.name] = {key: json.loads(files[key].read_text(encoding="utf-8")) for key in keys}
    return {name: results for name, results in found.items() if results}


def _ranked(path: Path) -> dict[str, list[Any]]:
    """The ranking with the texts of its samples, whatever columns the data has."""
    table, texts = _columns(path / "ranking" / "ranked.parquet"), _columns(path / "data" / "train.parquet")
    if not table or not texts:
        return {}
    row_of = {number: row for row, number in enumerate(texts["id"])}
    rows = [row_of[number] for number in table["sample_id"]]
    names = [name for name in ("prompt", "response", "text") if name in texts]
    return table | {name: [texts[name][row] for row in rows] for name in names}


def _columns(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        return {}
    import pyarrow.parquet

    columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    return columns
