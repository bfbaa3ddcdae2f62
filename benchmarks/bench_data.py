"""Rows to tokens, ranking, memory and second launches at scale, against an earlier commit of this repository.

    python -m benchmarks.bench_data --data dolly.jsonl            # everything but the million rows
    python -m benchmarks.bench_data --data dolly.jsonl --save rows rank launch relaunch memory

`rows`: Dolly-like rows a second to tokens under a chat template; `rank`: a million scores; `launch`: what the second
launch of a run does before any weight is loaded, with 1 GB of weights; `relaunch`: whole second launches, see
`relaunch.py`; `memory`: the data step over `--count` rows. The first three run side by side with the commit
`--against`. Each measurement runs in a process of its own.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # of a child, behind the tree that it measures

from benchmarks.relaunch import make_runs, relaunches, until_training  # noqa: E402

BEFORE = "0f73454"
PARTS = ("rows", "rank", "launch", "relaunch", "memory")
MIB = 2**20


def dolly_like(data: Path, count: int) -> list[dict[str, str]]:
    """The rows of a file again and again, their questions told apart by a number."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    return [rows[i % len(rows)] | {"instruction": f"{rows[i % len(rows)]['instruction']} {i}"} for i in range(count)]


# ------------------------------------------------------------------------------- what a process of its own measures


def rows_a_second(data: str, count: str) -> dict[str, float]:
    from transformers import AutoTokenizer

    from pocl.data import load_examples, tokenize
    from pocl.embedded import teacher_folder

    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    examples = load_examples(dolly_like(Path(data), int(count)))
    started = time.perf_counter()
    made, _ = tokenize(examples, tokenizer, template="chat", max_length=512, progress=False)
    return {"rows_per_second": len(made) / (time.perf_counter() - started)}


def seconds_to_rank(count: str) -> dict[str, float]:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    from pocl.difficulty import rank

    draw, number = np.random.default_rng(0), int(count)
    columns = {"cross_entropy": draw.gamma(2.0, 1.0, number), "rouge_l": np.round(draw.random(number), 2)}
    scores = Dataset(pa.table({"sample_id": np.arange(number)} | columns))
    started = time.perf_counter()
    rank(scores)
    return {"seconds": time.perf_counter() - started}


def seconds_to_know_weights(folder: str) -> dict[str, float]:
    from pocl.pipeline.context import source_fingerprint

    started = time.perf_counter()
    source_fingerprint(folder)
    return {"seconds": time.perf_counter() - started}


def peak_of_the_data_step(data: str, output: str) -> dict[str, float]:
    from pocl.embedded import teacher_folder
    from pocl.pipeline import run
    from pocl.recipe import build_recipe

    values = {"output": output, "student": str(teacher_folder()), "data": {"source": data}}
    started = time.perf_counter()
    run(build_recipe(values), until="data")
    seconds = time.perf_counter() - started
    peaks = {
        name: resource.getrusage(who).ru_maxrss / 1024
        for name, who in (("peak_mib", resource.RUSAGE_SELF), ("peak_mib_of_a_worker", resource.RUSAGE_CHILDREN))
    }
    return {"seconds": seconds, **peaks}


CHILDREN = {
    function.__name__: function
    for function in (rows_a_second, seconds_to_rank, seconds_to_know_weights, peak_of_the_data_step, until_training)
}

# --------------------------------------------------------------------------------------------------- the parent


