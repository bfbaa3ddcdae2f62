"""Compiles the kernels for GPUs that need not be there, and says what became of them.

    python -m pocl_kernels.triton_backend.aot            # `make aot`: every kernel and every divergence, on all targets
    python -m pocl_kernels.triton_backend.aot --all      # each combination of options too: minutes
    python -m pocl_kernels.triton_backend.aot --match jsd --target sm_90

One line a kernel and target: registers, bytes spilled to memory, shared memory, bits of the widest load from global
memory and of the narrowest in a loop, and instructions an entry (of all loops, for one token of both models). Exits
with 1 if a kernel spills, or reads its rows by less than 128 bits at a time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pocl_kernels.divergences import DIVERGENCES
from pocl_kernels.triton_backend import (
    cross_entropy_rows,
    divergence_rows,
    launch,
    sparse_device,
    sparse_gradient,
    sparse_statistics,
    sparse_values,
    tile_gradient,
    tile_statistics,
    tile_values,
)
from pocl_kernels.triton_backend.layout import ROW_ALIGNMENT
from pocl_kernels.triton_backend.terms import slope_sum, term_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROW_LOAD_BITS = 128


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time choices. Dtypes are Triton's names."""

    kernel: str
    divergence: str = ""  # empty: cross-entropy alone
    logits: str = "fp32"
    gradient: str = ""  # empty: none
    labels: bool = True
    head: bool = False  # bias and softcap on both models
    at_hand: bool = False  # rows of logits where they lie, not of a buffer

    def __str__(self) -> str:
        parts = (self.kernel, self.divergence, self.logits, self.gradient and f"-> {self.gradient}")
        return " ".join(
            (
                *filter(None, parts),
                *(["no labels"] * (not self.labels)),
                *(["bias softcap"] * self.head),
                *(["at hand"] * self.at_hand),
            )
        )


class Report(NamedTuple):
    """What a compiled kernel needs."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    widest_load: int  # bits
    narrowest_load: int  # bits, in loops alone; the widest there where another loop gathers a row's K tokens
    instructions: float  # an entry

    @property
    def fine(self) -> bool:
        return self.spilled_bytes == 0 and self.narrowest_load >= ROW_LOAD_BITS


def default_variants() -> list[tuple[Variant, str]]:
    """Every kernel on every target, and each divergence's row and tile kernels on one."""
    chosen = [
        Variant("divergence_rows", "fkl", "fp32", "fp32"),
        Variant("divergence_rows", "fkl", "fp32", "fp16"),
        Variant("divergence_rows", "jsd", "bf16", "fp16"),
        Variant("divergence_rows", "skew_rkl", "fp32", "fp16", head=True),
        Variant("cross_entropy_rows", "", "fp32", "fp16"),
        Variant("tile_statistics", "", "fp32"),
        Variant("tile_statistics", "fkl", "fp32"),
        Variant("tile_values", "jsd", "fp32"),
        Variant("tile_gradient", "jsd", "fp32", "fp16"),
    ]
    chosen += [Variant("tile_statistics", name, "bf16", at_hand=True) for name in ("fkl", "jsd")]
    chosen += [Variant("tile_values", "jsd", "bf16", at_hand=True)]
    chosen += [Variant("tile_gradient", "jsd", "bf16", "bf16", at_hand=True)]
    chosen += [
        Variant("sparse_statistics"),
        Variant("sparse_values", "jsd", labels=False, head=True),
        Variant("sparse_gradient", "", "fp32", "fp32"),
        Variant("sparse_gradient", "jsd", "fp32", "fp16", head=True),  # every token of the tail has its own slope
    ]
    result = [(variant, target) for variant in chosen for target in TARGETS]
    for name in DIVERGENCES:
        result += [(Variant("divergence_rows", name, "fp32", "fp32"), "sm_90")]
        result += [(Variant("tile_gradient", name, "fp32", "fp32"), "sm_80")]
        result += [(Variant("tile_gradient", name, "bf16", "bf16", at_hand=True), "sm_90")]
        result += [(Variant("sparse_gradient", name, "fp32", "fp32"), "sm_80")]
    return list(dict.fromkeys(result))


