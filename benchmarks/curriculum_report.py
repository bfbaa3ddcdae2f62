"""`docs/evidence.md` from the results of `benchmarks.curriculum_experiment`: tables, intervals and a picture.

    python -m benchmarks.curriculum_report

The text around the marked block is written by hand; what stands between the marks is replaced.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.curriculum_experiment import ARMS, LOSSES, RESULTS, SEEDS

PAGE = Path(__file__).parent.parent / "docs" / "evidence.md"
PICTURE = PAGE.parent / "pictures" / "curriculum.png"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
NAMES = {
    "plain": "plain KD",
    "pocl": "POCL",
    "one_pass": "one pass",
    "reversed": "reversed",
    "shuffled": "shuffled",
    "temperature": "rising temperature and ratio",
    "order": "order alone",
}
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571)

Key = tuple[str, str, int]


def load() -> dict[Key, dict[str, Any]]:
    """All results, by loss, arm and seed."""
    found = {}
    for path in sorted(RESULTS.glob("*-*-*.json")):
        result = json.loads(path.read_text())
        found[result["loss"], result["arm"], result["seed"]] = result
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % confidence interval (Student's t), infinite for a single value."""
    n = len(values)
    if n < 2:
        return statistics.fmean(values), math.inf
    return statistics.fmean(values), T95[n - 1] * statistics.stdev(values) / math.sqrt(n)


def differences(results: dict[Key, dict[str, Any]], arm: str, metric: str, losses: Sequence[str]) -> list[float]:
    """Arm minus plain KD from the same student on the same samples: one value a seed, the mean over the losses.

    Losses share the samples of a seed and the test set, so they are not independent; a seed without all of them is left
    out.
    """

    def of(loss: str, seed: int) -> float:
        return float(results[loss, arm, seed][metric] - results[loss, "plain", seed][metric])

    whole = [s for s in SEEDS if all((loss, a, s) in results for loss in losses for a in (arm, "plain"))]
    return [statistics.fmean(of(loss, seed) for loss in losses) for seed in whole]


def cell(values: Sequence[float], digits: int, scale: float = 1.0, sign: bool = False) -> str:
    """`mean ± half interval`, in bold where the interval of a difference leaves out zero."""
    if not values:
        return "-"
    mean, half = interval([scale * value for value in values])
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    text += f" ± {half:.{digits}f}" if math.isfinite(half) else ""
    return f"**{text}**" if sign and abs(mean) > half else text


def table(results: dict[Key, dict[str, Any]], metric: str, digits: int, scale: float) -> list[str]:
    """One row an arm, one column a loss; mean over the seeds and the 95 % interval of the mean."""
    lines = ["| | " + " | ".join(LOSSES) + " |", "|---" * (1 + len(LOSSES)) + "|"]
    for arm in ARMS:
        values = [[r[metric] for key, r in results.items() if key[:2] == (loss, arm)] for loss in LOSSES]
        lines.append(f"| {NAMES[arm]} | " + " | ".join(cell(v, digits, scale) for v in values) + " |")
    return lines


def paired(results: dict[Key, dict[str, Any]]) -> list[str]:
    """Arms against plain KD, all losses together."""
    lines = ["| arm minus plain KD | KL, nats per token | cross-entropy | ROUGE-L x 100 |", "|---" * 4 + "|"]
    for arm in ARMS[1:]:
        columns = [differences(results, arm, metric, LOSSES) for metric in ("kl_to_teacher", "cross_entropy")]
        rouge = differences(results, arm, "rouge_l", LOSSES)
        cells = [cell(column, 3, sign=True) for column in columns] + [cell(rouge, 2, 100.0, sign=True)]
        lines.append(f"| {NAMES[arm]} | " + " | ".join(cells) + " |")
    return lines


def paired_by_loss(results: dict[Key, dict[str, Any]], metric: str, digits: int, scale: float) -> list[str]:
    """Arms against plain KD, each loss alone."""
    lines = ["| arm minus plain KD | " + " | ".join(LOSSES) + " |", "|---" * (1 + len(LOSSES)) + "|"]
    for arm in ARMS[1:]:
        values = [differences(results, arm, metric, (loss,)) for loss in LOSSES]
        lines.append(f"| {NAMES[arm]} | " + " | ".join(cell(v, digits, scale, sign=True) for v in values) + " |")
    return lines


