"""`RESULTS.md`, the README's measured block and their pictures, from the newest results of each machine.

    python -m benchmarks.render     # or make bench-report

Nothing is measured here. Run it after `--save`; a test compares what is committed with what this would write.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_loss import SHAPES, SWEEP
from benchmarks.measure import Entry, Timing, load_results
from benchmarks.pictures import SHORT, THEMES, bars, curves, short
from benchmarks.problems import key
from benchmarks.targets import GROUPS, Entries, Group, met, ratios, step_time, times_as_fast

ROOT = Path(__file__).parent.parent
PAGE, README, PICTURES = ROOT / "benchmarks" / "RESULTS.md", ROOT / "README.md", ROOT / "docs" / "pictures"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
VERDICTS = {True: "yes", False: "**no**", None: "not measured"}

Hardware = Mapping[str, Entries]  # of one machine, by subject
Results = Mapping[str, Hardware]


def tables_of(loss: Entries, shapes: Sequence[tuple[int, int, int, int]]) -> list[Entry]:
    """The entries of those shapes that were measured, in the order of the shapes."""
    names = [key({"tokens": n, "vocabulary": v, "hidden": (s, t), "dtype": "float32"}) for n, v, s, t in shapes]
    return [loss[name] for name in names if name in loss]


def main_machine(results: Results) -> str | None:
    """The machine that the README shows: of those with results of the loss, the one with most subjects."""
    names = [name for name, subjects in results.items() if "loss" in subjects]
    return max(names, key=lambda name: (len(results[name]), name), default=None)


def newest(entries: Entries) -> Entry:
    return max(entries.values(), key=lambda entry: entry.date)


# ----------------------------------------------------------------------------------------------------- RESULTS.md


def results_page(results: Results) -> str:
    """The text of RESULTS.md."""
    lines = [
        "# Results",
        "",
        "Written by `make bench-report` from the newest results of each machine in `results/`; not to be edited. Each",
        "table names the command that measures it again (`--save` files the result). Medians; in brackets the smallest",
        "and the largest run. What was tried on the way is in [NOTES](NOTES.md).",
    ]
    for name, subjects in results.items():
        subjects_here = [subject for subject, entries in subjects.items() if entries]
        if not subjects_here:
            continue
        lines += ["", f"## {name}"]
        if any(group.subject in subjects for group in GROUPS):
            lines += targets_of(subjects)
        for subject in ("loss", "loss-gpu"):
            if subjects.get(subject):
                lines += losses_of(subjects[subject], pictures=name == main_machine(results) and subject == "loss")
        if subjects.get("logits"):
            lines += logits_of(subjects["logits"])
        if subjects.get("frozen-head"):
            lines += frozen_heads_of(subjects["frozen-head"])
        if subjects.get("kernels-gpu"):
            lines += kernels_of(subjects["kernels-gpu"])
    if not any("loss-gpu" in subjects for subjects in results.values()):
        lines += [
            "",
            "## GPUs",
            "",
            "Not measured: no machine with a GPU has filed results yet. There, the commands are",
        ]
        lines += ["`python -m benchmarks.bench_gpu --peers trl,liger --save` and the same with `--kernels`."]
    return "\n".join(lines) + "\n"


def targets_of(subjects: Hardware) -> list[str]:
    """All targets of one machine, and how many are met."""
    verdicts = [met(target.measured(subjects.get(group.subject, {}))) for group in GROUPS for target in group.targets]
    counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
    lines = [
        "",
        f"### Targets: {counts[True]} of {len(verdicts)} met, {counts[False]} missed, {counts[None]} not measured",
    ]
    for group in GROUPS:
        lines += target_table(group, subjects.get(group.subject, {}))
    return lines


def target_table(group: Group, entries: Entries) -> list[str]:
    lines = ["", f"**{group.title}**, `{group.command}`"]
    if entries:
        lines[-1] += f"; {newest(entries).date}, {newest(entries).machine}"
    lines += ["", "| target | limit | measured | met |", "|---|---|---|---|"]
    missed = []
    for target in group.targets:
        measured = target.measured(entries)
        cell = "<br>".join(value.text if value.met is not False else f"**{value.text}**" for value in measured)
        lines.append(f"| {target.what} | {target.limit} | {cell} | {VERDICTS[met(measured)]} |")
        if met(measured) is False:
            missed.append(f"- *{target.what}*: {target.shortfall or 'missed, and not explained yet.'}")
    return lines + (["", "Why some are missed:", "", *missed] if missed else [])


def losses_of(loss: Entries, *, pictures: bool) -> list[str]:
    """Every table of the loss, the sweep over vocabularies as one."""
    lines = ["", "### Losses, forward and backward", ""]
    lines += [
        "The floor is the four matrix products over valid rows that no exact method can save; half of the labels are"
    ]
    lines += [
        "ignored. Memory is the peak beyond the inputs, gradients included; the error is relative, against float64. On"
    ]
    lines += [
        "these inputs, a student near its teacher, most of it is the rounding of float32 logits, which all share; the"
    ]
    lines += ["target above is about unrelated models."]
    swept = tables_of(loss, SWEEP)
    for entry in loss.values():
        if entry not in swept:
            lines += ["", *loss_table(entry)]
    if pictures and tables_of(loss, SHAPES):
        lines += ["", *picture("loss", "Time over the floor and peak memory, two shapes", "../docs/pictures")]
    if swept:
        lines += ["", "### Losses over vocabularies", ""]
        lines += ["`python -m benchmarks.bench_loss --sweep --save`; "
                  f"{swept[0].values['tokens']} tokens, hidden size {swept[0].values['hidden'][0]}; "
                  "time over the floor, peak memory in MiB"]  # fmt: skip
        lines += ["", *sweep_table(swept)]
        if pictures:
            lines += ["", *picture("loss-vocabulary", "The same over vocabularies", "../docs/pictures")]
    elif pictures:
        lines += [
            "",
            "Over vocabularies (`python -m benchmarks.bench_loss --sweep --save`): not measured on this hardware.",
        ]
    return lines


def loss_table(entry: Entry) -> list[str]:
    values = entry.values
    student, teacher = values["hidden"]
    lines = [f"**{values['tokens']:,} tokens, vocabulary {values['vocabulary']:,}, hidden {student} from {teacher}, "
             f"{values['dtype']}**; {entry.date}, {entry.machine}", ""]  # fmt: skip
    lines += ["| | seconds | spread | over the floor | memory, MiB | error |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in values["rows"].items():
        timing = Timing(tuple(row["seconds"]))
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        over = statistics.median(ratios(values, name))
        lines.append(f"| {name} | {timing.median:.3g} | {timing.spread:.1%} | {over:.2f} | {peak} | {error} |")
    lines += [f"| {name} | does not run: {reason} | | | | |" for name, reason in values["failed"].items()]
    return lines


def sweep_table(tables: Sequence[Entry]) -> list[str]:
    names = list(dict.fromkeys(name for table in tables for name in table.values["rows"]))
    lines = ["| | " + " | ".join(f"{table.values['vocabulary']:,}" for table in tables) + " |"]
    lines.append("|---" + "|---:" * len(tables) + "|")
    for name in names:
        cells = [cell(table.values, name, "MiB") for table in tables]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def cell(values: Mapping[str, Any], name: str, unit: str) -> str:
    """`time over the floor, peak memory` of one row; `-` where it was not measured."""
    if name not in values["rows"]:
        return "-"
    peak = values["rows"][name]["peak_bytes"]
    return f"{statistics.median(ratios(values, name)):.2f}" + ("" if peak is None else f", {peak / 2**20:,.0f} {unit}")


def logits_of(entries: Entries) -> list[str]:
    """The divergence of logits at hand, against what a trainer would use otherwise."""
    lines = ["", "### Logits at hand, forward and backward", ""]
    lines += [
        "`python -m benchmarks.bench_logits --save`; the floor reads both models' logits once and writes the gradient"
    ]
    lines += ["once. Memory is the peak beyond both models' logits."]
    for entry in entries.values():
        values = entry.values
        lines += ["", f"**{values['tokens']:,} tokens, vocabulary {values['vocabulary']:,}, {values['dtype']}**, "
                  f"{values['logits_bytes'] / 2**20:,.0f} MiB a model; {entry.date}, {entry.machine}", ""]  # fmt: skip
        lines += ["| | ms | spread | over the floor | memory, MiB | error |", "|---|---:|---:|---:|---:|---:|"]
        for name, row in values["rows"].items():
            time = "| | "
            if row["seconds"]:
                timing = Timing(tuple(row["seconds"]))
                over = statistics.median(ratios(values, name))
                time = f"{1e3 * timing.median:.1f} | {timing.spread:.1%} | {over:.2f}"
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            lines.append(f"| {name} | {time} | {peak} | {error} |")
        lines += [f"| {name} | does not run: {reason} | | | | |" for name, reason in values["failed"].items()]
    return lines


def frozen_heads_of(entries: Entries) -> list[str]:
    """A head that is not trained against one that is."""
    lines = ["", "### A head that is not trained", "", "`python -m benchmarks.bench_frozen_head --save`"]
    for entry in entries.values():
        values = entry.values
        lines += ["", f"**{values['tokens']:,} tokens, half ignored, vocabulary {values['vocabulary']:,}, hidden "
                  f"{values['hidden'][0]}, {values['dtype']}**; {entry.date}, {entry.machine}", ""]  # fmt: skip
        lines += ["| | seconds | spread | memory, MiB | products |", "|---|---:|---:|---:|---:|"]
        for name, row in values["rows"].items():
            timing = Timing(tuple(row["seconds"]))
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
            lines.append(f"| {name} | {timing.median:.3g} | {timing.spread:.1%} | {peak} | {row['products']:.2f} |")
    return lines


def kernels_of(entries: Entries) -> list[str]:
    lines = ["", "### Kernels alone", "", "`python -m benchmarks.bench_gpu --kernels --save`"]
    for entry in entries.values():
        values = entry.values
        lines += [
            "",
            f"**{values['rows']:,} rows, vocabulary {values['vocabulary']:,}**; {entry.date}, {entry.machine}",
            "",
        ]
        lines += ["| | ms | GB/s | GFLOP/s |", "|---|---:|---:|---:|"]
        for name, row in values["kernels"].items():
            time = statistics.median(row["ms"])
            lines.append(f"| {name} | {time:.3f} | {row['gb_per_s']:,.0f} | {row['gflop_per_s']:,.0f} |")
    return lines


# --------------------------------------------------------------------------------------------------------- README


def picture(name: str, alternative: str, folder: str) -> list[str]:
    """A picture that follows the reader's light or dark page."""
    return [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.png">',
        f'  <img alt="{alternative}" src="{folder}/{name}-light.png">',
        "</picture>",
    ]


