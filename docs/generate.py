"""Writes the parts of the documentation that the code knows best: `make docs`. A test holds them up to date."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- generated: make docs -->\n", "<!-- end of generated -->\n"


def recipe_keys() -> str:
    """A Markdown table of every recipe key, its default and its meaning."""
    from pocl.recipe import describe_keys

    rows = [f"| `{key}` | `{default}` | {meaning.replace('|', '/')} |" for key, default, meaning in describe_keys()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) + "\n"


def recipe_schema_text() -> str:
    """The JSON schema of recipes."""
    from pocl.recipe import recipe_schema

    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def with_generated_part(page: str, part: str) -> str:
    """`page` with everything between the two markers replaced by `part`."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"the page lacks the markers {BEGIN.strip()!r} and {END.strip()!r}")
    return f"{before}{BEGIN}{part}{END}{after}"


def main() -> None:
    page = FOLDER / "recipe.md"
    page.write_text(with_generated_part(page.read_text(), recipe_keys()))
    (FOLDER / "recipe.schema.json").write_text(recipe_schema_text())


if __name__ == "__main__":
    main()
