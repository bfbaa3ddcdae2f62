"""What all benchmarks share: the machine's name, repeated timing, and peak memory."""

import ctypes
import datetime
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the fastest and the slowest run, relative to the median."""
        return (max(self.samples) - min(self.samples)) / 2 / self.median


def interleaved(functions: dict[str, Callable[[], Any]], runs: int) -> dict[str, Timing]:
    """Times functions in turn, A B C A B C ..., so that a slow spell of the machine hits all; one warm-up each."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(runs + 1):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if run > 0:
                samples[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], Any]) -> int | None:
    """Largest memory above the present while `function` runs: of the GPU, else of the process (Linux), else None."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator keeps for later would hide what is used now
        Path("/proc/self/clear_refs").write_text("5")  # forgets the old peak
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def machine() -> str:
    """One line that says what was measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"


def save_results(subject: str, results: Any) -> Path:
    """File results as JSON by hardware and day: `results/<machine>/<date>-<subject>.json`, relative to this folder."""
    folder = Path(__file__).parent / "results" / re.sub(r"[^a-z0-9]+", "-", machine().split(",")[0].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.date.today().isoformat()}-{subject}.json"
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return path
