"""The first ten minutes on a GPU: is it correct, how fast is it, what to tune first. One page.

    make gpu-day                        # PY=python3 on an image where torch and triton are installed
    make gpu-day ARGS=--rehearse        # without a GPU: the same steps in Triton's interpreter, on tiny shapes

Needs torch and triton and nothing else, no network, and installs nothing. Every step is a process of its own under a
time limit and writes one JSON file; one that fails or is not possible here is reported and the next one runs. The
page, `gpu-day.md`, and its picture, where matplotlib is there, are made of those files.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

LIMIT_S = 150
DIVERGENCES = ("fkl", "rkl", "skew_fkl", "skew_rkl", "jsd", "tvd", "jeffreys", "alpha")
SHAPES = ((8192, 128256, 4096, 4096), (8192, 128256, 2048, 4096))  # valid rows, vocabulary, hidden sizes
TINY = ((24, 700, 16, 24),)


class SkippedError(Exception):
    """A step that is not possible here, and why."""


def device(rehearse: bool) -> dict[str, Any]:
    """Clocks, versions, and whether 16-bit products are added in float32."""
    import torch
    import triton

    from pocl_kernels.triton_backend import gemm

    place = torch.device("cpu") if rehearse else torch.device("cuda", 0)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    found: dict[str, Any] = dict(versions)
    found |= {f"takes {x}": gemm.takes_16_bit(place, getattr(torch, x)) for x in ("bfloat16", "float16")}
    if not rehearse:
        found["name"] = torch.cuda.get_device_name()
        found["memory GiB"] = torch.cuda.get_device_properties(0).total_memory / 2**30
        if tool := shutil.which("nvidia-smi"):
            fields = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
            command = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
            found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    return found


def products(rehearse: bool) -> dict[str, Any]:
    """Adding products to a float32 buffer at several depths, and slices aligned to 16, 8 and 2 bytes."""
    import torch

    from pocl_kernels.triton_backend import gemm

    V, H, depths = (512, 16, (12, 24)) if rehearse else (32768, 4096, (172, 762, 2816, 8192))
    place = "cpu" if rehearse else "cuda"
    out, found = torch.zeros(V, H, device=place), {}
    for depth in depths:
        tile = torch.randn(depth, V + 8, device=place).half()
        hidden = torch.randn(depth, H, device=place).half()
        for start, title in ((0, "16 B"), (4, "8 B"), (1, "2 B")):
            part = tile[:, start : start + V]
            run = timed({"": lambda p=part, h=hidden: gemm.multiply(p.T, h, out, add=True)}, rehearse)[""]
            found[f"K={depth}, aligned to {title}, TFLOP/s"] = 2 * depth * V * H / statistics.median(run) / 1e9
    return found


def tests(rehearse: bool) -> dict[str, Any]:
    """The tests that need a GPU."""
    if importlib.util.find_spec("pytest") is None:
        raise SkippedError("pytest is not installed; the step `correct` checks the losses without it")
    if rehearse:
        raise SkippedError("they need a GPU")
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S - 10)
    return {"status": result.returncode, "last lines": result.stdout.strip().splitlines()[-25:]}


def correct(rehearse: bool) -> dict[str, Any]:
    """bf16 models in several chunks and slices, all divergences, both modes, against float64 and plain PyTorch."""
    from dataclasses import replace

    import torch

    import pocl_kernels
    from tests.kernels.cases import make_case, oracle, pytorch, solve

    place = "cpu" if rehearse else "cuda"
    rows, V, H = (6, 300, 16) if rehearse else (400, 32003, 1536)
    case = make_case(rows, V, hidden=(H, H), dtype=torch.bfloat16)

    def loss(*tensors: Any, **rest: Any) -> Any:
        moved = [x.to(place) if isinstance(x, torch.Tensor) else replace(x, weight=x.weight.to(place)) for x in tensors]
        labels = rest.pop("labels").to(place)
        out = pocl_kernels.fused_linear_divergence(*moved, labels=labels, backend="triton", **rest)
        parts = ("loss", "divergence", "cross_entropy", "student_entropy")
        return out._replace(**{part: getattr(out, part).cpu() for part in parts})

    found: dict[str, Any] = {}
    workspace = 8.0 if rehearse else 96.0
    for name in DIVERGENCES:
        truth = oracle(case, divergence=name)
        plain = pytorch(case, dtype=torch.float32, divergence=name).errors(truth)
        for memory in ("fast", "low"):
            errors = solve(loss, case, divergence=name, memory=memory, workspace_mb=workspace).errors(truth)
            fine = all(errors[x] <= max(1.3 * plain[x], 2e-6) for x in ("loss", "hidden", "weight"))
            found[f"{name}, {memory}"] = {"fine": fine, "errors": errors, "PyTorch float32": plain}
    return {"all fine": all(x["fine"] for x in found.values())} | found


def loss(rehearse: bool) -> dict[str, Any]:
    """Forward and backward over the floor of four products; Liger's and quack's where they are installed."""
    from benchmarks import bench_gpu

    found: dict[str, Any] = {}
    for shape in TINY if rehearse else SHAPES:
        problem = some_problem(shape, rehearse)
        runs: dict[str, Callable[[], Any]] = {"floor": partial(bench_gpu.floor, problem)}
        for name in ("fkl", "jsd"):
            for memory in ("auto", "low"):
                runs[f"{name} {memory}"] = partial(bench_gpu.ours(memory, None, name), problem)
        times = timed(runs, rehearse)
        base = statistics.median(times["floor"])
        for name, samples in times.items():
            ms = statistics.median(samples)
            found[f"{shape}: {name}"] = {"ms": ms, "over the floor": ms / base, "all ms": samples}
    present = [name for name in ("liger_kernel", "quack") if importlib.util.find_spec(name)]
    return found | {"peers installed": present or "none"}


def break_even(rehearse: bool) -> dict[str, Any]:
    """ "fast" against "low" where a group has 128 to 2,048 rows: where `auto` should change over."""
    from benchmarks import bench_gpu

    shape = (TINY if rehearse else SHAPES)[0]
    problem, found = some_problem(shape, rehearse), {}
    for workspace in (8,) if rehearse else (192, 256, 384, 512, 768, 1024):
        runs = {memory: partial(bench_gpu.ours(memory, workspace), problem) for memory in ("fast", "low")}
        ms = {name: statistics.median(samples) for name, samples in timed(runs, rehearse).items()}
        found[f"{workspace} MiB"] = ms | {"fast / low": ms["fast"] / ms["low"]}
    return found


def profile(rehearse: bool) -> dict[str, Any]:
    """Time by kernel, of "fast" at three workspaces and of "low"."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from benchmarks import bench_gpu

    problem, found = some_problem((TINY if rehearse else SHAPES)[0], rehearse), {}
    for memory, workspace in (("fast", 256), ("fast", 1024), ("fast", 8192), ("low", 512)):
        run = bench_gpu.ours(memory, workspace)
        run(problem)
        with profile(activities=[ProfilerActivity.CPU, *([] if rehearse else [ProfilerActivity.CUDA])]) as seen:
            run(problem)
            if not rehearse:
                torch.cuda.synchronize()
        field = "self_cpu_time_total" if rehearse else "self_device_time_total"
        events = sorted(seen.key_averages(), key=lambda e: -getattr(e, field))[:12]
        found[f"{memory}, {workspace} MiB"] = {e.key[:60]: [e.count, getattr(e, field) / 1e3] for e in events}
    return found


