"""The tables of `docs/scaling.md`: 7B -> 1B and 70B -> 8B on one and on 64 H100s, computed by `roofline.py`.

`python -m benchmarks.scaling` prints them, `--write` puts them into the page. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.roofline import (
    BATCH,
    H100,
    PAIRS,
    VOCABULARIES,
    Pair,
    fast_loss,
    flops,
    full_logits_loss,
    gathered,
    low_loss,
    passes_until_cache_pays,
    rows_of_chunk,
    seconds,
    sharded_loss,
    student_seconds,
    teacher_exchange,
    teacher_seconds,
    traffic,
    training_exchange,
    training_state,
)

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
PART = re.compile(r"(<!-- computed: (\w+) -->\n).*?(<!-- end of computed -->\n)", re.DOTALL)

GPUS = 64
NODES = GPUS // H100.gpus_of_node
WORKSPACE_MB = 2048.0  # of "fast"
LOW_WORKSPACE_MB = 96.0  # the default of "low"
COPIES = 10  # float32 copies of all logits in the authors' loop
DISKS = (0.1e9, 0.5e9, 2e9)  # bytes a second for each GPU
PASSES = (1, 2, 4, 20)  # 20: the paper's four stages of 8 epochs
TOKENS = (10**7, 10**8, 10**9)  # label tokens of a data set


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ms(time: float) -> str:
    return f"{1e3 * time:,.1f}" if time < 0.1 else f"{1e3 * time:,.0f}"


def gb(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size < 1e11 else f"{size / 1e9:,.0f}"


def cases() -> list[tuple[Pair, int]]:
    return [(pair, V) for pair in PAIRS for V in VOCABULARIES]


def loss_seconds(pair: Pair, V: int) -> float:
    return seconds(fast_loss(pair, V, BATCH.rows, WORKSPACE_MB))


def gradients_of_loss(pair: Pair, V: int) -> float:
    """Bytes of the float32 gradients that the fused loss makes: of the head and of the hidden states."""
    return 4 * (V + BATCH.rows) * pair.student.hidden


# ------------------------------------------------------------------------------------------------------------- tables


def assumptions() -> str:
    g, b = H100, BATCH
    models = {model.name: model for pair in PAIRS for model in (pair.teacher, pair.student)}
    rows = [
        ["matrix products", f"{g.matrix_flops / 1e12:,.0f} TFLOP/s bf16 dense, {g.matrix_fraction:.0%} of it reached"],
        ["memory", f"{g.memory / 1e9:.0f} GB, {g.memory_bandwidth / 1e12} TB/s, {g.memory_fraction:.0%} of it reached"],
        ["other arithmetic", f"{g.vector_flops / 1e12:.0f} TFLOP/s float32"],
        [
            "links of one GPU",
            f"NVLink {g.nvlink / 1e9:.0f} GB/s each way in a node of {g.gpus_of_node}, network "
            f"{g.network / 1e9:.0f} GB/s between nodes, {g.link_fraction:.0%} of both reached",
        ],
        [
            "models",
            "; ".join(
                f"{name}: H {m.hidden:,}, {m.layers} layers, {m.backbone / 1e9:g} B parameters"
                f"{', head tied' if m.tied else ''}"
                for name, m in models.items()
            )
            + "; parameters without embedding and head",
        ],
        [
            "step",
            f"{b.sequences} sequences of {b.length:,} tokens, {b.response:.0%} of them response; a GPU takes "
            f"{b.micro_sequences} sequences at a time ({b.positions:,} positions, {b.rows:,} label tokens)",
        ],
        [
            "training",
            "bf16 models, float32 master weights and AdamW (16 bytes a parameter), activations of 34 bytes a position, "
            "hidden unit and layer, none recomputed; attention over half the sequence on average",
        ],
        [
            "64 GPUs",
            "the student sharded over the GPUs of a node and replicated over nodes: weights gathered twice a step, "
            "gradients reduced in float32; an online teacher sharded likewise",
        ],
        [
            "left out",
            "the host where the GPU waits for it, data loading, the optimizer's own time, imbalance; operations "
            "do not overlap",
        ],
    ]
    return table(["what", "taken to be"], rows)


def memory() -> str:
    rows = []
    for pair, V in cases():
        full = COPIES * 4 * BATCH.positions * V
        made = gradients_of_loss(pair, V)
        fast, low = (made + mb * 2**20 for mb in (WORKSPACE_MB, LOW_WORKSPACE_MB))
        cells = [gb(full / COPIES), gb(full), gb(full * BATCH.response), gb(fast), gb(low), f"{full / fast:.0f}"]
        rows.append([pair.name, f"{V:,}", *cells])
    header = ["pair", "V", "one float32 copy", f"{COPIES} copies", "of label tokens alone"]
    return table([*header, "`fast`, 2 GiB", "`low`", f"{COPIES} copies / `fast`"], rows)


def loss() -> str:
    rows = []
    for pair, V in cases():
        fast = fast_loss(pair, V, BATCH.rows, WORKSPACE_MB)
        floor = flops(fast) / (H100.matrix_flops * H100.matrix_fraction)
        mixture = fast_loss(pair, V, BATCH.rows, WORKSPACE_MB, "skew_rkl")
        small = fast_loss(pair, V, BATCH.rows, 256)
        low = low_loss(pair, V, BATCH.rows, LOW_WORKSPACE_MB)
        full = full_logits_loss(pair, V, BATCH.positions, COPIES)
        rows.append(
            [
                pair.name,
                f"{V:,}",
                f"{flops(fast) / 1e12:.1f}",
                ms(floor),
                f"{rows_of_chunk(pair, V, BATCH.rows, WORKSPACE_MB):,}",
                gb(traffic(fast)),
                f"**{ms(seconds(fast))}**",
                f"{seconds(fast) / floor:.2f}",
                *(ms(seconds(work)) for work in (mixture, small, low, full)),
            ]
        )
    header = ["pair", "V", "TFLOP", "floor ms", "rows a chunk", "GB moved", "`fast` ms", "/ floor", "skew RKL ms"]
    return table([*header, "`fast` in 256 MiB ms", "`low` ms", "full logits ms"], rows)


def step() -> str:
    rows = []
    for pair, V in cases():
        teacher, student, own = teacher_seconds(pair), student_seconds(pair), loss_seconds(pair, V)
        cached, online = student + own, teacher + student + own
        exchange = training_exchange(pair.student.parameters(V), NODES).seconds()
        for_teacher = teacher_exchange(pair.teacher.parameters(V)).seconds()
        rows.append(
            [
                pair.name,
                f"{V:,}",
                *map(ms, (teacher, student, own)),
                f"{own / cached:.0%}",
                *(f"{BATCH.micro_batches * time:,.1f}" for time in (online, cached)),
                *map(ms, (online, cached, exchange + for_teacher, exchange)),
                f"{online / cached:.1f}",
            ]
        )
    header = ["pair", "V", "teacher ms", "student ms", "loss ms", "loss / cached"]
    one = ["1 GPU online s", "1 GPU cached s"]
    many = ["64 GPUs online ms", "64 GPUs cached ms", "links online ms", "links cached ms"]
    return table([*header, *one, *many, "online / cached"], rows)


def fits() -> str:
    rows = []
    n = H100.gpus_of_node
    for pair, V in cases():
        student, teacher = training_state(pair.student, V), 2 * pair.teacher.parameters(V)
        head, own = 2 * V * pair.teacher.hidden, gradients_of_loss(pair, V) + WORKSPACE_MB * 2**20
        kept, few = (pair.student.activations(BATCH.positions, recomputed=again) for again in (False, True))
        # a sharded student's own head is whole while the loss runs
        shared = student / n + 2 * V * pair.student.hidden + own + head
        alone = student + own + kept
        needs = (alone + teacher, alone + head, shared + teacher / n + kept, shared + kept, shared + few)
        cells = [f"{gb(need)}{'' if need < H100.memory else ' (no)'}" for need in needs]
        rows.append([pair.name, f"{V:,}", *map(gb, (student, kept, teacher, head)), *cells])
    header = ["pair", "V", "student in training", "its activations", "teacher", "teacher's head"]
    one = ["1 GPU online", "1 GPU cached"]
    return table([*header, *one, "64 GPUs, sharded teacher", "64 GPUs cached", "and recomputing"], rows)


def sharing() -> str:
    rows = []
    n = H100.gpus_of_node
    for pair, V in cases():
        hidden_s, hidden_t = pair.student.hidden, pair.teacher.hidden
        links = gathered(2 * V * (hidden_s + hidden_t) + 4 * V * hidden_s, n)
        heads = 2 * V * (hidden_s + hidden_t) + 4 * V * hidden_s
        tokens = BATCH.rows * (2 * (hidden_s + hidden_t) + 4 * hidden_s)
        work, sent = sharded_loss(pair, V, n * BATCH.rows, WORKSPACE_MB, n)
        states = gathered(2 * n * BATCH.rows * (hidden_s + hidden_t), n)
        rows.append(
            [
                pair.name,
                f"{V:,}",
                gb(heads + tokens),
                ms(H100.nvlink_seconds(links)),
                ms(loss_seconds(pair, V)),
                gb(heads / n + n * tokens),
                ms(H100.nvlink_seconds(sent)),
                ms(H100.nvlink_seconds(states)),
                ms(seconds(work)),
            ]
        )
    header = ["pair", "V", "whole heads, GB held", "links ms", "loss ms"]
    return table([*header, "shared vocabulary, GB held", "links ms", "+ other samples ms", "loss ms"], rows)


def cache() -> str:
    rows = []
    for pair in PAIRS:
        token = 2 * pair.teacher.hidden
        logits = [f"{2 * V / token:.0f}" for V in (VOCABULARIES[0], VOCABULARIES[-1])]
        rate = BATCH.rows * token / (student_seconds(pair) + loss_seconds(pair, VOCABULARIES[0]))
        sizes = [f"{count * token / 1e12:,.2f}" for count in TOKENS]
        build = TOKENS[1] * teacher_seconds(pair) / BATCH.rows / 3600
        rows.append([pair.name, f"{token / 1024:g}", *logits, *sizes, f"{build:,.1f}", gb(rate), gb(8 * rate)])
    header = ["pair", "KiB a token", f"logits at {VOCABULARIES[0]:,} / it", f"logits at {VOCABULARIES[-1]:,} / it"]
    header += [f"TB for {count:.0e} tokens".replace("e+0", "e") for count in TOKENS]
    return table(
        [*header, f"GPU-hours to build {TOKENS[1]:.0e}".replace("e+0", "e"), "GB/s a GPU", "GB/s a node"], rows
    )


def pays() -> str:
    rows = []
    for pair in PAIRS:
        teacher, token = teacher_seconds(pair) / BATCH.rows, 2 * pair.teacher.hidden
        pass_ = (student_seconds(pair) + loss_seconds(pair, VOCABULARIES[0])) / BATCH.rows
        for disk in DISKS:
            wait = token / disk
            first = passes_until_cache_pays(teacher, wait, wait)
            hours = []
            for passes in PASSES:
                online, cached = passes * (teacher + pass_), teacher + wait + passes * (wait + pass_)
                hours.append(" / ".join(f"{time * TOKENS[1] / 3600:,.1f}" for time in (online, cached)))
            from_ = "never" if math.isinf(first) else f"{math.floor(first) + 1}"
            rows.append([pair.name, f"{disk / 1e9:g}", f"{1e6 * teacher:,.1f}", f"{1e6 * wait:,.1f}", from_, *hours])
    header = ["pair", "disk GB/s a GPU", "teacher µs a token", "disk µs a token", "pays from pass"]
    return table([*header, *(f"{passes} pass{'es' * (passes > 1)}" for passes in PASSES)], rows)


def findings() -> str:
    small, large = PAIRS
    low, high = VOCABULARIES[0], VOCABULARIES[-1]
    copies = [COPIES * 4 * BATCH.positions * V / 1e9 for V in (low, high)]
    ours = [(gradients_of_loss(pair, V) + WORKSPACE_MB * 2**20) / 1e9 for pair, V in ((small, low), (large, high))]
    fast = [fast_loss(pair, V, BATCH.rows, WORKSPACE_MB) for pair, V in cases()]
    floors = [seconds(work) * H100.matrix_flops * H100.matrix_fraction / flops(work) for work in fast]
    lows = [
        seconds(low_loss(pair, V, BATCH.rows, LOW_WORKSPACE_MB)) / seconds(work)
        for (pair, V), work in zip(cases(), fast, strict=True)
    ]
    shares = [loss_seconds(p, V) / (student_seconds(p) + loss_seconds(p, V)) for p, V in cases()]
    saved = [[1 + teacher_seconds(p) / (student_seconds(p) + loss_seconds(p, V)) for V in (high, low)] for p in PAIRS]
    bounds = [2 * p.teacher.hidden / (teacher_seconds(p) / BATCH.rows) / 1e6 for p in PAIRS]
    lines = [
        f"The logits of a micro-batch, as the authors' loop keeps them, take {copies[0]:,.0f} GB at V = {low:,} and "
        f"{copies[1]:,.0f} GB at {high:,}, more than the GPU has. The fused loss takes {ours[0]:.1f} to {ours[1]:.1f} "
        f"GB: {WORKSPACE_MB * 2**20 / 1e9:.1f} GB of workspace, and the float32 gradients of head and hidden states.",
        f"With that workspace `fast` comes to {min(floors):.2f} to {max(floors):.2f} times its floor. In the default "
        f"of 256 MiB it would be slow, so that `auto` takes `low`: {min(lows):.1f} to {max(lows):.1f} times the time.",
        f"Without a teacher to run, the loss is {min(shares):.0%} to {max(shares):.0%} of the computing of a step: "
        "the smaller the student and the larger the vocabulary, the more it is the loss that must be fast.",
        f"The stored teacher makes the computing of a step {saved[0][0]:.1f} to {saved[0][1]:.1f} times ({small.name}) "
        f"and {saved[1][0]:.1f} to {saved[1][1]:.1f} times ({large.name}) as fast. It pays from the second pass on "
        f"where the disk gives each GPU 2 GB/s, and the paper's curriculum makes {PASSES[-1]}. A disk that gives less "
        f"than {bounds[0]:.0f} or {bounds[1]:.0f} MB/s "
        "is slower than the teacher itself.",
        f"{large.name} does not fit on one GPU at all; on {GPUS} it needs a sharded student, the cache or a sharded "
        "teacher, and activations that are recomputed, at a third more time for the student.",
    ]
    return "".join(f"- {line}\n" for line in lines)


PARTS = {
    made.__name__: made for made in (findings, assumptions, memory, loss, step, fits, sharing, cache, pays)
}  # fmt: skip


def with_tables(page: str) -> str:
    """The page with every computed part brought up to date."""
    missing = PARTS.keys() - {found[2] for found in PART.finditer(page)}
    if missing:
        raise ValueError(f"the page has no place for: {', '.join(sorted(missing))}")
    return PART.sub(lambda found: found[1] + PARTS[found[2]]() + found[3], page)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"bring docs/{PAGE.name} up to date")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text()))
        return
    for name, made in PARTS.items():
        print(f"{name}\n\n{made()}")


if __name__ == "__main__":
    main()