def picture(results: dict[Key, dict[str, Any]], path: Path) -> None:
    """Learning curves, a panel a loss, and the paired differences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(LOSSES) + 1, figsize=(16, 4.6), layout="constrained")
    colours = dict(zip(ARMS, ("black", *pyplot.get_cmap("tab10").colors), strict=False))  # type: ignore[attr-defined]
    for axis, loss in zip(axes, LOSSES, strict=False):
        for arm in ARMS:
            curves = [r["curve"] for key, r in results.items() if key[:2] == (loss, arm)]
            if curves:
                steps = [point[0] for point in curves[0]]
                means = [statistics.fmean(points) for points in zip(*([p[1] for p in c] for c in curves), strict=True)]
                style = {"linewidth": 2.2} if arm in ("plain", "pocl") else {"linewidth": 1.1, "alpha": 0.8}
                axis.plot(steps, means, color=colours[arm], label=NAMES[arm], marker=".", **style)  # type: ignore[arg-type]
        axis.set(title=loss, xlabel="optimizer steps")
    axes[0].set_ylabel("KL on validation samples, nats per token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS), frameon=False)
    axis = axes[-1]
    for place, arm in enumerate(ARMS[1:]):
        values = differences(results, arm, "kl_to_teacher", LOSSES)
        if values:
            mean, half = interval(values)
            single = [x for loss in LOSSES for x in differences(results, arm, "kl_to_teacher", (loss,))]
            axis.plot(single, [place] * len(single), "o", color=colours[arm], alpha=0.35, markersize=4)
            axis.errorbar(mean, place, xerr=half if math.isfinite(half) else 0, fmt="D", color=colours[arm], capsize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(ARMS) - 1), [NAMES[arm] for arm in ARMS[1:]])
    axis.invert_yaxis()
    axis.set(title="test KL minus plain KD", xlabel="nats per token; left is better")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def block(results: dict[Key, dict[str, Any]], baselines: dict[str, Any]) -> str:
    """The text between the marks."""
    settings = next(iter(results.values()))["settings"]
    steps = sorted({result["steps"] for result in results.values()})
    complete = len(results) == len(LOSSES) * len(ARMS) * len(SEEDS)
    start, teacher = baselines["start"], baselines["teacher"]
    lines = [
        f"{len(results)} of {len(LOSSES) * len(ARMS) * len(SEEDS)} cells"
        + ("" if complete else " (the rest is not run yet; the intervals use what is there)")
        + f"; {settings['num_train']} training samples, {settings['num_test']} test samples, "
        f"{', '.join(map(str, steps))} optimizer steps of {settings['batch_size']} samples, learning rate "
        f"{settings['learning_rate']:g}.",
        "",
        f"Before training, the student's KL to the teacher is {start['kl_to_teacher']:.3f} nats per token, its "
        f"cross-entropy {start['cross_entropy']:.3f} and its ROUGE-L {100 * start['rouge_l']:.2f}; the teacher has "
        f"{teacher['cross_entropy']:.3f} and {100 * teacher['rouge_l']:.2f}.",
        "",
        f"**Against plain KD**, all losses: mean of the four, then mean over {len(SEEDS)} seeds and its 95 % interval; "
        "bold where it leaves out zero:",
        "",
        *paired(results),
        "",
        "**The same for each loss, KL**, nats per token:",
        "",
        *paired_by_loss(results, "kl_to_teacher", 3, 1.0),
        "",
        "**The same for each loss, ROUGE-L x 100**:",
        "",
        *paired_by_loss(results, "rouge_l", 2, 100.0),
        "",
        "**KL to the teacher on test samples**, nats per token; mean over seeds and 95 % interval:",
        "",
        *table(results, "kl_to_teacher", 3, 1.0),
        "",
        "**ROUGE-L x 100 of greedy answers**:",
        "",
        *table(results, "rouge_l", 2, 100.0),
        "",
        "**Cross-entropy of the reference answers**, nats per token:",
        "",
        *table(results, "cross_entropy", 3, 1.0),
        "",
        "![Learning curves and paired differences](pictures/curriculum.png)",
    ]
    return "\n".join(lines)


def main() -> None:
    results = load()
    if not results:
        raise SystemExit(f"no results in {RESULTS}; run `python -m benchmarks.curriculum_experiment --data ...` first")
    baselines = json.loads((RESULTS / "baselines.json").read_text())
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{block(results, baselines)}\n{END}{after}", encoding="utf-8")
    picture(results, PICTURE)
    print(f"wrote {PAGE.name} and {PICTURE.name} from {len(results)} results")


if __name__ == "__main__":
    main()
