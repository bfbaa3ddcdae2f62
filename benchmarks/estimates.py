"""How true `--dry-run` is: the time of each step that it tells, over the time that the step then takes.

    python -m benchmarks.estimates quickstart
    python -m benchmarks.estimates healed-student --data.source embedded --num_train 48 --num_validation 8 --num_test 8

Further words override the recipe; the run's folder is made anew below a temporary one, and removed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ALLOWED = 1.5


def compare(words: Sequence[str], folder: Path) -> list[tuple[str, float, float]]:
    """Name, estimated and true seconds of each step, and of their sum as `all`."""
    command = [sys.executable, "-m", "pocl.cli", "distill", *words, "--output", str(folder)]
    started = time.perf_counter()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the dry run finds what would end the run:\n{done.stdout}{done.stderr}")
    print(f"dry run: {time.perf_counter() - started:.1f} s", flush=True)
    estimate = json.loads(done.stdout)["estimate"]
    if estimate is None:
        raise SystemExit("the dry run makes no estimate: the models or the data are not on this machine")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["steps"]
    rows = [(step["name"], step["seconds"], records[step["name"]]["seconds"]) for step in estimate["steps"]]
    return [*rows, ("all", estimate["seconds"], sum(true for _, _, true in rows))]


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(sys.argv[1:], Path(folder) / "run")
    print(f"{'step':14} {'estimated':>10} {'true':>10} {'ratio':>6}")
    for name, told, true in rows:
        print(f"{name:14} {told:8.1f} s {true:8.1f} s {told / max(true, 0.05):6.2f}")
    ratio = rows[-1][1] / rows[-1][2]
    sys.exit(not 1 / ALLOWED <= ratio <= ALLOWED)


if __name__ == "__main__":
    main()
