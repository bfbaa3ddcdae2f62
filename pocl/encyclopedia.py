"""General English prose without a hub: paragraphs of Wikipedia articles, as prompts and responses.

The wheel `gensim` carries the first part of an old dump of the English Wikipedia (CC BY-SA) for its own tests: some
hundred articles from A to As. Its markup is taken off here; nothing of it is part of this package, and `gensim` is not
imported.
"""

from __future__ import annotations

import bz2
import html
import re
from pathlib import Path
from xml.etree import ElementTree

_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_FEWEST_WORDS = 30
_PAIRED = "ref|math|gallery|timeline|table|source|nowiki|code|pre"
# From the innermost outwards, until nothing is left: templates and tables, then pictures, categories, languages.
_NESTED = (
    re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*?\|\}"),
    re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]"),
)
_LEFT_OUT = re.compile(rf"<!--.*?-->|<ref[^>]*/>|<({_PAIRED})\b.*?</\1>", re.DOTALL | re.IGNORECASE)
_HEADING = re.compile(r"=+\s*(.*?)\s*=+")


def paragraphs(package: Path) -> list[dict[str, str]]:
    """Rows of `prompt` (what to tell about) and `completion` (a paragraph of 30 words or more), in the dump's order.

    Args:
        package: folder of the package `gensim`.

    Raises:
        FileNotFoundError: this release of the wheel has no such dump.
    """
    file = package / "test" / "test_data" / _DUMP
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: this release of gensim ships no Wikipedia articles; take 4.4.0")
    rows = []
    with bz2.open(file) as stream:
        for _, element in ElementTree.iterparse(stream):  # of an installed package: trusted
            if not element.tag.endswith("}page"):
                continue
            space = element.tag.removesuffix("page")
            title = element.findtext(f"{space}title") or ""
            text = element.findtext(f"{space}revision/{space}text") or ""
            element.clear()
            if ":" not in title and not text.lower().startswith("#redirect"):
                rows += _paragraphs_of(title, text)
    return rows


def _paragraphs_of(title: str, text: str) -> list[dict[str, str]]:
    found, about = [], title
    for line in map(str.strip, html.unescape(without_markup(text)).splitlines()):
        if heading := _HEADING.fullmatch(line):
            about = f"{title}: {heading[1]}"
        elif len(line.split()) >= _FEWEST_WORDS and _is_prose(line):
            found.append({"prompt": f"Tell me about {about}.", "completion": " ".join(line.split())})
    return found


def _is_prose(line: str) -> bool:
    """Neither a list nor the end of something cut, and without markup that was not understood."""
    return line[0] not in "*#:;!" and line[-1] in '."' and not re.search(r"[{}\[\]|<>]", line)


def without_markup(text: str) -> str:
    """Wikipedia's source without templates, tables, notes, pictures and links; headings and lists keep their marks."""
    text = _LEFT_OUT.sub("", text)
    for pattern in _NESTED:
        count = 1
        while count:
            text, count = pattern.subn("", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    return re.sub(r"'{2,}|</?[a-zA-Z][^<>]*>", "", text)
