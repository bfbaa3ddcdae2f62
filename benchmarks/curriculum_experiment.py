"""Does the curriculum help? Plain distillation against POCL and its controls, at equal numbers of optimizer steps.

    python -m benchmarks.curriculum_experiment --data dolly.jsonl               # all cells that are missing (hours)
    python -m benchmarks.curriculum_experiment --data dolly.jsonl --worker 1/2  # every second of them
    python -m benchmarks.curriculum_report                                      # docs/evidence.md from the results

`--data` is databricks-dolly-15k or a part of it: the results that are filed here are from the 500 questions that the
paper evaluates on. One cell is a loss, an arm and a seed, and becomes a file under `benchmarks/results/curriculum`; a
killed run goes on with the cells that are missing. All cells share the teacher, the student they start from, the
teacher's hidden states and the student's scores. A seed draws the training samples and their order.

No setting was chosen by its result: the learning rate and the rest were written down before the first cell ran.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import pocl
from pocl import heads
from pocl.curriculum import Curriculum

RESULTS = Path(__file__).parent / "results" / "curriculum"
LOSSES = ("fkl", "rkl", "skew_rkl", "jsd")
ARMS = ("plain", "pocl", "one_pass", "reversed", "shuffled", "temperature", "order")
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Settings:
    """What all cells have in common; part of every result."""

    layers: int = 6
    max_length: int = 128
    longest_prompt: int = 80
    num_train: int = 128
    num_validation: int = 32
    num_test: int = 112
    batch_size: int = 8
    num_stages: int = 4
    learning_rate: float = 3e-4
    adam_beta2: float = 0.95
    skew: float = 0.1
    temperature: tuple[float, float] = (1.0, 2.0)
    kd_ratio: tuple[float, float] = (0.7, 1.0)
    max_new_tokens: int = 48
    warmup_epochs: int = 3
    warmup_learning_rate: float = 6e-4


def curriculum_of(arm: str, loss: str, seed: int, settings: Settings) -> Curriculum:
    """The arm's stages. All train for as many steps: what POCL's four stages make with one epoch each.

    `plain` has a single stage at the lowest temperature and, as has `order`, the mean of POCL's `kd_ratio` over the
    steps, so that both see as much of the labels as the others do.
    """
    count = settings.num_stages
    part = settings.num_train // count
    steps = [math.ceil((i + 1) * part / settings.batch_size) for i in range(count)]
    ramp = [a + (b - a) * i / (count - 1) for a, b in (settings.kd_ratio,) for i in range(count)]
    mean_ratio = sum(r * s for r, s in zip(ramp, steps, strict=True)) / sum(steps)
    skew = settings.skew if loss == "skew_rkl" else None
    options: dict[str, Any] = {"max_steps": steps, "start": "last", "skew": skew}
    rising = options | {"temperature": settings.temperature, "kd_ratio": settings.kd_ratio}
    if arm == "plain":
        plain = Curriculum.constant(settings.temperature[0], mean_ratio, skew=skew, max_steps=sum(steps))
        return replace(plain, start="last")
    if arm == "order":
        return Curriculum.baby_step(count, **options | {"temperature": settings.temperature[0], "kd_ratio": mean_ratio})
    if arm == "temperature":
        base = Curriculum.baby_step(count, **rising)
        return replace(base, name="temperature", stages=tuple(replace(s, subsets=range(count)) for s in base.stages))
    makers: dict[str, Callable[..., Curriculum]] = {
        "pocl": Curriculum.baby_step,
        "one_pass": Curriculum.one_pass,
        "reversed": Curriculum.reversed,
        "shuffled": lambda n, **given: Curriculum.shuffled(n, seed=seed, **given),
    }
    return makers[arm](count, **rising)


class Bench:
    """Everything the cells share, made once under `work` and found there again."""

    def __init__(self, data: str, work: Path, settings: Settings) -> None:
        from transformers import AutoTokenizer

        from pocl.data import load_examples, tokenize
        from pocl.embedded import teacher_folder

        self.settings, self.work = settings, work
        self.teacher_folder = teacher_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(self.teacher_folder)
        self.examples = load_examples(data)
        self.text = {"max_length": settings.max_length, "max_prompt_length": settings.max_length - 1}
        rows, _ = tokenize(self.examples, self.tokenizer, progress=False, **self.text)
        short = [i for i, n in enumerate(rows["prompt_length"]) if n <= settings.longest_prompt]
        needed = settings.num_train + settings.num_validation + settings.num_test
        if len(short) < needed:
            raise ValueError(
                f"{data} has {len(short)} samples with a prompt of up to {settings.longest_prompt} tokens; the "
                f"experiment needs {needed}"
            )
        random.Random(0).shuffle(short)
        a, b = settings.num_test, settings.num_test + settings.num_validation
        self.test, self.validation, self.pool = (rows.select(part) for part in (short[:a], short[a:b], short[b:]))
        self.rows = rows.select(short)
        self.response = dict(zip(self.examples["id"], self.examples["response"], strict=True))

    def teacher(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.teacher_folder, dtype=torch.float32).eval()

    def student(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.work / "student", dtype=torch.float32).eval()

    def prepare(self) -> None:
        """Cache the teacher, make the student that all cells start from, and score the samples with it."""
        from pocl.data import load_examples, tokenize
        from pocl.difficulty import score
        from pocl.embedded import cut_layers, question_answer_pairs
        from pocl.generation import GenerationSettings
        from pocl.teacher import HiddenStateCache, OnlineTeacher
        from pocl.trainer import POCLTrainer
        from pocl.trainer.weights import save_weights

        settings, teacher = self.settings, self.teacher()
        HiddenStateCache.build(self.work / "cache", OnlineTeacher(teacher), self.rows)
        if not (self.work / "student" / "model.safetensors").exists():
            pairs = load_examples(question_answer_pairs())
            rows, _ = tokenize(pairs, self.tokenizer, progress=False, **self.text)
            trainer = POCLTrainer(
                cut_layers(teacher, settings.layers),
                HiddenStateCache.build(self.work / "warmup-cache", OnlineTeacher(teacher), rows),
                self.arguments(self.work / "warmup", 0, settings.warmup_learning_rate, save_strategy="epoch"),
                rows,
                curriculum=replace(Curriculum.constant(epochs=settings.warmup_epochs, num_subsets=1), start="last"),
                processing_class=self.tokenizer,
            )
            trainer.train()
            save_weights(trainer, self.work / "student")
        chosen = set(self.pool["sample_id"])
        score(
            self.student(),
            self.tokenizer,
            self.examples.select([i for i, number in enumerate(self.examples["id"]) if number in chosen]),
            output_dir=self.work / "scores",
            generation=GenerationSettings(max_new_tokens=settings.max_new_tokens, no_repeat_ngram_size=6),
            **self.text,
        ).to_parquet(self.work / "scores.parquet")
        (self.work / "ready").touch()

    def arguments(self, folder: Path, seed: int, rate: float, **options: Any) -> Any:
        from pocl.trainer import POCLConfig

        return POCLConfig(
            output_dir=str(folder),
            per_device_train_batch_size=self.settings.batch_size,
            learning_rate=rate,
            adam_beta2=self.settings.adam_beta2,
            lr_scheduler_kwargs={"min_lr_rate": 1e-3},
            logging_steps=1,
            seed=seed,
            disable_tqdm=True,
            **options,
        )

    def cell(self, loss: str, arm: str, seed: int) -> dict[str, Any]:
        """Train one student and judge it on the test samples."""
        import pyarrow.parquet
        from datasets import Dataset
        from transformers import TrainerCallback

        from pocl.difficulty import rank
        from pocl.teacher import HiddenStateCache
        from pocl.trainer import POCLTrainer

        began = time.perf_counter()
        settings = self.settings
        rows = self.pool.select(sorted(random.Random(seed).sample(range(len(self.pool)), settings.num_train)))
        scores = Dataset(pyarrow.parquet.read_table(self.work / "scores.parquet"))
        place = {number: i for i, number in enumerate(scores["sample_id"])}
        ranked = rank(scores.select([place[number] for number in rows["sample_id"]]), num_subsets=settings.num_stages)
        cache = HiddenStateCache.open(self.work / "cache")
        student = self.student()
        curve = [[0, *held_out(student, self.validation, cache)]]

        class Curve(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                step = trainer._step_offset + state.global_step
                if step in stops:
                    curve.append([step, *held_out(student, bench.validation, cache)])

        bench = self
        folder = self.work / f"cell-{loss}-{arm}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        curriculum = curriculum_of(arm, loss, seed, settings)
        ends = [s.max_steps or 0 for s in curriculum_of("pocl", loss, seed, settings).stages]
        stops = {sum(ends[: i + 1]) for i in range(len(ends))}
        trainer = POCLTrainer(
            student,
            cache,
            self.arguments(folder, seed, settings.learning_rate, save_strategy="no"),
            rows,
            ranked["subset"],
            curriculum,
            processing_class=self.tokenizer,
            divergence=loss,
            callbacks=[Curve()],
        )
        steps = trainer.train().global_step
        shutil.rmtree(folder)
        kl, cross_entropy = held_out(student, self.test, cache)
        rouge = self.rouge(student)
        return {
            "loss": loss,
            "arm": arm,
            "seed": seed,
            "steps": steps,
            "kl_to_teacher": kl,
            "cross_entropy": cross_entropy,
            "rouge_l": sum(rouge) / len(rouge),
            "rouge_l_of_each": rouge,
            "curve": curve,
            "seconds": time.perf_counter() - began,
        }

    def rouge(self, model: Any) -> list[float]:
        """ROUGE-L of the greedy answer to each test prompt."""
        from pocl.generation import GenerationSettings, end_tokens, generate
        from pocl.rouge import rouge_l

        prompts = [row["input_ids"][: row["prompt_length"]] for row in self.test]
        settings = GenerationSettings(max_new_tokens=self.settings.max_new_tokens, no_repeat_ngram_size=6)
        ends = end_tokens(model, self.tokenizer)
        answers = generate(model, prompts, settings, eos_token_ids=ends, progress=False)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return rouge_l(texts, [self.response[number] for number in self.test["sample_id"]])

    def baselines(self) -> dict[str, Any]:
        """The teacher, and the student before training."""
        from pocl.teacher import HiddenStateCache

        cache = HiddenStateCache.open(self.work / "cache")
        out: dict[str, Any] = {}
        for name, model in (("teacher", self.teacher()), ("start", self.student())):
            kl, cross_entropy = held_out(model, self.test, cache)
            rouge = self.rouge(model)
            out[name] = {"kl_to_teacher": kl, "cross_entropy": cross_entropy, "rouge_l": sum(rouge) / len(rouge)}
        return out


@torch.no_grad()
def held_out(model: Any, rows: Any, teacher: Any, batch_size: int = 8) -> tuple[float, float]:
    """KL(teacher || model) and cross-entropy at temperature 1, nats per response token."""
    from pocl.data import Collator

    training, total, tokens = model.training, torch.zeros(2, dtype=torch.float64), 0
    model.eval()
    collate = Collator(0)
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        labels = heads.shifted_labels(batch["labels"]).flatten()
        index = (labels != -100).nonzero()[:, 0]
        hidden = heads.hidden_states(model, batch["input_ids"], attention_mask=batch["attention_mask"])
        out = pocl.fused_linear_divergence(
            hidden.flatten(0, 1)[index],
            heads.head_of(model),
            teacher.hidden_states(batch),
            teacher.head,
            labels=labels[index],
            reduction="sum",
        )
        total += torch.tensor([float(out.divergence), float(out.cross_entropy)], dtype=torch.float64)
        tokens += len(index)
    model.train(training)
    kl, cross_entropy = (total / tokens).tolist()
    return kl, cross_entropy


def result_file(loss: str, arm: str, seed: int) -> Path:
    return RESULTS / f"{loss}-{arm}-{seed}.json"


def write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(value) + "\n")
    scratch.replace(path)


def missing(cells: Sequence[tuple[str, str, int]], settings: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """The cells without a result.

    Raises:
        ValueError: a result is there that was made with other settings.
    """
    todo = []
    for cell in cells:
        path = result_file(*cell)
        if not path.exists():
            todo.append(cell)
        elif json.loads(path.read_text())["settings"] != settings:
            raise ValueError(f"{path} was made with other settings; remove it to make it again")
    return todo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="databricks-dolly-15k: hub id or file of instruction/output rows")
    parser.add_argument("--work", type=Path, default=Path("runs/curriculum-experiment"), help="folder for models")
    parser.add_argument("--worker", default="0/1", help="i/n: run the i-th of every n cells (default: all)")
    parser.add_argument("--prepare", action="store_true", help="only make what the cells share")
    options = parser.parse_args()
    worker, workers = map(int, options.worker.split("/"))
    settings = Settings()
    bench = Bench(options.data, options.work, settings)
    if not (options.work / "ready").exists():
        bench.prepare()
        write(RESULTS / "baselines.json", bench.baselines())
    if options.prepare:
        return
    name = hashlib.sha256(json.dumps(list(bench.rows["input_ids"])).encode()).hexdigest()[:12]
    noted = json.loads(json.dumps({**asdict(settings), "data": name, "torch": torch.__version__}))
    cells = [(loss, arm, seed) for seed in SEEDS for loss in LOSSES for arm in ARMS]
    todo = missing(cells, noted)[worker::workers]
    for number, cell in enumerate(todo, 1):
        result = bench.cell(*cell)
        write(result_file(*cell), {**result, "settings": noted})
        print(f"{number} of {len(todo)}: {cell}  KL {result['kl_to_teacher']:.3f}  ROUGE-L {result['rouge_l']:.4f}  "
              f"{result['seconds']:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
