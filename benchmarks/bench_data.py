"""Preparing data: how fast rows are read, and how much memory a million of them takes.

    python -m benchmarks.bench_data                     # every part
    python -m benchmarks.bench_data --only reading --rows 200000

Rows are made here, of the lengths of Dolly's (some 650 bytes), each with a question of its own.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import interleaved, machine, save_results, versions

PARTS = ("reading", "memory")
WORDS = tuple(
    f"{stem}{ending}" for stem in ("build", "house", "run", "calm", "river") for ending in ("", "s", "ing", "er")
)


def write_rows(path: Path, count: int, *, conversations: bool = False) -> Path:
    """JSON lines of `count` rows like Dolly's, or of conversations of four turns with a tool call."""
    generator = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))

    with path.open("w") as file:
        for index in range(count):
            row: dict[str, Any] = {
                "instruction": f"{words(5, 20)} {index}?",
                "input": words(0, 60),
                "output": words(5, 100),
            }
            if conversations:
                call = {"function": {"name": "find", "arguments": {f"key {index % 7}": index}}}
                turns = [
                    ("user", row["instruction"]),
                    ("assistant", ""),
                    ("tool", row["input"]),
                    ("assistant", row["output"]),
                ]
                row = {"messages": [{"role": role, "content": text} for role, text in turns]}
                row["messages"][1]["tool_calls"] = [call]
            file.write(json.dumps(row | {"category": "made"}) + "\n")
    return path


def with_datasets(path: Path) -> Any:
    """A table of prompts and answers by the JSON loader of `datasets` and `Dataset.map`, without this library."""
    import datasets

    def example(row: dict[str, Any], index: int) -> dict[str, Any]:
        if "messages" in row:
            *turns, answer = row["messages"]
            return {"id": index, "prompt": "\n\n".join(t["content"] for t in turns), "response": answer["content"]}
        prompt = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        return {"id": index, "prompt": prompt, "response": row["output"]}

    with tempfile.TemporaryDirectory() as cache:
        raw = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        return raw.map(example, with_indices=True, remove_columns=raw.column_names, load_from_cache_file=False)


def bench_reading(arguments: argparse.Namespace) -> dict[str, Any]:
    from pocl.data import load_examples

    found: dict[str, Any] = {"rows": arguments.rows, "versions": versions("datasets", "pyarrow")}
    with tempfile.TemporaryDirectory() as folder:
        for name, conversations in (("Dolly-like rows", False), ("conversations with a tool call", True)):
            path = write_rows(Path(folder) / "rows.jsonl", arguments.rows, conversations=conversations)
            functions: dict[str, Callable[[], Any]] = {
                "datasets": lambda path=path: with_datasets(path),
                "pocl": lambda path=path: load_examples(path),
            }
            times = interleaved(functions, arguments.runs)
            print(f"\nReading {arguments.rows:,} {name}, {path.stat().st_size / 1e6:.0f} MB of JSON lines")
            for side, timing in times.items():
                rate = arguments.rows / timing.median
                print(f"  {side:10} {timing.median:8.2f} s (± {timing.spread:4.0%})  {rate:10,.0f} rows/s")
            found[name] = {side: timing.samples for side, timing in times.items()}
    return found


def bench_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: its peak, imports included."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder) / "rows.jsonl", arguments.memory_rows)
        command = [sys.executable, "-m", "benchmarks.bench_data", "--prepare", str(path)]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"\nReading {arguments.memory_rows:,} rows, holding prompts out, keeping the whole rows as Parquet: "
        f"{found['seconds']:.1f} s, peak of the process {found['peak_bytes'] / 1e9:.2f} GB "
        f"({found['import_bytes'] / 1e9:.2f} GB before the first row)"
    )
    return found | {"rows": arguments.memory_rows}


def prepare(path: str) -> dict[str, Any]:
    """Reads and splits a source as a run does, up to the tokens."""
    import resource

    from pocl.data.whole_rows import write_whole_rows
    from pocl.pipeline.prepare import read_source, split_examples
    from pocl.recipe import build_recipe

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    recipe = build_recipe({"student": {"cut": 2}, "data": {"source": path}})
    source = read_source(recipe)
    before, start = peak(), time.perf_counter()
    parts = split_examples(recipe, source)
    with tempfile.TemporaryDirectory() as folder:
        write_whole_rows(source, parts["train"]["id"][:], Path(folder) / "rows.parquet")
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak(), "import_bytes": before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--memory-rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--only", choices=PARTS, action="append", help="may be given several times")
    parser.add_argument("--save", action="store_true", help="file each part's result under benchmarks/results")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        print(json.dumps(prepare(arguments.prepare)))
        return
    print(machine())
    for part in arguments.only or PARTS:
        result = globals()[f"bench_{part}"](arguments)
        if arguments.save:
            print(f"  filed in {save_results('data', {part: result})}")


if __name__ == "__main__":
    main()