def all_variants() -> list[tuple[Variant, str]]:
    """Each combination of options."""

    def combinations() -> Iterator[Variant]:
        for head in (False, True):
            for gradient in ("", "fp32", "fp16"):
                yield Variant("cross_entropy_rows", "", "fp32", gradient, head=head)
            yield Variant("tile_gradient", "", "fp32", "fp16", head=head)
            for name in ("", *DIVERGENCES):
                for gradient in ("fp32", "fp16"):
                    yield Variant("sparse_gradient", name, "fp32", gradient, head, head)
            for labels in (False, True):
                for name in ("", "fkl", "jsd"):
                    yield Variant("tile_statistics", name, "fp32", labels=labels, head=head)
                for name in DIVERGENCES:
                    for gradient in ("", "fp32", "fp16"):
                        for logits in ("fp32", "bf16"):
                            yield Variant("divergence_rows", name, logits, gradient, labels, head)
                    yield Variant("tile_gradient", name, "fp32", "fp32", labels, head)
                    yield Variant("tile_gradient", name, "fp32", "fp16", labels, head)
            for name in DIVERGENCES:
                yield Variant("tile_values", name, "fp32", labels=False, head=head)

    return [(variant, target) for variant in dict.fromkeys(combinations()) for target in TARGETS]


def source(variant: Variant) -> ASTSource:
    """The kernel as the launcher would specialise it: rows 16-byte aligned, all numbers at run time."""
    module = {
        "divergence_rows": divergence_rows,
        "cross_entropy_rows": cross_entropy_rows,
        "tile_statistics": tile_statistics,
        "tile_values": tile_values,
        "tile_gradient": tile_gradient,
        "sparse_statistics": sparse_statistics,
        "sparse_values": sparse_values,
        "sparse_gradient": sparse_gradient,
    }[variant.kernel]
    kernel = getattr(module, variant.kernel)
    divergence = DIVERGENCES[variant.divergence]() if variant.divergence else None
    term = None if divergence is None else term_of(divergence)
    logits, bias = f"*{variant.logits}", "*fp32" if variant.head else None
    known: dict[str, Any] = {
        "student": logits,
        "teacher": logits if variant.divergence else None,
        "logits": logits,
        "gradient": f"*{variant.gradient}" if variant.gradient else None,
        "labels": "*i64" if variant.labels else None,
        "V": "i32",
        "stride16": "i32",
        "places": "*i64" if variant.at_hand else None,
        "n": "i32",
        "first": "i32",
        "K": "i32",
        "ids": "*i64",
        "top": "*fp32",
        "uniforms": ("fp32",) * len(term.uniforms if term else ()),
    }
    known |= dict.fromkeys(("bias", "bias_s", "bias_t"), bias)
    known |= dict.fromkeys(("softcap", "softcap_s", "softcap_t"), "fp32" if variant.head else None)
    known |= dict.fromkeys(("row_scale", "results", "sums", "state"), "*fp32")
    known |= dict.fromkeys(("scale", "scale_s", "scale_t", "inv_T", "slope_coefficient", "ce_weight"), "fp32")
    known |= dict.fromkeys(("smoothing", "share", "z_loss"), "fp32")
    constants = {
        "term": term and term.function,
        "SLOPE_SUM": divergence and slope_sum(divergence),
        "KL": divergence is not None and divergence.kl_weights is not None,
        "BY_TOKEN": False,
        "TOP_TOO": divergence is not None and slope_sum(divergence) is None,
        "UNIT": ROW_ALIGNMENT,
        "K_BLOCK": sparse_device.K_BLOCK,
        "BLOCK": launch.block(module.BLOCK, 2 if variant.logits == "bf16" else 4) if variant.at_hand else module.BLOCK,
    }
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or known[name] is None:
            signature[name] = "constexpr"
            constexprs[(index,)] = constants.get(name)
        else:
            signature[name] = known[name]
            if not kernel.params[index].do_not_specialize_on_alignment and str(known[name]).startswith("*"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)


def compile_variant(variant: Variant, target: str) -> Report:
    """Compile one variant for one of :data:`TARGETS`."""
    gpu = TARGETS[target]
    code = source(variant)
    compiled = triton.compile(code, target=gpu, options=launch.options(gpu.backend, gpu.warp_size))
    block = code.constants[(code.fn.arg_names.index("BLOCK"),)]
    entries = block // launch.THREADS
    least = max if variant.kernel.startswith("sparse") else min
    if gpu.backend == "hip":
        return read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared, entries, least)
    return read_cubin(compiled.asm["cubin"], compiled.metadata.shared, entries, least)


