"""The pages of a report in a real browser, at the width of a desk and of a phone: nothing runs off to the side."""

import functools
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pocl.report.document import Code, Document, Heading, Paragraph, Picture, Table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium on the PATH")

# The page in a frame of a given width; once it is laid out, its measures are written where --dump-dom shows them.
FRAME = """<!doctype html><body style="margin:0"><iframe id="page" src="index.html" width="{width}" height="800"
style="border:0"></iframe><script>
page.onload = () => {{ const d = page.contentDocument, wide = [];
  for (const e of d.body.querySelectorAll("*")) {{ const r = e.getBoundingClientRect();
    if (r.right > {width} + 1 && !e.closest("pre")) wide.push(e.tagName + " " + e.textContent.slice(0, 40)); }}
  const measured = {{width: d.documentElement.scrollWidth, wide, rows: d.querySelectorAll("tr").length}};
  document.body.dataset.measured = JSON.stringify(measured); }};
</script></body>"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    """The address of a page with all that reports are made of, long words among it."""
    from pocl.report.figures import draw_results

    names = ["teacher", "student before", "after warm-up", "after the stages"]
    results = [{"cross_entropy": 2.0 + i, "kl_to_teacher": float(i), "rouge_l": 0.1 * i} for i in range(4)]
    draw_results(names, results, tmp_path / "results.png")
    numbers = [[name, "134.5 M", "2.345 ± 0.123", "1.234 ± 0.056", "0.1234 ± 0.0123", "0.0123"] for name in names]
    words = "A question of ordinary words that goes on for two or three lines on a telephone, as questions do. "
    long = [str(i) for i in range(8)], [words, "https://example.org/" + "a" * 180, *[words] * 6]
    document = Document("Distillation report: a name that is fairly long for a small screen")
    document.add(Heading("Results"), Paragraph(words * 3))
    document.add(
        Table(["model", "parameters", "cross-entropy", "KL to teacher", "ROUGE-L", "exact match"], numbers,
              numbers=frozenset(range(1, 6)), strong=3),
        Table(["rank", "question", "reference answer", "a", "b", "c", "d", "e"], list(long)),
        Picture("results.png", "The same numbers as bars."),
        Code("x" * 300),
    )  # fmt: skip
    (tmp_path / "index.html").write_text(document.html(tmp_path))
    for width in (390, 1200):
        (tmp_path / f"frame-{width}.html").write_text(FRAME.format(width=width))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_runs_off_to_the_side(page: str, width: int, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    flags += ["--virtual-time-budget=5000", f"--window-size={max(width, 1300)},1000"]
    words = [str(CHROMIUM), *flags, "--dump-dom", f"{page}/frame-{width}.html"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)})
    found = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert found, done.stdout[:500] + done.stderr[-500:]
    measured = json.loads(found[1].replace("&quot;", '"'))
    assert measured["rows"] == 8
    assert measured["wide"] == []
    assert measured["width"] <= width
