"""A document as a list of blocks, written as Markdown beside its pictures or as one HTML file with them inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 60rem; margin: 2.5rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; } h2 { font-size: 1.3rem; margin-top: 2.6rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .92rem; }
th { text-align: left; border-bottom: 2px solid #9fb3c8; }
th, td { padding: .35rem .8rem .35rem 0; vertical-align: top; }
td { border-bottom: 1px solid #e4e9f0; overflow-wrap: anywhere; min-width: 6.4rem; white-space: pre-wrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; min-width: 0; }
p, figcaption, h1, h2, h3 { overflow-wrap: break-word; } .whole { white-space: nowrap; }
tr.strong td { font-weight: 650; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #52606d; font-size: .92rem; }
pre { background: #f5f7fa; padding: 1rem; overflow-x: auto; font-size: .82rem; }
@media (max-width: 46rem) { /* a phone: every row of a table becomes a card, its columns named in front of the values */
  body { margin: 1.2rem auto; padding: 0 1rem; } h1 { font-size: 1.5rem; }
  table, tbody, tr { display: block; } thead { display: none; }
  tr { border: 1px solid #c9d4e0; border-radius: .4rem; margin: 0 0 .8rem; padding: .3rem .7rem; }
  td, td.number { display: flex; gap: 1rem; justify-content: space-between; border: 0; padding: .15rem 0; min-width: 0;
    text-align: right; white-space: normal; }
  td::before { content: attr(data-column); color: #52606d; flex: 0 0 8.5rem; text-align: left; font-weight: 400; }
  td > span { min-width: 0; overflow-wrap: break-word; white-space: pre-wrap; } td:has(> span:empty) { display: none; }
}
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"

    def html(self, folder: Path) -> str:
        return f"<h{self.level}>{html.escape(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Paragraph:
    text: str

    def markdown(self) -> str:
        return self.text

    def html(self, folder: Path) -> str:
        whole = html.escape(self.text).replace("ROUGE-L", '<span class="whole">ROUGE-L</span>')
        return f"<p>{whole}</p>"


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    """Columns set flush right."""
    strong: int | None = None
    """Row to stand out."""

    def markdown(self) -> str:
        rule = ["---:" if column in self.numbers else "---" for column in range(len(self.header))]
        body = [[_cell(text) for text in row] for row in self.rows]
        if self.strong is not None:
            body[self.strong] = [f"**{text}**" if text.strip() else text for text in body[self.strong]]
        return "\n".join("| " + " | ".join(row) + " |" for row in [list(self.header), rule, *body])

    def html(self, folder: Path) -> str:
        def line(cells: Sequence[str], tag: str, css: str = "") -> str:
            parts = (
                f"<{tag}{' class=number' if column in self.numbers else ''}"
                + (f' data-column="{html.escape(self.header[column])}"><span>' if tag == "td" else ">")
                + html.escape(text)
                + ("</span>" if tag == "td" else "")
                + f"</{tag}>"
                for column, text in enumerate(cells)
            )
            return f"<tr{css}>{''.join(parts)}</tr>"

        body = (line(row, "td", " class=strong" if i == self.strong else "") for i, row in enumerate(self.rows))
        return f"<table><thead>{line(self.header, 'th')}</thead><tbody>{''.join(body)}</tbody></table>"


@dataclass(frozen=True)
class Picture:
    file: str
    """Name of a PNG in the document's folder."""
    caption: str

    def markdown(self) -> str:
        return f"![{_cell(self.caption)}]({self.file})\n\n*{self.caption}*"

    def html(self, folder: Path) -> str:
        data = base64.b64encode((folder / self.file).read_bytes()).decode()
        caption = html.escape(self.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


@dataclass(frozen=True)
class Code:
    text: str

    def markdown(self) -> str:
        return f"```\n{self.text.rstrip()}\n```"

    def html(self, folder: Path) -> str:
        return f"<pre>{html.escape(self.text.rstrip())}</pre>"


Block = Heading | Paragraph | Table | Picture | Code


@dataclass
class Document:
    """Blocks under a title."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block) -> None:
        self.blocks += blocks

    def markdown(self) -> str:
        return "\n\n".join([f"# {self.title}", *(block.markdown() for block in self.blocks)]) + "\n"

    def html(self, folder: Path) -> str:
        """One self-contained page; pictures are read from `folder`."""
        body = "\n".join(block.html(folder) for block in self.blocks)
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
            f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
        )


def _cell(text: str) -> str:
    """Text that cannot break a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
