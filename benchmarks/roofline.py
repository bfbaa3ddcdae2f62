"""What a distillation step must compute, move and wait for on H100s: reckoned from counts and ceilings, not measured.

An operation takes the longer of its arithmetic and its traffic at the ceilings below; operations follow one another.
Matrix products read each factor once and write the result once. What the row kernels do comes from their own `cost()`,
how many rows a chunk has from the functions that the GPU backend itself calls.

N rows (label tokens) of a micro-batch, V vocabulary, H_s and H_t hidden sizes; bytes, flops and seconds throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pocl_kernels.divergences import get_divergence
from pocl_kernels.plan import Gradients
from pocl_kernels.triton_backend import divergence_rows, tile_gradient, tile_statistics, tile_values
from pocl_kernels.triton_backend.layout import MIB, SLICE_BYTES, Demand, demand, fast_layout, slice_rows, tile_shape
from pocl_kernels.triton_backend.terms import slope_sum


@dataclass(frozen=True)
class Machine:
    """Ceilings of NVIDIA's data sheet, and the fraction of each that is taken to be reached."""

    matrix_flops: float = 989e12  # bf16, dense
    matrix_fraction: float = 0.6
    vector_flops: float = 67e12  # float32, no tensor cores
    memory_bandwidth: float = 3.35e12
    memory_fraction: float = 0.8
    memory: float = 80e9
    nvlink: float = 450e9  # of one GPU, in one direction
    network: float = 50e9  # of one GPU: 400 Gbit/s InfiniBand each
    link_fraction: float = 0.8
    gpus_of_node: int = 8

    multiprocessors: int = 132
    issued: float = 132 * 4 * 32 * 1.755e9  # instructions of single threads a second
    issued_fraction: float = 0.9
    cache: float = 40e6  # of 50 MB, what stays of the rows that are in flight
    rows_in_flight: int = 2 * 132
    launch: float = 2e-6  # from the end of a kernel to the next one's start

    def seconds(self, work: Work) -> float:
        rate = self.vector_flops if work.vector else self.matrix_flops * self.matrix_fraction * work.fill
        memory = work.bytes / (self.memory_bandwidth * self.memory_fraction)
        return max(work.flops / rate, memory, work.instructions / (self.issued * self.issued_fraction))

    def fill(self, rows: float, columns: float) -> float:
        """Share of the multiprocessors' time that a product's tiles of 128 x 256 use: the last wave is not full."""
        waves = math.ceil(rows / 128) * math.ceil(columns / 256) / self.multiprocessors
        return waves / math.ceil(waves)

    def gaps(self, work: Sequence[Work]) -> float:
        return self.launch * len(work)

    def nvlink_seconds(self, size: float) -> float:
        return size / (self.nvlink * self.link_fraction)

    def network_seconds(self, size: float) -> float:
        return size / (self.network * self.link_fraction)


H100 = Machine()


class Work(NamedTuple):
    """One operation; `vector`: without tensor cores."""

    flops: float
    bytes: float
    vector: bool = False
    fill: float = 1.0  # of the multiprocessors, in a product
    instructions: float = 0.0


