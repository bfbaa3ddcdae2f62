"""What importing pocl costs on top of torch, in fresh interpreters.

    python -m benchmarks.bench_import --runs 9      # a table
    make bench                                      # as part of all benchmarks

A test holds the bound: `import pocl` at most 0.3 s above `import torch`.
"""

import argparse
import statistics
import subprocess
import sys
from typing import Any

import pytest

STATEMENTS = {
    "import torch": ("", "import torch"),
    "import pocl, above torch": ("import torch", "import pocl"),
    "first use of the loss, above torch": ("import torch", "from pocl import fused_linear_divergence"),
}


def seconds(before: str, statement: str) -> float:
    """Wall time of `statement` in a fresh interpreter that has already run `before`."""
    code = f"{before}\nimport time; start = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("statement", ["import torch", "import torch, pocl"])
def test_time_of_a_process_that_imports(benchmark: Any, statement: str) -> None:
    benchmark.pedantic(seconds, args=("", statement), rounds=5, iterations=1, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="fresh interpreters for each line (default: 9)")
    runs = parser.parse_args().runs
    print(f"{'':36}{'median':>10}{'min':>10}{'max':>10}   ({runs} runs)")
    for name, (before, statement) in STATEMENTS.items():
        samples = [seconds(before, statement) for _ in range(runs)]
        cells = "".join(f"{1e3 * value:>7.1f} ms" for value in (statistics.median(samples), min(samples), max(samples)))
        print(f"{name:36}{cells}")


if __name__ == "__main__":
    main()
