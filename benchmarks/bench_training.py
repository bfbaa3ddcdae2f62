"""Training steps of the staged trainer against the loops that users run today, on the same batches of real data.

    python -m benchmarks.bench_training --data dolly.jsonl                  # all variants, each in its own process
    python -m benchmarks.bench_training --data dolly.jsonl --only cached    # one variant, in this process
    python -m benchmarks.bench_training --data dolly.jsonl --steps 12 --save

Teacher SmolLM2-135M-Instruct, student six of its layers. Variants:

    cached     POCLTrainer with the teacher's hidden states read from disk
    online     POCLTrainer with the teacher run in every step
    authors    what the paper's public code does: rows padded to the maximum length, teacher in every step, full logits
    trl-gkd    TRL's GKDTrainer, off-policy (where TRL is installed)

Each is a process of its own, so that its peak memory is its own; steps after the first two are counted, by the wall
clock and by the time of the CPU, which other programs on the machine do not lengthen. `busy` is the share of a step of
POCLTrainer that goes to teacher, student, loss and optimizer; the rest is the trainer's own overhead. `loader` is the
share spent waiting for batches.
"""

import argparse
import contextlib
import io
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Timing, machine, save_results

VARIANTS = ("cached", "online", "authors", "trl-gkd")
STAGE: dict[str, Any] = {"temperature": 2.0, "kd_ratio": 0.7}
WARM_UP = 2


def models() -> tuple[Any, Any, Any]:
    """Tokenizer, teacher and student, float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pocl.embedded import cut_layers, teacher_folder

    folder = teacher_folder()
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), teacher, cut_layers(teacher, 6)


def read(data: str, tokenizer: Any, count: int, max_length: int) -> tuple[Any, Any]:
    """The first `count` examples that need no cutting, so that every variant sees the same text, and their rows."""
    from pocl.data import load_examples, tokenize

    examples = load_examples(data, limit=2 * count)
    rows, _ = tokenize(examples, tokenizer, max_length=max_length, max_prompt_length=256)
    whole = [row for row in rows if row["prompt_length"] < 256 and len(row["input_ids"]) < max_length][:count]
    return [examples[row["sample_id"]] for row in whole], whole


def authors_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and forward KL at a temperature on full logits [B, L, V], as the public code computes them."""
    temperature, kd_ratio = STAGE["temperature"], STAGE["kd_ratio"]
    cross_entropy = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.view(-1))
    teacher_probs = F.softmax(teacher_logits / temperature, dim=-1, dtype=torch.float32)
    infinite = torch.isinf(logits)
    student_logprobs = F.log_softmax(logits / temperature, dim=-1, dtype=torch.float32)
    products = torch.masked_fill(teacher_probs * student_logprobs, infinite, 0)
    mask = (labels != -100).int()
    divergence = -(products.sum(-1).view(-1) * mask.view(-1)).sum() / mask.sum() * temperature**2
    return (1 - kd_ratio) * cross_entropy + kd_ratio * divergence


