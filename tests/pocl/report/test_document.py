"""Blocks in Markdown and HTML say the same and break neither."""

from html.parser import HTMLParser
from pathlib import Path

from pocl.report import results_table
from pocl.report.document import Code, Document, Heading, Paragraph, Picture, Table

NASTY = 'a | b <script>alert("x")</script>\nsecond line & more'


class Balanced(HTMLParser):
    """Fails on a tag that is closed before its inner tags."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def document(folder: Path) -> Document:
    (folder / "dot.png").write_bytes(b"\x89PNG")
    made = Document("Title & more")
    made.add(
        Heading("A heading"),
        Paragraph(NASTY),
        Table(["x", "y"], [["1", NASTY], ["2", "z"]], numbers=frozenset({0}), strong=1),
        Picture("dot.png", "a dot"),
        Code("x < 1\n"),
    )
    return made


def test_html_is_balanced_escaped_and_holds_its_pictures(tmp_path: Path) -> None:
    page = document(tmp_path).html(tmp_path)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "script" not in parser.seen
    assert "dot.png" not in page
    assert 'src="data:image/png;base64,iVBORw=="' in page


def test_every_markdown_table_row_has_as_many_cells_as_its_header(tmp_path: Path) -> None:
    text = document(tmp_path).markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {line.replace("\\|", "").count("|") for line in rows} == {3}
    assert "![a dot](dot.png)" in text
    assert rows[-1] == "| **2** | **z** |"


def test_the_results_table_shows_what_was_not_measured_as_a_dash() -> None:
    results = {
        "teacher": {"cross_entropy": 2.0, "kl_to_teacher": 0.0, "rouge_l": None, "exact_match": None},
        "student-final": {"cross_entropy": 3.0, "kl_to_teacher": 0.5, "rouge_l": 0.25, "exact_match": 0.0},
    }
    table = results_table(results, {"teacher": 134_500_000, "student": 49_600_000})
    assert table.rows[0] == ["teacher", "134.5 M", "2.000", "0.000", "-", "-"]
    assert table.rows[1][:2] == ["after the stages", "49.6 M"]
    assert table.strong == 1
