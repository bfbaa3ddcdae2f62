"""The difficulty engine against the procedure of the paper's public code: same model, same samples, same answers.

    python -m benchmarks.bench_difficulty --data dolly.jsonl --model runs/quickstart/student    # everything
    python -m benchmarks.bench_difficulty --data dolly.jsonl --model ... --only cross-entropy   # one part
    python -m benchmarks.bench_difficulty --only memory                                         # needs no data
    python -m benchmarks.bench_difficulty --data dolly.jsonl --model ... --runs 3 --save        # files the results

The authors' procedure: batches of 16 in the order of the data, padded; answers by `model.generate` until the longest
of the batch ends; cross-entropy from the full logits of rows padded to the maximum length; ROUGE-L by `rouge_score`, a
pair at a time. Theirs samples at temperature 0.01, here both sides are greedy, so that the answers can be compared.

    rouge          ROUGE-L of 500 pairs of real answers, warm cache
    cross-entropy  cross-entropy of every sample's reference
    answers        the model's own answers alone
    score          the whole: cross-entropy, answers, ROUGE-L
    identity       answers against `model.generate` one prompt at a time
    memory         peak of cross-entropy scoring at two vocabularies, each in a process of its own

Times are given by the wall clock and by the processors' time, which other programs on the machine do not lengthen.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import give_back_freed_memory, machine, peak_bytes, progress_bar, save_results

PARTS = ("rouge", "cross-entropy", "answers", "score", "identity", "memory")
BATCH = 16
VOCABULARIES = (49152, 151936)


# --------------------------------------------------------------------------------------- the authors' procedure


def authors_cross_entropies(model: Any, samples: Sequence[Any], width: int | None) -> list[float]:
    """Mean loss of each sample from full logits; rows padded to `width`, or to the longest of their batch if None."""
    out: list[float] = []
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        length = width or max(map(len, batch))
        input_ids = torch.zeros(len(batch), length, dtype=torch.int64)
        mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
        for row, sample in enumerate(batch):
            input_ids[row, : len(sample)] = torch.tensor(sample.prompt + sample.response)
            mask[row, : len(sample)] = 1
            labels[row, len(sample.prompt) - 1 : len(sample) - 1] = torch.tensor(sample.response)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.float()
        losses = F.cross_entropy(
            logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="none", ignore_index=-100
        )
        losses = losses.view(labels.shape)
        out += (losses.sum(1) / (labels != -100).sum(1)).tolist()
    return out


def authors_answers(
    model: Any, prompts: Sequence[Sequence[int]], settings: Any, ends: Sequence[int]
) -> list[list[int]]:
    """Greedy answers of padded batches in the order of the data, each as long as its longest."""
    out: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        out += generate_padded(model, prompts[start : start + BATCH], settings, ends)
    return out


def generate_padded(
    model: Any, prompts: Sequence[Sequence[int]], settings: Any, ends: Sequence[int]
) -> list[list[int]]:
    """`model.generate` on one left-padded batch; answers are cut before their end token."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), ends[0])
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    tokens = model.generate(
        input_ids,
        attention_mask=mask,
        do_sample=False,
        temperature=None,
        top_p=None,
        max_new_tokens=settings.max_new_tokens,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    rows = [row[width:].tolist() for row in tokens]
    return [next((row[:i] for i, token in enumerate(row) if token in ends), row) for row in rows]


def authors_rouge(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """`rouge_score`, a pair at a time."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]


# ------------------------------------------------------------------------------------------------------ measuring


def take_turns(functions: dict[str, Callable[[], Any]], runs: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(last result, [wall seconds, CPU seconds] of every run) of each function, A B A B ..."""
    results, times = {}, {name: [] for name in functions}  # type: ignore[var-annotated]
    with progress_bar(runs * len(functions)) as advance:
        for _ in range(runs):
            for name, function in functions.items():
                advance(name)
                wall, cpu = time.perf_counter(), time.process_time()
                results[name] = function()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return results, times


def show(times: dict[str, Any], count: int) -> None:
    """A line for each, medians, and how many times as fast ours is."""
    medians = {name: [statistics.median(kind) for kind in zip(*runs, strict=True)] for name, runs in times.items()}
    for name, (wall, cpu) in medians.items():
        line = f"  {name:34} {wall:8.2f} s  {cpu:8.2f} s of CPU  {count / wall:8.2f} samples/s"
        if name != "pocl":
            ratios = [theirs / ours for theirs, ours in zip((wall, cpu), medians["pocl"], strict=True)]
            line += f"  {ratios[0]:6.2f} x the time of pocl, {ratios[1]:6.2f} x by CPU"
        print(line)


def answer_settings(arguments: argparse.Namespace) -> Any:
    from pocl.generation import GenerationSettings

    return GenerationSettings(max_new_tokens=arguments.max_new_tokens, no_repeat_ngram_size=6)


def load(arguments: argparse.Namespace) -> tuple[Any, Any, Any, list[Any]]:
    """Model, tokenizer, examples and samples."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pocl.data import load_examples
    from pocl.difficulty.samples import SampleReader

    if not (arguments.data and arguments.model):
        raise SystemExit("--data and --model are needed for this part")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    examples = load_examples(arguments.data, limit=arguments.samples)
    read = SampleReader(tokenizer, examples.column_names, template="auto", max_length=512, max_prompt_length=256)
    samples = read(examples)
    tokens = sum(map(len, samples))
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(samples)} samples, {tokens} tokens"
    )
    return model, tokenizer, examples, samples


def settings_of(arguments: argparse.Namespace, model: Any, samples: Sequence[Any]) -> dict[str, Any]:
    """What a result was measured on, to be filed with it; the data by its name alone."""
    return {
        "data": Path(arguments.data).name,
        "samples": len(samples),
        "tokens": sum(map(len, samples)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": model.config.vocab_size,
        "max_new_tokens": arguments.max_new_tokens,
    }


def bench_rouge(arguments: argparse.Namespace) -> dict[str, Any]:
    from pocl.data import load_examples
    from pocl.rouge import rouge_l

    if not arguments.data:
        raise SystemExit("--data is needed for this part")
    answers = [row["response"] for row in load_examples(arguments.data, limit=500)]
    predictions = answers[1:] + answers[:1]
    rouge_l(predictions, answers)
    functions = {
        "rouge_score": lambda: authors_rouge(predictions, answers),
        "pocl": lambda: rouge_l(predictions, answers),
    }
    scores, times = take_turns(functions, max(arguments.runs, 5))
    differing = sum(a != b for a, b in zip(scores["rouge_score"], scores["pocl"], strict=True))
    print(f"\nROUGE-L of {len(answers)} pairs; pairs that differ: {differing}")
    show(times, len(answers))
    return {"data": Path(arguments.data).name, "samples": len(answers), "differing": differing, "times": times}


def bench_cross_entropy(arguments: argparse.Namespace) -> dict[str, Any]:
    from pocl.difficulty.measure import token_scores

    model, _, _, samples = load(arguments)
    token_scores(model, samples[:8])

    def authors(width: int | None) -> list[float]:
        with torch.inference_mode():
            return authors_cross_entropies(model, samples, width)

    functions = {
        "authors": lambda: authors(512),
        "authors, padded to the longest": lambda: authors(None),
        "pocl": lambda: [s.cross_entropy for s in token_scores(model, samples)],
    }
    found, times = take_turns(functions, arguments.runs)
    error = max(abs(a - b) / b for a, b in zip(found["pocl"], found["authors"], strict=True))
    print(f"\nCross-entropy; largest relative difference: {error:.1e}")
    show(times, len(samples))
    return settings_of(arguments, model, samples) | {"error": error, "times": times}


def bench_answers(arguments: argparse.Namespace) -> dict[str, Any]:
    from pocl.generation import end_tokens, generate

    model, tokenizer, _, samples = load(arguments)
    settings, ends = answer_settings(arguments), end_tokens(model, tokenizer)
    prompts = [s.prompt for s in samples]

    def authors() -> list[list[int]]:
        with torch.inference_mode():
            return authors_answers(model, prompts, settings, ends)

    functions = {
        "authors": authors,
        "pocl": lambda: generate(model, prompts, settings, eos_token_ids=ends, progress=False),
    }
    found, times = take_turns(functions, arguments.runs)
    print("\nAnswers: " + _agreement(found["pocl"], found["authors"]))
    show(times, len(samples))
    equal = _equal(found["pocl"], found["authors"])
    return settings_of(arguments, model, samples) | {"equal": equal, "times": times}


def bench_score(arguments: argparse.Namespace) -> dict[str, Any]:
    from pocl.difficulty import score
    from pocl.generation import end_tokens

    model, tokenizer, examples, samples = load(arguments)
    settings, ends = answer_settings(arguments), end_tokens(model, tokenizer)

    def authors() -> tuple[list[str], list[float]]:
        with torch.inference_mode():
            authors_cross_entropies(model, samples, 512)
            answers = authors_answers(model, [s.prompt for s in samples], settings, ends)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts, authors_rouge(texts, [s.reference for s in samples])

    functions = {
        "authors": authors,
        "pocl": lambda: score(model, tokenizer, examples, generation=settings, progress=False),
    }
    found, times = take_turns(functions, arguments.runs)
    texts, rouge = found["authors"]
    answers, scores = found["pocl"]["response"][:], found["pocl"]["rouge_l"]
    print("\nThe whole: " + _agreement(answers, texts))
    same = [i for i, text in enumerate(texts) if text == answers[i]]
    print(f"  ROUGE-L of equal answers differs for {sum(rouge[i] != scores[i] for i in same)}")
    show(times, len(samples))
    return settings_of(arguments, model, samples) | {"equal": len(same), "times": times}


def bench_identity(arguments: argparse.Namespace) -> dict[str, Any]:
    from pocl.generation import end_tokens, generate

    model, tokenizer, _, samples = load(arguments)
    settings, ends = answer_settings(arguments), end_tokens(model, tokenizer)
    prompts = [s.prompt for s in samples]
    found = generate(model, prompts, settings, eos_token_ids=ends, progress=False)
    with torch.inference_mode():
        expected = [generate_padded(model, [prompt], settings, ends)[0] for prompt in prompts]
    print("\nAnswers against one prompt at a time: " + _agreement(found, expected))
    differences = []
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours != theirs:
            differences.append(f"sample {samples[i].sample_id}: {_first_difference(model, prompts[i], ours, theirs)}")
            print(f"  {differences[-1]}")
    equal = _equal(found, expected)
    return settings_of(arguments, model, samples) | {"equal": equal, "differences": differences}


def _equal(found: Sequence[Any], expected: Sequence[Any]) -> int:
    return sum(a == b for a, b in zip(found, expected, strict=True))


def _agreement(found: Sequence[Any], expected: Sequence[Any]) -> str:
    equal, length = _equal(found, expected), sum(map(len, expected)) / len(expected)
    return f"{equal} of {len(expected)} equal ({100 * equal / len(expected):.1f} %), mean length {length:.0f}"


def _first_difference(model: Any, prompt: Sequence[int], ours: list[int], theirs: list[int]) -> str:
    """How far apart the two tokens' logits are where two answers part."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *ours[:at]]])).logits[0, -1]
    best = logits.topk(2).values
    return f"token {at}, the two largest logits differ by {float(best[0] - best[1]):.1e}"


def bench_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    peaks = {}
    for vocabulary in VOCABULARIES:
        command = [sys.executable, "-m", "benchmarks.bench_difficulty", "--only", "memory"]
        run = subprocess.run([*command, "--vocabulary", str(vocabulary)], capture_output=True, text=True, check=True)
        peaks[vocabulary] = json.loads(run.stdout.splitlines()[-1])
    print("\nPeak of cross-entropy scoring beyond the weights, 64 samples of 64 to 512 tokens")
    for vocabulary, peak in peaks.items():
        print(f"  V = {vocabulary:<7} {peak / 2**20:8.1f} MiB")
    print(f"  ratio       {peaks[VOCABULARIES[1]] / peaks[VOCABULARIES[0]]:8.3f}")
    return {"peak_bytes": peaks}


def _memory_of_scoring(vocabulary: int) -> int | None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from pocl.difficulty.measure import token_scores
    from pocl.difficulty.samples import Sample

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(32, 257, (64, 2), generator=generator).tolist()
    rows = [[torch.randint(vocabulary, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
    samples = [Sample(i, prompt, response, "") for i, (prompt, response) in enumerate(rows)]
    give_back_freed_memory()
    token_scores(model, samples)  # in a first run, libraries allocate what they keep for good
    return peak_bytes(lambda: token_scores(model, samples))


# ------------------------------------------------------------------------------------------ small, for pytest-benchmark


@pytest.fixture(scope="module")
def small() -> tuple[Any, list[Any]]:
    """A two-layer random model and 64 random samples."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pocl.difficulty.samples import Sample

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, **shape)).eval()
    samples = [Sample(i, [*range(3, 8 + i % 40)], [*range(5, 10 + i % 30)], "") for i in range(64)]
    return model, samples


def test_cross_entropy_of_64_samples(benchmark: Any, small: tuple[Any, list[Any]]) -> None:
    from pocl.difficulty.measure import token_scores

    benchmark(token_scores, *small)


def test_16_tokens_for_64_prompts(benchmark: Any, small: tuple[Any, list[Any]]) -> None:
    from pocl.generation import GenerationSettings, generate

    model, samples = small
    prompts = [s.prompt for s in samples]
    benchmark(generate, model, prompts, GenerationSettings(16), eos_token_ids=[1], progress=False)


def test_rouge_l_of_500_pairs(benchmark: Any) -> None:
    from pocl.rouge import rouge_l

    words = [f"running{i % 97} houses{i % 31} the" for i in range(2000)]
    texts = [" ".join(words[i : i + 20]) for i in range(500)]
    benchmark(rouge_l, texts, texts[::-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="prompt/response data, anything that load_examples reads")
    parser.add_argument("--model", help="folder or hub id of a trained student")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--only", choices=PARTS, action="append", help="may be given several times")
    parser.add_argument("--runs", type=int, default=1, help="runs of each side, in turn (default: 1; of ROUGE-L >= 5)")
    parser.add_argument("--save", action="store_true", help="file each part's result under benchmarks/results")
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.vocabulary:
        print(json.dumps(_memory_of_scoring(arguments.vocabulary)))
        return
    print(machine())
    for part in arguments.only or PARTS:
        result = globals()[f"bench_{part.replace('-', '_')}"](arguments)
        if arguments.save:
            print(f"  filed in {save_results('difficulty', {part: result})}")


if __name__ == "__main__":
    main()