def counters(rehearse: bool) -> dict[str, Any]:
    """Memory, issue slots and stalls of the row kernels, by Nsight Compute."""
    tool = shutil.which("ncu")
    if tool is None or rehearse:
        raise SkippedError("ncu is not installed" if tool is None else "it needs a GPU")
    command = [
        tool, "--csv", "--kernel-name", "regex:divergence_rows|tile_statistics", "--launch-count", "4", "--section",
        "SpeedOfLight", "--section", "WarpStateStats", sys.executable, "-m", "benchmarks.bench_gpu", "--kernels",
        "--shape", "8192", "128256", "4096", "4096",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S - 10)
    return {"lines": result.stdout.splitlines()[-200:]}


STEPS: dict[str, Callable[[bool], dict[str, Any]]] = {
    f.__name__: f for f in (device, products, correct, loss, break_even, profile, counters, tests)
}


def some_problem(shape: tuple[int, int, int, int], rehearse: bool) -> Any:
    """bf16 tensors, half as many rows ignored as there are."""
    import torch

    from benchmarks.problems import Problem, make_problem

    rows, *rest = shape
    problem = make_problem(2 * rows, *rest, device="cpu" if rehearse else "cuda")
    return Problem(**{k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in vars(problem).items()})


def timed(functions: dict[str, Callable[[], Any]], rehearse: bool) -> dict[str, list[float]]:
    """Milliseconds of several runs of each; of one in a rehearsal, whose times mean nothing."""
    if not rehearse:
        from benchmarks.bench_gpu import Clock

        return Clock().interleaved(functions)
    found = {}
    for name, function in functions.items():
        start = time.perf_counter()
        function()
        found[name] = [1e3 * (time.perf_counter() - start)]
    return found


