"""What a wheel must hold beside the modules: recipes, sources of the CPU kernels, benchmarks, the mark of types."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_holds_all_that_an_installed_package_needs(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for name in ("pocl", "kernels", "recipes", "benchmarks", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (tmp_path / "tree" / name).symlink_to(ROOT / name)
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    words = [sys.executable, "-c", build, str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path / "tree", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"pocl/recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.yaml")}
    for folder, inside in (("kernels/pocl_kernels", "pocl_kernels"), ("pocl", "pocl")):
        found = [path for pattern in ("*.py", "*.c", "*.h") for path in (ROOT / folder).rglob(pattern)]
        wanted |= {f"{inside}/{path.relative_to(ROOT / folder)}" for path in found}
    wanted |= {f"pocl/shipped/benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")}
    assert wanted <= held, sorted(wanted - held)
    assert not any(name.split("/")[0] in ("benchmarks", "kernels", "recipes", "tests") for name in held)