# An entry of `divergence_rows`, both models and all passes, float32 logits and a float16 gradient: `make aot`, sm_90.
INSTRUCTIONS = {
    "fkl": 99, "rkl": 123, "skew_fkl": 189, "skew_rkl": 223, "jsd": 208, "tvd": 127, "jeffreys": 144, "alpha": 208,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A dense decoder. `backbone`: parameters without embedding and head, which `tied` makes one matrix."""

    name: str
    hidden: int
    layers: int
    backbone: float
    tied: bool = False

    def parameters(self, V: int) -> float:
        return self.backbone + V * self.hidden * (1 if self.tied else 2)

    def forward_flops(self, positions: float, length: int) -> float:
        """Of the backbone: 2 a parameter, and causal attention over half of `length` on average."""
        return positions * (2 * self.backbone + 2 * length * self.hidden * self.layers)

    def activations(self, positions: float, *, recomputed: bool = False) -> float:
        """Bytes kept for the backward pass: 34 a position, hidden unit and layer (Korthikanti et al., arXiv 2205.05198)
        with fused attention; `recomputed`: 2, the layers' inputs, and one layer in full.
        """
        unit = positions * self.hidden
        return (2 * self.layers + 34) * unit if recomputed else 34 * self.layers * unit


@dataclass(frozen=True)
class Pair:
    teacher: Model
    student: Model

    @property
    def name(self) -> str:
        return f"{self.teacher.name} -> {self.student.name}"


PAIRS = (
    Pair(Model("7B", 4096, 32, 6.5e9), Model("1B", 2048, 16, 0.97e9, tied=True)),
    Pair(Model("70B", 8192, 80, 68.5e9), Model("8B", 4096, 32, 7.0e9)),
)
VOCABULARIES = (128_256, 151_936, 262_144)


@dataclass(frozen=True)
class Batch:
    """What one optimizer step sees. `response`: share of the positions that have a label."""

    sequences: int = 512
    length: int = 2048
    response: float = 0.5
    micro_sequences: int = 8  # of one GPU at a time

    @property
    def positions(self) -> int:
        """Of one GPU's micro-batch."""
        return self.micro_sequences * self.length

    @property
    def rows(self) -> int:
        """Label tokens of one GPU's micro-batch."""
        return round(self.positions * self.response)

    @property
    def micro_batches(self) -> int:
        """Of a step, over all GPUs."""
        return self.sequences // self.micro_sequences


BATCH = Batch()


# ------------------------------------------------------------------------------------------------------------ the loss


def demands(pair: Pair, V: int) -> list[Demand]:
    """Student's and teacher's, of bf16 models with a trained head."""

    def made(model: Model, wanted: Gradients) -> Demand:
        return demand(model.hidden, V, torch.bfloat16, torch.float32, (torch.bfloat16, torch.float16), wanted, False)

    return [made(pair.student, Gradients(True, True, False)), made(pair.teacher, Gradients(False, False, False))]


def rows_of_chunk(pair: Pair, V: int, rows: int, workspace_mb: float) -> int:
    """Rows that `memory="fast"` takes at a time on a GPU."""
    return fast_layout(rows, demands(pair, V), int(workspace_mb * MIB), later=True).chunk


def tile_of_low(pair: Pair, V: int, rows: int, workspace_mb: float) -> tuple[int, int]:
    """Rows and columns of a tile of `memory="low"` on a GPU."""
    return tile_shape(rows, demands(pair, V), int(workspace_mb * MIB))


def product(rows: float, columns: float, hidden: int, moved: float, fill: float = 1.0) -> Work:
    """A product of 2 rows columns hidden flops that moves so many bytes."""
    return Work(2 * rows * columns * hidden, moved, fill=fill)


def project(rows: float, columns: float, hidden: int) -> Work:
    """16-bit factors, float32 result."""
    moved = 2 * columns * hidden + 2 * rows * hidden + 4 * rows * columns
    return product(rows, columns, hidden, moved, H100.fill(rows, columns))


def back(rows: float, columns: float, hidden: int, *, first: bool, hidden_once: bool) -> list[Work]:
    """From a float16 gradient tile to the gradients of hidden states and weight, both float32.

    `first` writes the weight's gradient, later chunks add to it; `hidden_once`: the tile has the whole vocabulary.
    """
    convert = Work(0, 4 * columns * hidden, vector=True)  # a bf16 head in float16, slice by slice
    slices = -(-columns * hidden * 2 // SLICE_BYTES)  # each adds to the hidden states' gradient
    states = (8 * slices - (4 if hidden_once else 0)) * rows * hidden
    to_hidden = product(rows, columns, hidden, 2 * rows * columns + 2 * columns * hidden + states)
    weight = (4 if first else 8) * columns * hidden
    to_weight = product(rows, columns, hidden, 2 * rows * columns + 2 * rows * hidden + weight)
    return [convert, to_hidden, to_weight]


def rounding(pair: Pair, V: int, rows: int) -> Work:
    """In the backward pass: scaled by the upstream gradient and rounded to bf16 in one kernel."""
    return Work(0, 6 * (V + rows) * pair.student.hidden, vector=True)


def row_kernel(n: int, V: int, divergence: str, machine: Machine = H100) -> Work:
    """`divergence_rows`. At the turn from a pass to the next, the cache holds a part of the rows in flight."""
    known = slope_sum(get_divergence(divergence)) is not None
    cost = divergence_rows.cost(n, V, labels=True, slope_sum_known=known, gradient_bytes=2)
    found = min(1.0, machine.cache / (min(n, machine.rows_in_flight) * 8 * V)) * (1 if known else 2) * 8 * V * n
    return Work(cost.flops, cost.bytes - found, True, instructions=INSTRUCTIONS[divergence] * n * V)


def fast_loss(pair: Pair, V: int, rows: int, workspace_mb: float, divergence: str = "fkl") -> list[Work]:
    """`memory="fast"`: 3 S + Te, chunk by chunk, the weight's gradient group by group."""
    H = pair.student.hidden
    layout = fast_layout(rows, demands(pair, V), int(workspace_mb * MIB), later=True)
    work = [Work(0, 4 * V * H, vector=True)] if layout.whole_heads else []  # a bf16 head in float16
    for top in range(0, rows, layout.group):
        group = min(layout.group, rows - top)
        for first in range(0, group, layout.chunk):
            n = min(layout.chunk, group - first)
            work += [project(n, V, H), project(n, V, pair.teacher.hidden), row_kernel(n, V, divergence)]
            slices = (
                1 if layout.whole_heads else -(-V // slice_rows(V, H, 2))
            )  # each adds to the hidden states' gradient
            work += [] if layout.whole_heads else [Work(0, 2 * V * H / slices, vector=True)] * slices
            moved = (2 * n * V + 2 * V * H) / slices + (8 if slices > 1 else 4) * n * H
            work += [product(n, V / slices, H, moved, H100.fill(n, H))] * slices
        if layout.group >= rows:  # a slice at a time, rounded from the cache
            slices = -(-V // slice_rows(V, H, 4))
            moved = 2 * rows * V / slices + 2 * rows * H
            work += [product(rows, V / slices, H, moved, H100.fill(V / slices, H))] * slices
            work += [Work(0, 2 * V * H / slices, vector=True)] * slices
        else:
            moved = 2 * group * V + 2 * group * H + (4 if top == 0 else 8) * V * H
            work += [product(group, V, H, moved, H100.fill(V, H))]
    rounded = rows if layout.group >= rows else V + rows
    return [*work, Work(0, 6 * rounded * H, vector=True)]  # times the upstream gradient, in one kernel


def low_loss(pair: Pair, V: int, rows: int, workspace_mb: float) -> list[Work]:
    """`memory="low"` of a forward KL: S + Te forward, 3 S + Te backward, tile by tile."""
    height, width = tile_of_low(pair, V, rows, workspace_mb)
    work: list[Work] = []
    for top in range(0, rows, height):
        n = min(height, rows - top)
        for left in range(0, V, width):
            w = min(width, V - left)
            statistics = tile_statistics.cost(n, w, teacher=True, kl=True)
            gradient = tile_gradient.cost(n, w, teacher=True, labels=True, gradient_bytes=2)
            logits = [project(n, w, pair.student.hidden), project(n, w, pair.teacher.hidden)]
            work += [*logits, Work(statistics.flops, statistics.bytes, True)]
            work += [*logits, Work(gradient.flops, gradient.bytes, True)]
            work += back(n, w, pair.student.hidden, first=top == 0, hidden_once=False)
    return [*work, rounding(pair, V, rows)]


def full_logits_loss(pair: Pair, V: int, positions: int, copies: int = 10) -> list[Work]:
    """Logits of every position, as the authors' loop has them: float32 copies, each written and read once."""
    S, Te = (2 * positions * V * model.hidden for model in (pair.student, pair.teacher))
    return [Work(3 * S + Te, 0), Work(0, copies * 8 * positions * V, True)]


def sharded_loss(pair: Pair, V: int, rows: int, workspace_mb: float, processes: int) -> tuple[list[Work], float]:
    """A vocabulary shared by `processes`, which all see the same `rows`: one process's work, and bytes over links.

    The logits of a chunk are made once; each row's sums, then (D, c), then the hidden states' gradient are all-reduced.
    """
    share = -(-V // processes)
    size = rows_of_chunk(pair, share, rows, workspace_mb)
    work: list[Work] = []
    for first in range(0, rows, size):
        n = min(size, rows - first)
        statistics = tile_statistics.cost(n, share, teacher=True, kl=False)
        values = tile_values.cost(n, share)
        gradient = tile_gradient.cost(n, share, teacher=True, labels=True, gradient_bytes=2)
        work += [project(n, share, pair.student.hidden), project(n, share, pair.teacher.hidden)]
        work += [Work(cost.flops, cost.bytes, True) for cost in (statistics, values, gradient)]
        work += back(n, share, pair.student.hidden, first=first == 0, hidden_once=True)
    reduced = rows * (4 * (10 + 2) + 4 * pair.student.hidden)  # 10 sums and maxima, D and c, dh
    return [*work, rounding(pair, share, rows)], all_reduced(reduced, processes)


# ------------------------------------------------------------------------------------------------------ between GPUs


def all_reduced(size: float, processes: int) -> float:
    """Bytes that one process sends in a ring for an all-reduce of `size`."""
    return 2 * (processes - 1) / processes * size


def gathered(size: float, processes: int) -> float:
    """Bytes that one process receives in an all-gather to `size`, or sends in a reduce-scatter of it."""
    return (processes - 1) / processes * size


class Exchange(NamedTuple):
    """Bytes of one GPU in one step, over the links of its node and between nodes."""

    nvlink: float
    network: float

    def seconds(self, machine: Machine = H100) -> float:
        return machine.nvlink_seconds(self.nvlink) + machine.network_seconds(self.network)


def training_exchange(parameters: float, nodes: int, machine: Machine = H100) -> Exchange:
    """A student sharded in each node and replicated over nodes: weights gathered twice, float32 gradients reduced."""
    n = machine.gpus_of_node
    in_node = gathered(2 * 2 * parameters + 4 * parameters, n)
    return Exchange(in_node, all_reduced(4 * parameters / n, nodes))


def teacher_exchange(parameters: float, machine: Machine = H100) -> Exchange:
    """A 16-bit teacher sharded in each node: its weights gathered once a micro-batch."""
    return Exchange(gathered(2 * parameters, machine.gpus_of_node), 0.0)


# -------------------------------------------------------------------------------------------------------- whole steps


def seconds(work: list[Work], machine: Machine = H100) -> float:
    """With a gap after every kernel. The host's own time is hidden while it is shorter (`bench_host`)."""
    return sum(map(machine.seconds, work)) + machine.gaps(work)


def traffic(work: list[Work]) -> float:
    return sum(w.bytes for w in work)


def flops(work: list[Work]) -> float:
    """Of the matrix products."""
    return sum(w.flops for w in work if not w.vector)


def teacher_seconds(pair: Pair, batch: Batch = BATCH, machine: Machine = H100) -> float:
    """One micro-batch through the teacher's backbone."""
    return machine.seconds(Work(pair.teacher.forward_flops(batch.positions, batch.length), 0))


def student_seconds(pair: Pair, batch: Batch = BATCH, machine: Machine = H100) -> float:
    """One micro-batch forward and backward through the student's backbone, no activation recomputed."""
    return machine.seconds(Work(3 * pair.student.forward_flops(batch.positions, batch.length), 0))


def training_state(model: Model, V: int) -> float:
    """Bytes of a student in training: bf16 weight and gradient, float32 master weight and two moments of AdamW."""
    return 16 * model.parameters(V)


def passes_until_cache_pays(teacher: float, write: float, read: float) -> float:
    """Passes from which on a cache costs less than the teacher, all in seconds for the same tokens.

    The cache is built by a pass of its own, `teacher + write`; then each pass reads and waits for it. Infinite where
    reading takes longer than the teacher.
    """
    return (teacher + write) / (teacher - read) if read < teacher else float("inf")