def readme_block(results: Results) -> str:
    """What stands between the marks of the README."""
    machine = main_machine(results)
    if machine is None:
        return "Nothing is measured yet: `make bench-report` fills this in from `benchmarks/results`."
    subjects = results[machine]
    tables = tables_of(subjects["loss"], SHAPES)
    lines: list[str] = []
    if tables:
        lines += picture("loss", "Time over the floor and peak memory of pocl and its peers", "docs/pictures")
        lines += [
            "",
            "Forward KL, forward and backward, float32, half of the positions ignored; the *floor* is the four matrix",
            f"products that no exact method can save. {tables[0].machine}; {max(table.date for table in tables)}.",
        ]
        titles = [f"{t.values['tokens']:,} tokens, V = {t.values['vocabulary']:,}" for t in tables]
        lines += [
            "",
            "| time over the floor, peak memory | " + " | ".join(titles) + " |",
            "|---" * (1 + len(tables)) + "|",
        ]
        for name in SHORT:
            if any(name in table.values["rows"] for table in tables):
                cells = [cell(table.values, name, "MiB") for table in tables]
                lines.append(f"| {short(name, tables[0].versions)} | " + " | ".join(cells) + " |")
        lines += [
            "",
            "Logits grow with the tokens, pocl's scratch does not: of so few rows, a model's full logits are smaller",
            "than its workspace.",
        ]
    lines += ["", *headlines(subjects)]
    verdicts = [met(target.measured(subjects.get(group.subject, {}))) for group in GROUPS for target in group.targets]
    lines += ["", f"{verdicts.count(True)} of {len(verdicts)} targets are met, {verdicts.count(False)} missed and "
              f"{verdicts.count(None)} not measured on this machine:"]  # fmt: skip
    lines += ["[all of them, with spreads and the commands that measure them](benchmarks/RESULTS.md)."]
    if not any("loss-gpu" in hardware for hardware in results.values()):
        lines += ["No GPU has been measured yet."]
    return "\n".join(lines).strip("\n")


