"""The documentation holds: its Python runs, its recipes are valid, its commands and links exist."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of every fenced block of a language."""
    text = page.read_text()
    for found in FENCE.finditer(text):
        if found[1] == language:
            yield text.count("\n", 0, found.start()) + 2, found[2]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(blocks(page, language))]


@pytest.fixture
def documentation_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model_folder: Path,
    tiny_teacher_folder: Path,
    tiny_pairs: list[dict[str, str]],
) -> Path:
    """Where the pages' code runs: `student` and `teacher` are tiny models, `pairs.jsonl` is a data set."""
    (tmp_path / "student").symlink_to(tiny_model_folder)
    (tmp_path / "teacher").symlink_to(tiny_teacher_folder)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("documentation_folder")
# TRL 1.16 still says gradient_checkpointing where transformers 5.20 says activation_checkpointing.
@pytest.mark.filterwarnings("ignore:.*(is_)?gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")  # where TRL keeps GKDTrainer
@pytest.mark.parametrize("page", pages_with("python"), ids=relative)
def test_python_of_a_page_runs_from_top_to_bottom(page: Path) -> None:
    if "from trl import" in page.read_text():
        pytest.importorskip("trl")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, text in blocks(page, "python"):
        # the padding makes a traceback name the line of the page
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", pages_with("yaml"), ids=relative)
def test_recipes_of_a_page_are_valid(page: Path) -> None:
    from pocl.recipe import build_recipe

    for line, text in blocks(page, "yaml"):
        build_recipe(yaml.safe_load(text), origin=f"{page.name}:{line}")


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_make_targets_of_a_page_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^ {4}|`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_of_a_page_exist(page: Path) -> None:
    from pocl.cli import app

    commands = {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands}
    assert set(re.findall(r"(?:^ {4}|`)(?:\.venv/bin/)?pocl ([a-z-]+)", page.read_text(), re.MULTILINE)) <= commands


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []


def test_generated_tables_are_what_make_docs_writes() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    page = (ROOT / "docs" / "recipe.md").read_text()
    assert page == generate["with_generated_part"](page, generate["recipe_keys"]())
    assert (ROOT / "docs" / "recipe.schema.json").read_text() == generate["recipe_schema_text"]()


def test_every_divergence_is_documented() -> None:
    from pocl_kernels.divergences import DIVERGENCES

    text = (ROOT / "docs" / "losses.md").read_text()
    assert [name for name in DIVERGENCES if f"`{name}`" not in text] == []
