"""vLLM against this process: answers a second, equal answers, hidden states; and what a stored teacher takes on disk.

export POCL_VLLM_PYTHON=.venv-vllm/bin/python      # `make test-engines` makes it
python -m benchmarks.bench_engines --data dolly.jsonl --model runs/quickstart/student           # everything
python -m benchmarks.bench_engines --data dolly.jsonl --model ... --only states sizes --save    # files these two

answers    greedy answers to the prompts of the samples, float32: both engines in turn in one run, their starts apart
states     hidden states of every label position, vLLM's against this process', relative to each row's norm
sizes      bytes of a label token on disk: hidden states, and the 64 likeliest tokens
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine, save_results

PARTS = ("answers", "states", "sizes")
TOP_K = 64


def read_rows(data: str, tokenizer: Any, samples: int) -> Any:
    """Token rows of the first samples whose answers have some length."""
    from pocl.data import load_examples, tokenize

    examples = load_examples(data, limit=samples)
    return tokenize(examples, tokenizer, max_length=256, max_prompt_length=192, workers=1, progress=False)[0]


def answers(model: Any, folder: str, tokenizer: Any, rows: Any, tokens: int, runs: int) -> dict[str, Any]:
    from pocl.engines import LocalEngine, VLLMEngine
    from pocl.generation import GenerationSettings, end_tokens

    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    settings = GenerationSettings(max_new_tokens=tokens)
    how: dict[str, Any] = {"eos_token_ids": end_tokens(model, tokenizer), "sample_ids": range(len(prompts))}
    seconds: dict[str, list[float]] = {"slots": [], "vllm": []}
    found: dict[str, Any] = {}
    started = time.perf_counter()
    with VLLMEngine(folder, dtype="float32", max_model_len=256 + tokens) as vllm:
        engines = {"slots": LocalEngine(model), "vllm": vllm}
        for engine in engines.values():  # starts, compiles, fills its caches
            engine.answers(prompts[:8], settings, eos_token_ids=how["eos_token_ids"], sample_ids=range(8))
        start = time.perf_counter() - started
        for _ in range(runs):
            for name, engine in engines.items():
                began = time.perf_counter()
                found[name] = engine.answers(prompts, settings, **how)
                seconds[name].append(time.perf_counter() - began)
    ratios = [mine / theirs for mine, theirs in zip(seconds["slots"], seconds["vllm"], strict=True)]
    count = sum(map(len, found["slots"]))
    return {
        "samples": len(prompts),
        "tokens": count,
        "seconds": seconds,
        "tokens_per_second": {name: count / statistics.median(values) for name, values in seconds.items()},
        "vllm_over_slots": statistics.median(ratios),
        "vllm_over_slots_each": ratios,
        "start_seconds": start,
        "equal": sum(a == b for a, b in zip(found["slots"], found["vllm"], strict=True)) / len(prompts),
    }


def states(model: Any, folder: str, rows: Any) -> dict[str, Any]:
    from pocl.engines import LocalEngine, VLLMEngine

    ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
    wanted = LocalEngine(model).hidden_states(ordered)
    with VLLMEngine(folder, dtype="float32", max_model_len=257) as vllm:
        found = vllm.hidden_states(ordered)
    errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    return {"label_tokens": len(errors), "largest": float(errors.max()), "median": float(errors.median())}


def sizes(model: Any, rows: Any) -> dict[str, Any]:
    from pocl.teacher import HiddenStateCache, TopKCache

    with tempfile.TemporaryDirectory() as place:
        cache = HiddenStateCache.build(Path(place, "hidden"), model, rows, disable_tqdm=True)
        likely = TopKCache.build(Path(place, "likely"), model, rows, top_k=TOP_K, disable_tqdm=True)
        on_disk = {
            name: sum(file.stat().st_size for file in Path(place, name).glob("shard-*.safetensors")) / cache.num_tokens
            for name in ("hidden", "likely")
        }
        tail = likely.mean_tail()
    return {
        "label_tokens": cache.num_tokens,
        f"bytes_a_token_hidden_{cache.hidden_size}_float32": on_disk["hidden"],
        f"bytes_a_token_top_{TOP_K}": on_disk["likely"],
        "bytes_a_token_hidden_8192_bfloat16_computed": 2 * 8192,
        f"mean_probability_beyond_top_{TOP_K}": tail,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()

    from pocl.models import load_causal_lm, load_tokenizer

    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(arguments.model), load_causal_lm(arguments.model)
    rows = list(read_rows(arguments.data, tokenizer, arguments.samples))
    results: dict[str, Any] = {}
    for part in arguments.only:
        if part == "answers":
            results[part] = answers(model, arguments.model, tokenizer, rows, arguments.tokens, arguments.runs)
        elif part == "states":
            results[part] = states(model, arguments.model, rows)
        else:
            results[part] = sizes(model, rows)
        print(f"{part} ({machine()})\n{json.dumps(results[part], indent=1)}", flush=True)
    if arguments.save:
        print(save_results("engines", results))


if __name__ == "__main__":
    main()