def run_step(name: str, folder: Path, rehearse: bool) -> None:
    """One step, here; its file says what came of it."""
    start = time.perf_counter()
    if rehearse:  # tensors of the CPU take a GPU's way
        from pocl_kernels import operators

        assert callable(operators.is_triton)  # another name would leave the rehearsal on the CPU path in silence
        operators.is_triton = lambda *_: True
    try:
        result: dict[str, Any] = {"status": "done", "values": STEPS[name](rehearse)}
    except SkippedError as reason:
        result = {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # whatever a step raises is its result: the others go on
        result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    result["seconds"] = time.perf_counter() - start
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")


def page(folder: Path, rehearse: bool) -> str:
    """Everything that the steps found, as Markdown."""
    lines = ["# A day on a GPU" + (" (a rehearsal: no GPU, times mean nothing)" if rehearse else ""), ""]
    lines += ["| step | status | seconds | |", "|---|---|---|---|"]
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in STEPS}
    for name, x in results.items():
        reason = (str(x.get("reason", "")).splitlines() or [""])[0]
        lines.append(f"| {name} | {x['status']} | {x['seconds']:.1f} | {reason} |")
    verdict = results["correct"].get("values", {}).get("all fine")
    lines += ["", f"**Correct: {'yes' if verdict else 'not known' if verdict is None else 'NO'}.**", ""]
    for name, x in results.items():
        if x["status"] != "done":
            continue
        lines += [f"## {name}", "", (STEPS[name].__doc__ or "").strip(), "", "| | |", "|---|---|"]
        for key, value in x["values"].items():
            lines.append(f"| {key} | {shown(value)} |")
        lines.append("")
    ratios = {k: v["over the floor"] for k, v in results["loss"].get("values", {}).items() if isinstance(v, dict)}
    if ratios:
        worst = max((k for k in ratios if "auto" in k), key=lambda k: ratios[k], default="")
        lines += [f"**Tune first:** {worst}, {ratios[worst]:.2f} times its floor; its kernels: `profile`.", ""]
        if picture(ratios, folder):
            lines += ["![time over the floor](gpu-day.png)", ""]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value in a cell of a table, without the samples behind it."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not str(k).startswith("all ")}
        return ", ".join(f"{k} {shown(v)}" for k, v in kept.items())
    if isinstance(value, list):
        return " / ".join(shown(x) for x in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def picture(ratios: dict[str, float], folder: Path) -> bool:
    """Bars of the times over the floor; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.4 * len(ratios) + 1), layout="constrained")
    bars = axes.barh(list(ratios)[::-1], list(ratios.values())[::-1])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time over the floor of four products")
    axes.margins(x=0.12)
    figure.savefig(folder / "gpu-day.png", dpi=120)
    plt.close(figure)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="no GPU: tiny shapes in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-day"), help="the folder of results")
    parser.add_argument("--step", choices=STEPS, help="this step alone, in this process")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step:
        run_step(options.step, options.out, options.rehearse)
        return 0
    environment = os.environ | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if options.rehearse else {})
    for name in STEPS:
        print(f"{name} ...", flush=True)
        file = options.out / f"{name}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu_day", "--step", name, "--out", str(options.out)]
        try:
            subprocess.run([*command, *(["--rehearse"] * options.rehearse)], env=environment, timeout=LIMIT_S)
            reason = "the process ended without a result"
        except subprocess.TimeoutExpired:
            reason = f"took more than {LIMIT_S} s"
        if not file.exists():
            file.write_text(json.dumps({"status": "failed", "reason": reason, "seconds": 0.0}))
    (options.out / "gpu-day.md").write_text(page(options.out, options.rehearse))
    print(f"written to {options.out / 'gpu-day.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
