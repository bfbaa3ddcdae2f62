"""What a run did, to look at: `write_report(run folder)` makes report/index.html, report/report.md and the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl.report.document import Code, Document, Heading, Paragraph, Picture, Table
from pocl.report.intervals import difference, half_width
from pocl.report.run import MODEL_NAMES, SHOWN_SAMPLES, Run

__all__ = ["Run", "extreme_samples", "results_table", "write_report"]

_SHOWN_ANSWERS = 8
_OF_ANSWERS = (
    "ROUGE-L: how much of the reference answer its own answer has in common, in order, from 0 to 1. Exact match: "
    "share of answers equal to the reference but for case, punctuation and articles. "
)


def write_report(run_folder: str | Path) -> Path:
    """Read a run folder and write its report; parts that the run has no files for are left out.

    Returns:
        The self-contained HTML page.

    Raises:
        ValueError: the folder is not that of a run.
    """
    run = Run.read(Path(run_folder))
    folder = run.path / "report"
    folder.mkdir(exist_ok=True)
    document = Document(f"{'Ranking' if _only_ranks(run) else 'Distillation'} report: {run.recipe['name']}")
    document.add(Paragraph(_summary(run)))
    for section in (_results, _benchmarks, _difficulty, _stages, _answers, _work):
        section(run, folder, document)
    from pocl.run_folder import write_text

    write_text(folder / "report.md", document.markdown())
    write_text(folder / "index.html", document.html(folder))
    return folder / "index.html"


def results_table(
    results: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, int], *, intervals: bool = True
) -> Table:
    """The models of a run side by side, in the order teacher, student before, between and after.

    Without `intervals` the table fits a terminal of 80 columns.
    """
    header = ["model", "parameters", "cross-entropy", "KL to teacher", "ROUGE-L", "exact match"]
    rows = []
    for key, result in results.items():
        part = "teacher" if key == "teacher" else "student" if key in MODEL_NAMES else ""
        count = parameters.get(part)
        rows.append(
            [
                MODEL_NAMES.get(key, key),
                f"{count / 1e6:.1f} M" if count else "",
                _measured(result, "cross_entropy", 3, intervals),
                _measured(result, "kl_to_teacher", 3, intervals),
                _measured(result, "rouge_l", 4, intervals),
                _measured(result, "exact_match", 4, intervals),
            ]
        )
    strong = list(results).index("student-final") if "student-final" in results else None
    return Table(header, rows, numbers=frozenset(range(1, 6)), strong=strong)


def _measured(result: Mapping[str, Any], measure: str, digits: int, interval: bool) -> str:
    """The mean, with half of its 95 % interval where the samples' own values are known and differ."""
    text, half = _number(result.get(measure), digits), half_width(result, measure) if interval else None
    return f"{text} ± {half:.{digits}f}" if half else text


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _only_ranks(run: Run) -> bool:
    return bool(run.ranked) and not run.log and not run.results


def _summary(run: Run) -> str:
    if _only_ranks(run):
        return (
            "pocl ranks training samples from easy to hard, as a small language model, the student, finds them. "
            f"Here {len(run.ranked['rank'])} samples were ranked, and cut into {len(set(run.ranked['subset']))} parts."
        )
    sizes = run.parameters
    text = "pocl trains a small language model, the student, to give the answers of a large one, the teacher. "
    if "teacher" in sizes:  # one on a server is of a size that nobody knows
        text += f"Here {sizes['teacher'] / 1e6:.1f} M parameters taught {sizes['student'] / 1e6:.1f} M. "
    before, after = run.results.get("student-initial"), run.results.get("student-final")
    if before and after and before.get("kl_to_teacher") and after.get("kl_to_teacher"):
        text += f"On {after['num_samples']} samples that the student never trained on, {_progress(before, after)}"
    control = run.results.get("student-control")
    if after and control and control.get("kl_to_teacher"):
        text += f" {_added(control, after)}"
    return text