def headlines(subjects: Hardware) -> list[str]:
    """One line each for ranking and training."""
    lines = []
    difficulty, training = subjects.get("difficulty", {}), subjects.get("training", {})
    if "score" in difficulty:
        text = times_as_fast("authors", 3.0)(difficulty["score"].values)[0].text
        lines.append(f"- Ranking (cross-entropy, answers, ROUGE-L), against the authors' procedure: {text}.")
    else:
        lines.append("- Ranking against the authors' procedure: not measured on this hardware.")
    variants = list(training.values())[-1].values["variants"] if training else {}
    if {"cached", "authors"} <= variants.keys():
        text = step_time("cached", "authors", 0.2)(variants)[0].text
        lines.append(
            f"- A training step with the teacher's stored hidden states, as a share of the authors' time: {text}."
        )
    else:
        lines.append("- A training step against the authors' loop: not measured on this hardware.")
    return lines


def with_block(text: str, block: str) -> str:
    """A page with a new text between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the page needs the marks {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def pages(results: Results) -> dict[Path, str]:
    """Each page that is written, with its text."""
    readme = README.read_text(encoding="utf-8")
    return {PAGE: results_page(results), README: with_block(readme, readme_block(results))}


def draw(results: Results, folder: Path) -> list[Path]:
    """The pictures of the machine that the README shows; returns the files."""
    machine = main_machine(results)
    loss = results[machine]["loss"] if machine else {}
    drawn = []
    for name, make, tables in (
        ("loss", bars, tables_of(loss, SHAPES)),
        ("loss-vocabulary", curves, tables_of(loss, SWEEP)),
    ):
        for theme, colours in THEMES.items() if tables else ():
            drawn.append(folder / f"{name}-{theme}.png")
            make(tables, drawn[-1], colours)
    return drawn


def main() -> None:
    results = load_results()
    written = [*draw(results, PICTURES), *pages(results)]
    for path, text in pages(results).items():
        path.write_text(text, encoding="utf-8")
    print("wrote", *(path.relative_to(ROOT) for path in written))


if __name__ == "__main__":
    main()