def read_cubin(cubin: bytes, shared: int, entries: int, least: Callable[[list[int]], int]) -> Report:
    """From NVIDIA's own tools, which come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(TOOLS / "cuobjdump", "-res-usage", file.name)
        listing = _run(TOOLS / "nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    spilled = sum(int(bits or 32) // 8 for bits in re.findall(r"\bSTL(?:\.(\d+))?\b", listing))
    lines = [line for line in listing.splitlines() if re.match(r"\s*/\*[0-9a-f]+\*/\s+\S|\.L_x_\d+:", line)]
    looped = _loops(lines, r"^(\.L_x_\d+):", r"BRA[^`]*`\((\.L_x_\d+)\)")

    def loads(lines: Sequence[str]) -> list[int]:
        found = [re.search(r"\bLDG\.E((?:\.\w+)*) ", line) for line in lines]
        return [next((int(n) for n in re.findall(r"\.[US]?(\d+)", f[1])), 32) for f in found if f]

    return Report(int(registers[1]), spilled, shared, max(loads(lines)), least(loads(looped)), len(looped) / entries)


def read_amdgcn(text: str, shared: int, entries: int, least: Callable[[list[int]], int]) -> Report:
    """From the assembler's listing and the metadata at its end."""

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        assert found is not None, pattern
        return int(found[1])

    # What scalar registers spill goes to vector registers; only scratch is memory.
    spilled = 4 * number(r"\.vgpr_spill_count:\s+(\d+)") + number(r"; ScratchSize:\s+(\d+)")
    lines = [line for line in text.splitlines() if re.match(r"\s+[vsdgb]\w*_\w+|\.LBB\d+_\d+:", line)]
    looped = _loops(lines, r"^(\.LBB\d+_\d+):", r"s_c?branch\w* (\.LBB\d+_\d+)")
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}

    def loads(lines: Sequence[str]) -> list[int]:
        found = [re.search(r"\b(?:global|buffer)_load_(\w+)", line) for line in lines]
        return [widths.get(f[1], 16) for f in found if f]

    registers = number(r"\.vgpr_count:\s+(\d+)")
    return Report(registers, spilled, shared, max(loads(lines)), least(loads(looped)), len(looped) / entries)


def _loops(lines: Sequence[str], label: str, branch: str) -> list[str]:
    """The instructions between each label and the last branch back to it."""
    places: dict[str, int] = {}
    inside: set[int] = set()
    for number, line in enumerate(lines):
        if found := re.search(label, line):
            places[found[1]] = number
        elif (found := re.search(branch, line)) and number - places.get(found[1], number) > 1:
            inside |= set(range(places[found[1]], number + 1))
    return [lines[number] for number in sorted(inside) if not re.search(label, lines[number])]


def _run(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def _job(job: tuple[Variant, str]) -> tuple[Variant, str, Report]:
    # Triton's line tables would name files of this machine, and nothing here reads them.
    triton.knobs.compilation.disable_line_info = True
    warnings.filterwarnings("ignore", message=".*unset: defaulting to FP fusion.*")
    return (*job, compile_variant(*job))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="each combination of options")
    parser.add_argument("--match", default="", help="only variants whose name contains this")
    parser.add_argument("--target", choices=TARGETS, help="only this target")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    options = parser.parse_args(arguments)
    jobs = [
        (variant, target)
        for variant, target in (all_variants() if options.all else default_variants())
        if options.match in str(variant) and options.target in (None, target)
    ]
    start, bad = time.perf_counter(), 0
    titles = f"{'regs':>6}{'spill B':>9}{'shared B':>10}{'widest':>8}{'in loops':>10}{'instr/entry':>13}"
    print(f"{'kernel':56}{'target':>8}{titles}")
    with ProcessPoolExecutor(options.jobs) as pool:
        for variant, target, report in pool.map(_job, jobs):
            bad += not report.fine
            print(
                f"{variant!s:56}{target:>8}{report.registers:>6}{report.spilled_bytes:>9}{report.shared_bytes:>10}"
                f"{report.widest_load:>8}{report.narrowest_load:>10}{report.instructions:>13.1f}"
                f"{'' if report.fine else '   BAD'}",
                flush=True,
            )
    print(f"{len(jobs)} kernels in {time.perf_counter() - start:.0f} s, {bad} with spills or narrow loads")
    return int(bad > 0 or not jobs)


if __name__ == "__main__":
    sys.exit(main())