def _added(control: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What the stages did that plain distillation for as many steps did not."""
    text = f"Plain distillation from the same start, for as many steps, ends at {_number(control['kl_to_teacher'])}"
    interval = difference(control, after, "kl_to_teacher")
    if interval is None:
        return f"{text}."
    low, high = interval
    if low <= 0 <= high:
        return f"{text}: between the two, so many samples can show no difference."
    side = "closer" if high < 0 else "farther away"
    low, high = sorted((abs(low), abs(high)))
    return f"{text}: the stages ended {_number(low)} to {_number(high)} nats {side} (95 % interval over samples)."


def _progress(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What became of the distance from the teacher, and no more than the samples can tell."""
    first, last = before["kl_to_teacher"], after["kl_to_teacher"]
    text = f"its distance from the teacher (KL) went from {_number(first)} to {_number(last)} nats per token"
    interval = difference(before, after, "kl_to_teacher")
    if interval is not None and interval[0] <= 0 <= interval[1]:
        return f"{text}: no difference that so many samples could show."
    if first > 1.5 * last:
        return f"{text}, {first / last:.1f} times closer."
    return f"{text}: {'closer' if last < first else 'farther away'}."


def _results(run: Run, folder: Path, document: Document) -> None:
    if not run.results:
        return
    from pocl.report.figures import draw_results

    draw_results([MODEL_NAMES[key] for key in run.results], list(run.results.values()), folder / "results.png")
    document.add(
        Heading(f"Results on held-out {'texts' if run.is_corpus else 'questions'}"),
        results_table(run.results, run.parameters),
        Paragraph(
            f"Cross-entropy: how surprised the model is by {'a text' if run.is_corpus else 'the reference answer'}, "
            "in nats per token; guessing evenly among V tokens gives ln V. KL to teacher: how far the model's "
            "next-token distribution is from the teacher's; 0 is a perfect copy. "
            f"{'' if run.is_corpus else _OF_ANSWERS}What stands behind ± is half of the 95 % interval by bootstrap "
            "over the samples: how far the figure may be off for want of more samples. Between models, which all saw "
            "the same samples, differences are surer than these intervals."
        ),
        Picture("results.png", "The same numbers as bars."),
    )


def _benchmarks(run: Run, folder: Path, document: Document) -> None:
    if not run.benchmarks:
        return
    document.add(Heading("Other evaluations"))
    for name, results in run.benchmarks.items():
        count = next(iter(results.values()))["num_samples"]
        document.add(Heading(f"{name}, {count} questions", 3), results_table(results, run.parameters))


def _difficulty(run: Run, folder: Path, document: Document) -> None:
    if not run.ranked:
        return
    from pocl.report.figures import CRITERIA, draw_difficulty, fused_criteria

    draw_difficulty(run.ranked, folder / "difficulty.png")
    names = [CRITERIA.get(name, name) for name in fused_criteria(run.ranked)]
    answered = "Before the curriculum the student answered every training question. "
    resembles = "its answer resembles the reference (ROUGE-L) and the reference does not surprise it (cross-entropy)"
    meaning = resembles if set(names) == {"ROUGE-L", "cross-entropy"} else f"it ranks low by {', '.join(names)}"
    fusion = "The rankings are fused (reciprocal rank fusion)" if len(names) > 1 else "The ranking is"
    easiest, hardest = extreme_samples(run.ranked)
    document.add(
        Heading("What is easy, what is hard"),
        Paragraph(
            (answered if "student_response" in run.ranked else "")
            + f"A sample is easy if {meaning}. {fusion}{' and' if len(names) > 1 else ''} cut into "
            f"{len(set(run.ranked['subset']))} parts."
        ),
        Picture(
            "difficulty.png",
            "Left: cross-entropy of the training samples"
            + ("; the parts overlap because other criteria count too. " if names != ["cross-entropy"] else ". ")
            + ("Right: every dot is a sample." if len(names) > 1 else ""),
        ),
        Heading("The easiest samples", 3),
        easiest,
        Heading("The hardest samples", 3),
        hardest,
    )


def extreme_samples(ranked: Mapping[str, Any]) -> tuple[Table, Table]:
    """The easiest and the hardest samples of a ranking in words, each from its end."""
    order = sorted(range(len(ranked["rank"])), key=lambda i: ranked["rank"][i])
    return _sample_table(ranked, order[:SHOWN_SAMPLES]), _sample_table(ranked, order[::-1][:SHOWN_SAMPLES])


def _sample_table(ranked: Mapping[str, Any], chosen: Sequence[int]) -> Table:
    from pocl.report.figures import CRITERIA, fused_criteria

    titles = {
        "prompt": "question",
        "response": "reference answer",
        "text": "text",
        "student_response": "the student's answer then",
    }
    texts = [name for name in titles if name in ranked]
    fused = fused_criteria(ranked)
    measures = [name for name in dict.fromkeys(["cross_entropy", "rouge_l", *fused]) if name in ranked]
    rows = []
    for i in chosen:
        values = [ranked[name][i] for name in measures]
        numbers = [str(value) if isinstance(value, int) else _number(value, 2) for value in values]
        rows.append([str(ranked["rank"][i]), *(shorten(ranked[name][i]) for name in texts), *numbers])
    header = ["rank", *(titles[name] for name in texts), *(CRITERIA.get(name, name) for name in measures)]
    return Table(header, rows, numbers=frozenset({0, *range(1 + len(texts), len(header))}))


def shorten(text: str, limit: int = 160) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def _stages(run: Run, folder: Path, document: Document) -> None:
    if not run.log:
        return
    from pocl.report.figures import draw_losses, draw_stages, draw_validation

    stages = run.stages()
    draw_stages(run.log, stages, folder / "stages.png")
    labels = "the texts" if run.is_corpus else "the reference answers"
    draw_losses(run.warmup_log, run.log, stages, folder / "losses.png", labels=labels)
    document.add(
        Heading("The stages"),
        Paragraph(
            "Training begins with the easiest part and adds a harder one at every stage. The temperature, which "
            "flattens both distributions and brings out what the teacher thinks of unlikely tokens, and the weight "
            f"of the teacher against {'the texts themselves' if run.is_corpus else 'the reference answers'} "
            "change from stage to stage."
        ),
        Table(
            ["stage", "samples", "steps", "temperature", "weight of the teacher", "divergence: first, last"],
            [
                [
                    str(stage["stage"]),
                    str(stage["num_samples"]),
                    str(stage["last_step"] - stage["first_step"]),
                    f"{stage['temperature']:.2f}",
                    f"{stage['kd_ratio']:.2f}",
                    f"{stage['divergence'][0]:.3f}, {stage['divergence'][1]:.3f}",
                ]
                for stage in stages
            ],
            numbers=frozenset(range(6)),
        ),
        Picture("stages.png", "Samples, temperature, weight of the teacher and learning rate over the steps."),
        Picture(
            "losses.png",
            "Training losses, thin as logged and thick as a moving average. A loss may jump where a stage begins: "
            "harder samples come in, and the temperature changes the scale.",
        ),
    )
    if run.validation:
        draw_validation(run.validation, stages, folder / "validation.png", control=run.control)
        document.add(
            Picture(
                "validation.png",
                "Validation samples, measured before training (step 0) and while it went on. KL is at temperature 1 in "
                "every stage, so that stages compare."
                + (" Grey: plain distillation from the same start, for as many steps." if run.control else ""),
            )
        )


def _answers(run: Run, folder: Path, document: Document) -> None:
    answers = {key: result["responses"] for key, result in run.results.items() if result.get("responses")}
    if not answers or not run.test:
        return
    keys = list(answers)
    questions: Sequence[str] = run.test["prompt"]
    count = min(len(questions), *(len(given) for given in answers.values()))
    first_of = {question: i for i, question in reversed(list(enumerate(questions[:count])))}
    rows = [
        [shorten(questions[i]), shorten(run.test["response"][i]), *(shorten(answers[key][i]) for key in keys)]
        for i in sorted(first_of.values())[:_SHOWN_ANSWERS]
    ]
    document.add(
        Heading("Answers to held-out questions"),
        Paragraph("The first questions of the test part, not selected."),
        Table(["question", "reference", *(MODEL_NAMES[key] for key in keys)], rows),
    )


def _work(run: Run, folder: Path, document: Document) -> None:
    from pocl.pipeline.engine import duration

    rows = [
        [
            name,
            duration(record["seconds"]),
            "-" if record.get("peak_memory_mb") is None else f"{record['peak_memory_mb'] / 1000:.1f} GB",
            str(record["summary"].get("note", "")),
        ]
        for name, record in run.steps.items()
        if record.get("state") == "finished" and name != "report"
    ]
    document.add(
        Heading("What was done"),
        Table(["step", "time", "peak memory so far", "outcome"], rows, numbers=frozenset({1, 2})),
        Heading("Recipe"),
        Code((run.path / "recipe.yaml").read_text(encoding="utf-8")),
    )
    student = run.path / "student"
    if student.is_dir():
        document.add(
            Heading("Using the student"),
            Code(
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                f"student = AutoModelForCausalLM.from_pretrained({str(student)!r})\n"
                f"tokenizer = AutoTokenizer.from_pretrained({str(student)!r})"
            ),
        )
