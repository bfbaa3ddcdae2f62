"""The pages of a report in a real browser, at the width of a desk and of a phone: nothing runs off to the side."""

import functools
import itertools
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
FRAME = """<!doctype html><body style="margin:0"><iframe id="page" src="{page}.html" width="{width}" height="800"
style="border:0"></iframe><script>
page.onload = () => {{ const d = page.contentDocument, wide = [], broken = [], range = d.createRange();
  const texts = d.createTreeWalker(d.body, NodeFilter.SHOW_TEXT);
  const words = /(?<![^\\s(])[\\p{{L}}\\d.]+(?![^\\s,;:)?!])|ROUGE-L/gu;
  while (texts.nextNode()) for (const word of texts.currentNode.data.matchAll(words)) {{
    range.setStart(texts.currentNode, word.index); range.setEnd(texts.currentNode, word.index + word[0].length);
    const lines = new Set([...range.getClientRects()].map((r) => Math.round(r.top)));
    if (lines.size > 1 && word[0].length <= 20) broken.push(word[0]); }}
  for (const e of d.body.querySelectorAll("*")) {{ const r = e.getBoundingClientRect();
    if (r.right > {width} + 1 && !e.closest("pre")) wide.push(e.tagName + " " + e.textContent.slice(0, 40)); }}
  const measured = {{width: d.documentElement.scrollWidth, wide, broken, rows: d.querySelectorAll("tr").length}};
  document.body.dataset.measured = JSON.stringify(measured); }};
</script></body>"""


ROWS = {"report": 8, "compare": 15}  # of all tables of a page


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


def compared(folder: Path) -> Path:
    """The page of `pocl compare` for three arms and five seeds, of numbers that are made up."""
    import torch

    from pocl.compare.arms import build_arms
    from pocl.compare.cells import METRICS, Cell, result_file
    from pocl.compare.page import write_page
    from pocl.recipe import build_recipe
    from pocl.run_folder import write_text

    (folder / "model").mkdir(parents=True)
    (folder / "pairs.jsonl").write_text("{}")
    model, data = str(folder / "model"), {"source": str(folder / "pairs.jsonl")}
    values = {"name": "a comparison of arms", "teacher": model, "student": model, "data": data}
    recipe = build_recipe({**values, "output": str(folder), "compare": {"seeds": [1, 2, 3, 4, 5]}})
    arms = build_arms(recipe, 64, ["plain", "pocl", "temperature"])
    cells = [Cell(arm, seed) for seed in recipe.compare.seeds for arm in arms]
    for cell in cells:
        of = torch.rand(len(METRICS), 12).tolist()
        each = dict(zip(METRICS, of, strict=True)) | {"sample_id": list(range(12)), "num_tokens": [5] * 12}
        result = {
            "arm": cell.arm.name, "level": "", "seed": cell.seed, "mark": cell.mark(), "settings": cell.settings(),
            "start": "", "machine": {}, "diverged": None, "of_each": each, "steps": 1234, "teacher_samples": 0,
            "metrics": {name: sum(values) / 12 for name, values in zip(METRICS, of, strict=True)},
            "seconds": {"training": 4321.0, "evaluation": 65.0}, "curve": [[i, 1 / i, 2.0, 0.1] for i in range(1, 9)],
        }  # fmt: skip
        write_text(result_file(folder, cell), json.dumps(result))
    return write_page(folder, recipe, cells)


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
    (tmp_path / "report.html").write_text(document.html(tmp_path))
    (tmp_path / "compare.html").write_bytes(compared(tmp_path / "compared").read_bytes())
    for name, width in itertools.product(ROWS, (390, 1200)):
        (tmp_path / f"{name}-{width}.html").write_text(FRAME.format(page=name, width=width))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ROWS)
def test_nothing_runs_off_to_the_side_and_no_word_is_broken(page: str, name: str, width: int, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    flags += ["--virtual-time-budget=5000", f"--window-size={max(width, 1300)},1000"]
    words = [str(CHROMIUM), *flags, "--dump-dom", f"{page}/{name}-{width}.html"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)})
    found = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert found, done.stdout[:500] + done.stderr[-500:]
    measured = json.loads(found[1].replace("&quot;", '"'))
    assert measured["rows"] == ROWS[name]
    assert measured["broken"] == []
    assert measured["wide"] == []
    assert measured["width"] <= width