def measured(tree: Path, function: Any, *words: Any, **environment: str) -> dict[str, float]:
    """What a function of this file returns in a process that imports pocl from `tree`."""
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "kernels")))}
    command = [sys.executable, str(Path(__file__)), "--child", function.__name__, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | paths | environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def earlier_tree(commit: str, folder: Path) -> Path:
    """The source of a commit."""
    archive = subprocess.run(["git", "archive", commit, "pocl", "kernels"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def side_by_side(trees: dict[str, Path], runs: int, function: Any, *words: Any, **environment: str) -> dict[str, Any]:
    """All runs of every tree, one of each in turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(runs):
        for name, tree in trees.items():
            found[name].append(measured(tree, function, *words, **environment))
    return {name: {key: [one[key] for one in many] for key in many[0]} for name, many in found.items()}


def write_weights(file: Path, size: int) -> None:
    """A file of random bytes, older than any time stamp that could be mistaken for the present."""
    file.parent.mkdir(parents=True)
    with file.open("wb") as stream:
        for _ in range(size // MIB):
            stream.write(os.urandom(MIB))
    time.sleep(3)


def launches(trees: dict[str, Path], runs: int, size: int, scratch: Path) -> dict[str, Any]:
    """Seconds of the first and of later launches with `size` bytes of weights."""
    write_weights(scratch / "model" / "model.safetensors", size)
    cache = {"POCL_CACHE": str(scratch / "cache")}
    first = side_by_side(trees, 1, seconds_to_know_weights, scratch / "model", **cache)
    later = side_by_side(trees, runs, seconds_to_know_weights, scratch / "model", **cache)
    return {name: {"first": first[name]["seconds"], "second": later[name]["seconds"]} for name in trees}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["rows", "rank", "launch"], help=f"of {', '.join(PARTS)}")
    parser.add_argument("--data", type=Path, help="rows of `instruction`, `context`, `response` (JSON lines)")
    parser.add_argument("--against", default=BEFORE, help=f"a commit to compare with (default: {BEFORE})")
    parser.add_argument("--runs", type=int, default=3, help="processes for each figure (default: 3)")
    parser.add_argument(
        "--count", type=int, default=1_000_000, help="scores, and rows of `memory` (default: a million)"
    )
    parser.add_argument("--rows", type=int, default=12_000, help="rows of `rows` (default: 12,000)")
    parser.add_argument("--weights-mb", type=int, default=1024, help="weights of `launch` (default: 1,024 MiB)")
    parser.add_argument("--save", action="store_true", help="file the results under benchmarks/results")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *words = options.child
        print(json.dumps(CHILDREN[name](*words)))
        return
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.data is None and {"rows", "relaunch", "memory"} & set(options.parts):
        parser.error("rows, relaunch and memory need --data FILE")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "before").mkdir()
        trees = {"now": ROOT, "before": earlier_tree(options.against, Path(scratch, "before"))}
        if "rows" in options.parts:
            words = (options.data.absolute(), options.rows)
            results["rows"] = {"count": options.rows} | side_by_side(trees, options.runs, rows_a_second, *words)
        if "rank" in options.parts:
            found = side_by_side(trees, options.runs, seconds_to_rank, options.count)
            results["rank"] = {"count": options.count} | found
        if "launch" in options.parts:
            found = launches(trees, options.runs, options.weights_mb * MIB, Path(scratch, "launch"))
            results["launch"] = {"mib": options.weights_mb} | found
        if "relaunch" in options.parts:
            recipes = make_runs(options.data.absolute(), ROOT, Path(scratch, "relaunch"), measured)
            results["relaunch"] = relaunches(recipes, ROOT, options.runs, measured)
        if "memory" in options.parts:
            file = Path(scratch, "rows.jsonl")
            with file.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in dolly_like(options.data, options.count))
            found = measured(ROOT, peak_of_the_data_step, file, Path(scratch, "run"))
            results["memory"] = {"count": options.count, "now": found}
    for part, values in results.items():
        print(part, {name: value for name, value in values.items() if not isinstance(value, dict)})
        for name in trees.keys() & values.keys():
            for key, figures in values[name].items():
                many = figures if isinstance(figures, list) else [figures]
                print(f"  {name:8}{key:24}{statistics.median(many):12.2f}  ({min(many):.2f} to {max(many):.2f})")
    if options.save:
        from benchmarks.measure import save_results

        print(save_results("data", results))


if __name__ == "__main__":
    main()