def run_authors(data: str, steps: int, batch_size: int, max_length: int) -> dict[str, Any]:
    tokenizer, teacher, student = models()
    _, rows = read(data, tokenizer, (steps + WARM_UP) * batch_size, max_length)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=1e-2)
    teacher.eval().requires_grad_(False)
    student.train()
    stamps, losses = [], []
    for start in range(0, len(rows), batch_size):
        began = now()
        ids = torch.full((batch_size, max_length), tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, row in enumerate(rows[start : start + batch_size]):
            n = len(row["input_ids"])
            ids[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), 1
            labels[i, : n - 1] = torch.tensor(row["labels"])[1:]
        logits = student(input_ids=ids, attention_mask=mask, use_cache=False).logits
        with torch.no_grad():
            teacher_logits = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = authors_loss(logits, teacher_logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del logits, teacher_logits, loss
        stamps.append((began, now()))
    return {"steps": [(b[0] - a[0], b[1] - a[1]) for a, b in stamps[WARM_UP:]], "losses": losses}


def now() -> tuple[float, float]:
    """Seconds of the wall clock and of this process on the CPU."""
    return time.perf_counter(), time.process_time()


def between(stamps: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Durations of the counted steps, from the stamps at the ends of all."""
    counted = stamps[WARM_UP - 1 :]
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(counted)]


class Clock:
    """CPU seconds inside chosen methods, each counted once, however they nest."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._depth = 0

    def wrap(self, owner: Any, name: str, key: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.spent[key] = self.spent.get(key, 0.0) + time.process_time() - began

        setattr(owner, name, timed)


def run_pocl(data: str, steps: int, batch_size: int, max_length: int, cached: bool) -> dict[str, Any]:
    from transformers import TrainerCallback

    from pocl.curriculum import Curriculum
    from pocl.teacher import HiddenStateCache, OnlineTeacher
    from pocl.trainer import POCLConfig, POCLTrainer

    tokenizer, model, student = models()
    _, rows = read(data, tokenizer, (steps + WARM_UP) * batch_size, max_length)
    result: dict[str, Any] = {}
    clock = Clock()
    stamps: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        teacher: Any = OnlineTeacher(model)
        if cached:
            began = time.perf_counter()
            cache = HiddenStateCache.build(f"{folder}/cache", teacher, rows, disable_tqdm=True)
            stored = sum(path.stat().st_size for path in Path(folder, "cache").glob("shard-*.safetensors"))
            result["cache"] = {
                "seconds": time.perf_counter() - began,
                "bytes": stored,
                "excess": stored / (cache.num_tokens * cache.hidden_size * cache.dtype.itemsize) - 1,
            }
            teacher = HiddenStateCache.open(f"{folder}/cache")
            del cache, model

        class Stamp(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == WARM_UP:
                    clock.spent.clear()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                stamps.append(now())

        args = POCLConfig(
            output_dir=f"{folder}/run",
            per_device_train_batch_size=batch_size,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=False,
        )
        trainer = POCLTrainer(
            student,
            teacher,
            args,
            rows,
            curriculum=Curriculum.constant(num_subsets=1, epochs=1, **STAGE),
            processing_class=tokenizer,
            callbacks=[Stamp()],
        )
        clock.wrap(trainer, "compute_loss", "model and loss")
        clock.wrap(trainer.accelerator, "backward", "model and loss")
        clock.wrap(trainer.accelerator, "clip_grad_norm_", "optimizer")
        clock.wrap(trainer, "get_batch_samples", "loader")
        clock.wrap(torch.optim.AdamW, "step", "optimizer")
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    durations = between(stamps)
    total = sum(cpu for _, cpu in durations)
    busy = clock.spent["model and loss"] + clock.spent["optimizer"]
    return result | {
        "steps": durations,
        "losses": losses,
        "busy": busy / total,
        "loader": clock.spent["loader"] / total,
    }


def run_trl(data: str, steps: int, batch_size: int, max_length: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer, model, student = models()
    examples, _ = read(data, tokenizer, (steps + WARM_UP) * batch_size, max_length)
    messages = [
        [{"role": "user", "content": e["prompt"]}, {"role": "assistant", "content": e["response"]}] for e in examples
    ]
    stamps: list[tuple[float, float]] = []

    class Stamp(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stamps.append(now())

    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            train_sampling_strategy="sequential",
            max_length=max_length,
            num_train_epochs=1,
            lmbda=0.0,
            beta=0.0,
            temperature=STAGE["temperature"],
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=model,
            args=args,
            train_dataset=Dataset.from_dict({"messages": messages}),
            processing_class=tokenizer,
            callbacks=[Stamp()],
        )
        trainer.train()
    return {"steps": between(stamps), "losses": []}


def run(variant: str, data: str, steps: int, batch_size: int, max_length: int) -> dict[str, Any]:
    """Measure one variant in this process."""
    runners: dict[str, Callable[[], dict[str, Any]]] = {
        "cached": lambda: run_pocl(data, steps, batch_size, max_length, cached=True),
        "online": lambda: run_pocl(data, steps, batch_size, max_length, cached=False),
        "authors": lambda: run_authors(data, steps, batch_size, max_length),
        "trl-gkd": lambda: run_trl(data, steps, batch_size, max_length),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        result = runners[variant]()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return result | {"peak_bytes": peak}


def report(results: dict[str, dict[str, Any]]) -> str:
    """A table: median step, its spread, total against the authors' loop, by both clocks, and peak memory."""
    titles = f"{'variant':<10}{'step s':>9}{'spread':>9}{'speed-up':>10}{'CPU s':>9}{'speed-up':>10}{'peak GB':>9}"
    lines = [machine(), titles + f"{'busy':>7}{'loader':>8}"]
    for name, result in results.items():
        row = f"{name:<10}"
        for kind in (0, 1):
            timing = Timing(tuple(step[kind] for step in result["steps"]))
            total, gain = sum(step[kind] for step in result["steps"]), float("nan")
            if "authors" in results:
                gain = sum(step[kind] for step in results["authors"]["steps"]) / total
            row += f"{timing.median:>9.2f}" + (f"{timing.spread:>9.0%}" if kind == 0 else "") + f"{gain:>9.1f}x"
        row += f"{result['peak_bytes'] / 1e9:>9.2f}"
        if "busy" in result:
            row += f"{result['busy']:>7.1%}{result['loader']:>8.2%}"
        lines.append(row)
    if {"cached", "online"} <= results.keys():
        pairs = zip(results["cached"]["losses"], results["online"]["losses"], strict=True)
        lines.append(
            f"largest relative difference of losses, cached and online: {max(abs(a / b - 1) for a, b in pairs):.1e}"
        )
    if "cache" in results.get("cached", {}):
        cache = results["cached"]["cache"]
        lines.append(f"cache: {cache['bytes'] / 1e6:.1f} MB, {cache['excess']:+.2%} against tokens x H x itemsize, "
                     f"built in {cache['seconds']:.1f} s")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="hub id or file of instruction/output rows")
    parser.add_argument("--steps", type=int, default=6, help="steps counted, at least 2, after two that are not")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--only", choices=VARIANTS, help="measure one variant in this process and print JSON")
    parser.add_argument("--save", action="store_true", help="file the results under benchmarks/results")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step's batch is loaded before the clock starts")
    sizes = ["--steps", str(options.steps), "--batch-size", str(options.batch_size)]
    sizes += ["--max-length", str(options.max_length), "--data", options.data]
    if options.only:
        print(json.dumps(run(options.only, options.data, options.steps, options.batch_size, options.max_length)))
        return
    results = {}
    for variant in options.variants:
        command = [sys.executable, "-m", "benchmarks.bench_training", "--only", variant, *sizes]
        print(f"{variant} ...", file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"{variant}: failed with exit code {done.returncode}", file=sys.stderr)
            continue
        results[variant] = json.loads(done.stdout.splitlines()[-1])
    print(report(results))
    if options.save:
        name = f"{options.steps} steps, batch {options.batch_size}, length {options.max_length}"
        settings = {"data": Path(options.data).name, "batch_size": options.batch_size, "max_length": options.max_length}
        print(f"filed in {save_results('training', {name: settings | {'variants': results}})}")


if __name__ == "__main__":
    main()
