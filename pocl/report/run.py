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
    "student-control": "plain, as many steps",
    "student-final": "after the stages",
}
SHOWN_SAMPLES = 5
"""Of the easiest and of the hardest ones, whose texts are shown."""
_TEXTS = ("prompt", "response", "text")


@dataclass(frozen=True)
class Run:
    """What a run folder holds; whatever is missing is empty."""

    path: Path
    recipe: Mapping[str, Any]
    steps: Mapping[str, Mapping[str, Any]]
    """Manifest entries by step."""
    ranked: Mapping[str, Any]
    """Columns of numbers of ranking/ranked.parquet; and of its easiest and hardest samples, by their row, `prompt` and
    `response` (a corpus: `text`) as they were ranked, and `student_response`."""
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
    control: Sequence[Mapping[str, Any]]
    """Those of plain distillation for as many steps, if the run has it (`curriculum.control`)."""

    @property
    def is_corpus(self) -> bool:
        """Whether the run learnt texts, without questions and answers."""
        return "text" in self.test or "text" in self.ranked

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
            validation=_evaluations(lines),
            control=_evaluations(read_log(path / "control" / "log.jsonl")),
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


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in lines if "eval_cross_entropy" in line]


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


def _ranked(path: Path) -> dict[str, Any]:
    """The figures of the ranking, and the texts of its easiest and hardest samples by their row."""
    ranking, train = path / "ranking" / "ranked.parquet", path / "data" / "train.parquet"
    if not ranking.is_file() or not train.is_file():
        return {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(ranking) as file:
        kinds = {field.name: field.type for field in file.schema_arrow if field.name not in _TEXTS}
    numbers = [name for name, kind in kinds.items() if pa.types.is_integer(kind) or pa.types.is_floating(kind)]
    table: dict[str, Any] = _columns(ranking, numbers)
    order = sorted(range(len(table["rank"])), key=table["rank"].__getitem__)
    shown = {table["sample_id"][row]: row for row in (*order[:SHOWN_SAMPLES], *order[-SHOWN_SAMPLES:])}
    return table | _texts(ranking, "sample_id", ["student_response"], shown) | _texts(train, "id", _TEXTS, shown)


def _texts(path: Path, key: str, names: Sequence[str], rows: Mapping[int, int]) -> dict[str, dict[int, str]]:
    """Columns of a table as far as they are there, of the samples in `rows`: the texts by the values of `rows`."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = pa.array(list(rows), pa.int64())
    with pq.ParquetFile(path) as file:
        found: dict[str, dict[int, str]] = {name: {} for name in names if name in file.schema_arrow.names}
        for batch in file.iter_batches(columns=[key, *found]):
            chosen = batch.filter(pc.is_in(batch[key], wanted))
            for row in chosen.to_pylist():
                for name, texts in found.items():
                    texts[rows[row[key]]] = row[name]
    return found


def _columns(path: Path, names: Sequence[str] | None = None) -> dict[str, list[Any]]:
    if not path.is_file():
        return {}
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:  # `read_table` would load pandas
        columns: dict[str, list[Any]] = file.read(columns=names).to_pydict()
    return columns
