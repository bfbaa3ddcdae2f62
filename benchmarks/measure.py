"""What all benchmarks share: the machine's name, repeated timing, peak memory, and results filed as JSON."""

import contextlib
import ctypes
import datetime
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


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


def interleaved(
    functions: dict[str, Callable[[], Any]], runs: int, advance: Callable[[str], None] = lambda name: None
) -> dict[str, Timing]:
    """Times functions in turn, A A' B B' ... A A' B B' ..., the primed runs alone, so that a slow spell hits all.

    A timed run follows an untimed run of the same function, as a training step follows a training step: a function
    pays for the memory that another one gave back just before it. `advance` is told the name before each pair of runs.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            advance(name)
            function()
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            samples[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal's standard error; yields a function to call with what begins now, `total` times.

    It is drawn only then, never by a thread of its own, so that it takes no time from what is measured.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    bar = Progress(
        *columns,
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=total, completed=-1)

        def advance(name: str) -> None:
            bar.update(task, advance=1, description=name, refresh=True)

        yield advance


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def give_back_freed_memory() -> None:
    """For the rest of the process: blocks of a MB and more are the kernel's again when they are freed (glibc).

    Left alone, glibc keeps holes of tens of MB for blocks like the last ones, and peaks are the holes' as much as ours.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD of malloc.h


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


def versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def hardware() -> str:
    """The machine's processor or GPU as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", machine().split(",")[0].lower()).strip("-")


def save_results(subject: str, results: dict[str, Any], folder: Path | None = None) -> Path:
    """File results by hardware and day, `<folder>/<hardware>/<date>-<subject>.json`, and return the file.

    The folder is that of the environment's POCL_RESULTS when left out; else that of the checkout, or
    `benchmark-results` here where these benchmarks are part of an installed package.

    `results` has a key for each thing that was measured in one go (a shape, a part of a benchmark). The day's earlier
    results under other keys stay, those under the same key are replaced. Each is filed with the machine and versions.
    """
    folder = folder or Path(os.environ.get("POCL_RESULTS") or (RESULTS if RESULTS.is_dir() else "benchmark-results"))
    path = folder / hardware() / f"{datetime.date.today().isoformat()}-{subject}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(path.read_text()) if path.exists() else {}
    said = {"machine": machine(), "versions": versions("transformers", "trl", "liger-kernel", "rouge-score")}
    entries |= {key: said | {"values": values} for key, values in results.items()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(entries, indent=1) + "\n")
    temporary.replace(path)
    return path


@dataclass(frozen=True)
class Entry:
    """One thing that was measured in one go: when, on what, with which versions, and what came of it."""

    date: str
    machine: str
    versions: dict[str, str]
    values: Any


def load_results(folder: Path = RESULTS) -> dict[str, dict[str, dict[str, Entry]]]:
    """Everything filed, by hardware, subject and key; of each key the newest."""
    found: dict[str, dict[str, dict[str, Entry]]] = {}
    for path in sorted(folder.glob("*/[0-9][0-9][0-9][0-9]-??-??-*.json")):
        date, subject = path.stem[:10], path.stem[11:]
        entries = found.setdefault(path.parent.name, {}).setdefault(subject, {})
        entries |= {key: Entry(date, **entry) for key, entry in json.loads(path.read_text()).items()}
    return found
