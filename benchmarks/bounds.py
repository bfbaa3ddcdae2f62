"""Test with the oldest and the newest releases that pyproject.toml admits, on every Python that it names.

    make bounds                                                  # python3.11, python3.12 and python3.13
    make bounds PYTHONS="python3.11 /opt/python-3.13/bin/python3" # others, or some
    make bounds ARGS="--only oldest"                             # one end
    make bounds ARGS="-- -k ranking"                             # some of the tests

Oldest: on the first Python, everything that pyproject.toml names itself in the release of its lower bound. A bound
below what another one lets in is an error, as nothing could ever try it. Newest: on each Python, the latest release of
all. `flash-attn` is left out, as CUDA's compiler builds it, and vLLM, which wants an environment of its own. Some 6 GB
are downloaded for each environment, which stays in .venv-bounds until `make clean`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-bounds"
PYTHONS = ("python3.11", "python3.12", "python3.13")
UNTRIED = ("flash", "vllm")
BUILDS = ("setuptools",)  # PEFT compiles the kernels of one kind of adapter
ENDS = {"oldest": "lowest-direct", "newest": "highest"}
# A part of every layer: losses, data, models, ranking, teachers, training, the command line.
TESTS = (
    "tests/kernels/test_laws.py",
    "tests/kernels/test_autograd.py",
    "tests/pocl/data",
    "tests/pocl/models/test_adapters.py",
    "tests/pocl/models/test_loading.py",
    "tests/pocl/models/test_lora.py",
    "tests/pocl/models/test_view.py",
    "tests/pocl/test_generation.py",
    "tests/pocl/teacher",
    "tests/pocl/difficulty",
    "tests/pocl/trainer/test_distributed.py",
    "tests/pocl/trainer/test_resume.py",
    "tests/pocl/trainer/test_trainer.py",
    "tests/pocl/integrations",
    "tests/pocl/pipeline/test_lora.py",
    "tests/pocl/test_cli.py",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, help="interpreters (default: those that we name)")
    parser.add_argument("--only", choices=ENDS, help="one end of the bounds")
    parser.add_argument("words", nargs="*", help="options of pytest, behind --")
    options = parser.parse_args()
    pythons = [shutil.which(name) or name for name in options.pythons]
    for name in pythons:
        if shutil.which(name) is None:
            sys.exit(f'no interpreter {name} here; name those there are: make bounds PYTHONS="..."')
    tried = [(end, name) for end in ENDS for name in (pythons[:1] if end == "oldest" else pythons)]
    failed = [
        f"{end} on {name}" for end, name in tried if options.only in (None, end) and not passes(end, name, options)
    ]
    if failed:
        sys.exit(f"red: {', '.join(failed)}")


def passes(end: str, python: str, options: argparse.Namespace) -> bool:
    """Whether the tests pass with the releases of one end, in an environment made for them."""
    version = run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])", capture=True).strip()
    folder = FOLDER / f"{end}-{version}"
    print(f"{end} releases on Python {version}", flush=True)
    run(uv(), "venv", "--quiet", "--clear", "--python", python, folder)
    releases = folder / "releases.txt"
    extras = [word for extra in extras_tried() for word in ("--extra", extra)]
    here = folder / "bin" / "python"
    run(
        uv(),
        "pip",
        "compile",
        "--quiet",
        "--python",
        here,
        "--resolution",
        ENDS[end],
        *extras,
        "pyproject.toml",
        "-o",
        releases,
    )
    if end == "oldest":
        check_bounds(releases.read_text())
    run(uv(), "pip", "install", "--quiet", "--python", here, "-r", releases, *BUILDS)
    show = "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
    run(here, "-c", show)
    # older and newer packages warn of what does not concern us; the suite itself takes warnings for errors
    words = ["-q", "-p", "no:cacheprovider", "-W", "default", "--disable-warnings", *TESTS, *options.words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(("kernels", "."))}
    return subprocess.run([here, "-m", "pytest", *words], cwd=ROOT, env=environment).returncode == 0


def check_bounds(releases: str) -> None:
    """End the program if a lower bound of pyproject.toml is not the release that is tried."""
    tried = {canonical(name): version for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", releases, re.MULTILINE)}
    wrong = {
        f"{requirement} (tried: {tried[name]})"
        for requirement, name, bound in bounds()
        if name in tried and trimmed(tried[name]) != trimmed(bound)
    }
    if wrong:
        sys.exit(f"bounds in pyproject.toml that nothing can try, raise them: {', '.join(sorted(wrong))}")


def bounds() -> list[tuple[str, str, str]]:
    """Every requirement of pyproject.toml: its text, the name of the package, the lower bound."""
    found = []
    for requirement in requirements():
        if (match := re.match(r"([\w.-]+)(?:>=|==)([\w.]+)", requirement)) is None:
            sys.exit(f"pyproject.toml: {requirement} has no lower bound")
        found.append((requirement.partition(";")[0], canonical(match[1]), match[2]))
    return found


def requirements() -> list[str]:
    """Those of the package itself and of its extras, as far as they are tried."""
    extras = project()["optional-dependencies"]
    return [*project()["dependencies"], *(each for name in extras_tried() for each in extras[name])]


def extras_tried() -> list[str]:
    return [name for name in project()["optional-dependencies"] if name not in UNTRIED]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def trimmed(version: str) -> list[str]:
    """A release without its last zeros: 6.0 is 6.0.0."""
    return re.sub(r"(\.0)+$", "", version).split(".")


def uv() -> Path:
    """The installer that can choose the oldest releases, in an environment of its own."""
    program = FOLDER / "uv" / "bin" / "uv"
    if not program.exists():
        venv.create(program.parents[1], with_pip=True)
        run(program.with_name("python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv")
    return program


def run(*words: str | Path, capture: bool = False) -> str:
    """Run a command in the root of the tree; the program ends with it if it fails."""
    done = subprocess.run(
        [str(word) for word in words], cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None
    )
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {' '.join(map(str, words))}")
    return done.stdout or ""


if __name__ == "__main__":
    main()
