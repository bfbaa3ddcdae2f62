"""Laws of the house: the direction of imports, what `import pocl` may cost, lengths, and what may never be loaded."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pocl

ROOT = Path(__file__).parent.parent
SOURCE = sorted(
    [*(ROOT / "pocl").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
)
ALL_FILES = sorted([*SOURCE, *(ROOT / "tests").rglob("*.py")])
KERNELS = sorted((ROOT / "kernels" / "pocl_kernels").rglob("*.py"))

PUBLIC_NAMES = {
    "pocl_kernels": [
        "Head",
        "fused_linear_divergence",
        "fused_linear_cross_entropy",
        "fused_divergence",
        "DivergenceOutput",
        "SparseTeacher",
        "ForwardKL",
        "ReverseKL",
        "SkewForwardKL",
        "SkewReverseKL",
        "JSD",
        "TVD",
        "Jeffreys",
        "Alpha",
    ],
    "pocl": [
        "Head",
        "fused_linear_divergence",
        "fused_linear_cross_entropy",
        "fused_divergence",
        "DistillationLoss",
        "SparseTeacher",
        "ForwardKL",
        "ReverseKL",
        "SkewForwardKL",
        "SkewReverseKL",
        "JSD",
        "TVD",
        "Jeffreys",
        "Alpha",
    ],
    "pocl.data": ["load_examples", "tokenize", "Collator", "DataReport"],
    "pocl.heads": ["head_of", "hidden_states", "shifted_labels", "check_vocabularies"],
    "pocl.difficulty": ["score", "rank", "rouge_l"],
    "pocl.curriculum": ["Stage", "Curriculum"],
    "pocl.teacher": ["Teacher", "OnlineTeacher", "HiddenStateCache", "TopKCache"],
    "pocl.engines": ["Engine", "LocalEngine"],
    "pocl.trainer": ["POCLConfig", "POCLTrainer"],
    "pocl.integrations.trl": ["CurriculumCallback", "in_stages"],
    "pocl.evaluate": ["evaluate", "EvaluationResult"],
    "pocl.report": ["write_report"],
    "pocl.recipe": ["Recipe", "load_recipe"],
    "pocl.cli": ["main"],
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Absolute module names that a file imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def imported_names(tree: ast.AST) -> Iterator[str]:
    """As `imported_modules`, and `package.name` for every name that is imported from a package."""
    yield from imported_modules(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_python(code: str) -> str:
    """The standard output of `code` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_kernels_folder_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_source_folder_is_a_package_so_that_it_is_shipped() -> None:
    folders = {path.parent for path in [*(ROOT / "pocl").rglob("*.py"), *KERNELS]}
    assert [relative(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_transformers_does_not_take_our_source_root_for_the_kernels_package() -> None:
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code).split() == ["False"]


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernels_import_only_torch_triton_and_the_standard_library(path: Path) -> None:
    allowed = {"torch", "triton", "pocl_kernels", *sys.stdlib_module_names}
    roots = {name.split(".")[0] for name in imported_modules(ast.parse(path.read_text()))}
    assert roots <= allowed


# A backend stands on the tables and on the eager functions, never on another backend.
ROOMS = {"eager": {"cpu", "triton_backend"}, "cpu": {"triton_backend"}, "triton_backend": {"cpu"}}


@pytest.mark.parametrize("room", ROOMS)
def test_no_backend_stands_on_another(room: str) -> None:
    files = [path for path in KERNELS if path.parent.name == room]
    assert files
    for path in files:
        for name in imported_modules(ast.parse(path.read_text())):
            assert not {f"pocl_kernels.{other}" for other in ROOMS[room]} & {name, ".".join(name.split(".")[:2])}, path


def test_benchmarks_do_not_import_each_other_in_circles() -> None:
    modules = {f"benchmarks.{path.stem}": path for path in (ROOT / "benchmarks").glob("*.py")}
    imports = {
        name: {f for f in modules if f in found} - {name}
        for name, path in modules.items()
        for found in [set(imported_names(ast.parse(path.read_text())))]
    }
    assert list(graphlib.TopologicalSorter(imports).static_order())


def private_names_of_torch(tree: ast.AST) -> Iterator[str]:
    """`torch._x` and `from torch.y import _x`, which may move without notice."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"torch\._([a-z]|C\.)", ast.unparse(node)):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from (
                f"{node.module}.{alias.name}" for alias in node.names if re.search(r"\._[a-z]", f".{alias.name}")
            )


PRIVATE = {
    "torch._C._len_torch_dispatch_stack",  # whether somebody traces or counts operators
    "torch._assert_async",  # a check on the device without waiting for it
    "torch.distributed.distributed_c10d._resolve_process_group",  # a group by its name, which an operator can take
}


def test_the_private_names_of_torch_are_few_and_where_they_were() -> None:
    used = {name for path in SOURCE for name in private_names_of_torch(ast.parse(path.read_text()))}
    assert used == PRIVATE
    for name in used:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), f"{name} has moved in torch {torch.__version__}"


def test_importing_pocl_loads_nothing_heavier_than_torch() -> None:
    heavy = ["transformers", "datasets", "matplotlib", "triton", "accelerate", "pandas", "pyarrow", "rich", "pydantic"]
    code = (
        "import torch, sys; before = set(sys.modules); import pocl, pocl_kernels; "
        f"print(*(set({heavy}) & (set(sys.modules) - before)))"
    )
    assert run_python(code).split() == []


def test_no_public_name_is_a_module_too() -> None:
    # `pocl.name` would be the one before its first use and the other after
    modules = {path.stem for path in (ROOT / "pocl").iterdir()}
    assert modules & set(pocl.__all__) == set()


def test_the_command_line_helps_without_torch() -> None:
    assert run_python("import sys, pocl.cli; print('torch' in sys.modules)").split() == ["False"]


def test_importing_pocl_costs_at_most_300_ms_above_torch() -> None:
    code = "import torch, time; start = time.perf_counter(); import pocl; print(time.perf_counter() - start)"
    # one of three is enough: the bound is on our imports, not on what else the machine is doing
    assert any(float(run_python(code)) <= 0.3 for _ in range(3))


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_public_names_are_importable(module: str) -> None:
    loaded = importlib.import_module(module)
    assert [name for name in PUBLIC_NAMES[module] if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("path", ALL_FILES, ids=relative)
def test_no_file_is_longer_than_450_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("path", SOURCE, ids=relative)
def test_nothing_is_unpickled(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}.isdisjoint(
        name.split(".")[0] for name in imported_modules(tree)
    )
    loads = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func) == "torch.load"
    ]
    for call in loads:
        assert any(
            keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            for keyword in call.keywords
        ), f"line {call.lineno}: torch.load without weights_only=True"


@pytest.mark.parametrize("path", SOURCE, ids=relative)
def test_remote_code_is_never_trusted_by_a_literal(path: Path) -> None:
    trusting = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if (
            isinstance(node, ast.keyword)
            and node.arg == "trust_remote_code"
            and isinstance(node.value, ast.Constant)
            and node.value.value is True
        )
    ]
    assert trusting == []
