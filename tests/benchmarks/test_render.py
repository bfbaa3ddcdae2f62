"""Results are filed without loss, rendered into one place, and what is committed is what they say."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import render
from benchmarks.bench_loss import SHAPES, SWEEP, parse
from benchmarks.measure import interleaved, load_results, save_results
from benchmarks.problems import key
from benchmarks.targets import GROUPS, met

DIVERGENCES = ("rkl", "skew_fkl", "skew_rkl", "jsd", "tvd", "jeffreys", "alpha")


def loss_table(shape: tuple[int, int, int, int], *, ours: float) -> dict[str, Any]:
    """A table of the loss in which pocl takes `ours` times the floor."""
    tokens, vocabulary, student, teacher = shape
    seconds = {"floor": 1.0, "pocl": ours, "eager torch, full logits": 1.5, "TRL ChunkedDivergenceFunction": 2.0}
    seconds |= {f"pocl, {name}": ours for name in DIVERGENCES}
    rows = {
        name: {"seconds": [0.9 * s, s, 1.2 * s], "peak_bytes": int(s * vocabulary * 1e4), "error": 1e-6}
        for name, s in seconds.items()
    }
    settings = {"tokens": tokens, "vocabulary": vocabulary, "hidden": [student, teacher], "dtype": "float32"}
    return settings | {"rows": rows, "failed": {"torch.compile, full logits": "no compiler"}}


def variant(step: float, peak: float) -> dict[str, Any]:
    return {"steps": [[step, step]] * 3, "losses": [1.0, 2.0], "peak_bytes": peak}


TIMES = {"authors": [[8.0, 8.0], [9.0, 9.0]], "rouge_score": [[30.0, 30.0], [30.0, 30.0]], "pocl": [[2.0, 2.0]] * 2}
EVERYTHING: dict[str, dict[str, Any]] = {
    "exactness": {
        "unrelated": {"fkl": {"loss": 1e-7, "hidden": 1e-6, "weight": 1e-6}},
        "near": {"fkl": {"loss": [1e-6, 1e-3], "hidden": [1e-6, 1e-6], "weight": [1e-6, 1e-6]}},
        "bf16": {"fkl": {"loss": [1e-6, 1e-6], "hidden": [1e-6, 1e-6], "weight": [1e-6, 1e-6]}},
        "grid": {"cpu": {"fkl": {"loss": [0.1, "far"], "hidden": [0.9, "near"], "weight": [0.8, "far"]}}},
        "scratch": {"fast": {"512": 200.0, "8192": 250.0}, "low": {"512": 100.0, "8192": 101.0}},
    },
    "host": {"host": {"a call, Triton path": [250.0], "a call, CPU path": [140.0, 145.0], "a launch": [11.0]}},
    "compiled": {"kernels": {"divergence_rows jsd sm_90": {"registers": 40, "spilled_bytes": 0}}},
    "difficulty": {
        "score": {"samples": 256, "times": TIMES},
        "cross-entropy": {"samples": 256, "error": 1e-7, "times": TIMES},
        "rouge": {"samples": 500, "differing": 0, "times": TIMES},
        "memory": {"peak_bytes": {"49152": 100, "151936": 105}},
        "identity": {"samples": 256, "equal": 255, "differences": ["sample 3: a tie"]},
    },
    "data": {
        "rows": {"now": {"rows_per_second": [7000, 7100]}, "before": {"rows_per_second": [1400, 1500]}},
        "rank": {"now": {"seconds": [0.7, 0.8]}, "before": {"seconds": [25.0, 26.0]}},
        "launch": {"now": {"second": [0.0, 0.1]}, "before": {"second": [0.8, 0.9]}},
        "relaunch": {
            "mib": 1026,
            "now": {"imports": [4.0], "loading": [2.0], "beyond": [1.0, 1.1], "finished": [3.0, 3.1]},
        },
        "memory": {"now": {"peak_mib": 1200.0, "peak_mib_of_a_worker": 600.0}, "count": 1_000_000},
    },
    "training": {
        "12 steps": {
            "variants": {
                "cached": variant(1.0, 4e8) | {"busy": 0.97, "loader": 0.01, "cache": {"excess": 0.002}},
                "online": variant(2.0, 5e8),
                "authors": variant(6.0, 1e9),
                "trl-gkd": variant(4.0, 1e9),
            }
        }
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of every subject, filed as the benchmarks file them; all within their limits."""
    tables = [loss_table(shape, ours=1.02) for shape in (*SHAPES, *SWEEP)]
    for table in tables:
        save_results("loss", {key(table): table}, tmp_path)
    for subject, results in EVERYTHING.items():
        save_results(subject, results, tmp_path)
    return tmp_path


def test_results_of_other_shapes_stay_and_the_same_shape_is_replaced(folder: Path) -> None:
    save_results("loss", {key(loss_table(SHAPES[0], ours=9.0)): loss_table(SHAPES[0], ours=9.0)}, folder)
    (subjects,) = load_results(folder).values()
    assert len(subjects["loss"]) == len({*SHAPES, *SWEEP})
    assert next(iter(subjects["loss"].values())).values["rows"]["pocl"]["seconds"][1] == 9.0


def test_the_newest_result_of_each_key_counts(folder: Path) -> None:
    (path,) = folder.glob("*/*-compiled.json")
    old = path.with_name("2001-01-01-compiled.json")
    old.write_text(path.read_text().replace('"kernels"', '"older"'))
    (subjects,) = load_results(folder).values()
    assert set(subjects["compiled"]) == {"older", "kernels"}
    assert subjects["compiled"]["older"].date == "2001-01-01"


def test_targets_within_their_limits_are_met(folder: Path) -> None:
    (subjects,) = load_results(folder).values()
    for group in GROUPS:
        for target in group.targets:
            assert met(target.measured(subjects[group.subject])) is True, target.what


@pytest.mark.parametrize("subject", ["loss", *EVERYTHING])
def test_a_subject_that_was_not_measured_is_said_to_be_so(folder: Path, subject: str) -> None:
    for path in folder.glob(f"*/*-{subject}.json"):
        path.unlink()
    results = load_results(folder)
    (subjects,) = results.values()
    group = next(group for group in GROUPS if group.subject == subject)
    assert all(met(target.measured(subjects.get(subject, {}))) is None for target in group.targets)
    assert render.results_page(results).count("not measured on this hardware") >= len(group.targets)


def test_a_missed_target_is_shown_and_asks_for_its_reason(folder: Path) -> None:
    slow = loss_table(SHAPES[1], ours=1.1)
    save_results("loss", {key(slow): slow}, folder)
    page = render.results_page(load_results(folder))
    (row,) = [line for line in page.splitlines() if line.startswith("| forward + backward")]
    assert row.endswith("| **no** |")
    assert "**V = 151,936, fkl: 1.10 (0.99 to 1.32)**" in row
    assert "Why some are missed:" in page


def test_logits_and_frozen_heads_have_tables(folder: Path) -> None:
    row = {"seconds": [0.1, 0.1], "peak_bytes": 2**20, "error": 1e-7}
    rows = {"floor": row | {"error": None}, "pocl, fkl": row, "pocl, fkl, over the logits": row | {"seconds": None}}
    shape = {"tokens": 8, "vocabulary": 50, "dtype": "float32"}
    save_results("logits", {"a": shape | {"logits_bytes": 2**20, "rows": rows, "failed": {"Liger": "no GPU"}}}, folder)
    heads = {"frozen head": {"seconds": [0.2], "peak_bytes": 2**20, "products": 3.0}}
    save_results("frozen-head", {"V": shape | {"hidden": [4, 4], "rows": heads}}, folder)
    page = render.results_page(load_results(folder))
    assert "| pocl, fkl | 100.0 | 0.0% | 1.00 | 1 | 1.0e-07 |" in page
    assert "| pocl, fkl, over the logits | | |  | 1 | 1.0e-07 |" in page
    assert "| Liger | does not run: no GPU | | | | |" in page
    assert "| frozen head | 0.2 | 0.0% | 1 | 3.00 |" in page


def test_pictures_are_drawn_for_light_and_dark_pages(folder: Path, tmp_path: Path) -> None:
    drawn = render.draw(load_results(folder), tmp_path / "pictures")
    assert [path.name for path in drawn] == [
        f"{name}-{theme}.png" for name in ("loss", "loss-vocabulary") for theme in ("light", "dark")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_the_block_of_the_readme_is_replaced_and_the_rest_kept(folder: Path) -> None:
    block = render.readme_block(load_results(folder))
    page = render.with_block(f"above\n{render.BEGIN}\nold\n{render.END}\nbelow\n", block)
    assert page == f"above\n{render.BEGIN}\n{block}\n{render.END}\nbelow\n"
    assert "| pocl | 1.02, " in block
    with pytest.raises(ValueError, match="marks"):
        render.with_block("no marks", block)


def test_committed_pages_are_what_the_committed_results_say() -> None:
    for path, text in render.pages(load_results()).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run make bench-report"


def test_pictures_of_the_committed_pages_exist() -> None:
    for path, text in render.pages(load_results()).items():
        named = [part.split('"')[0] for mark in ('src="', 'srcset="') for part in text.split(mark)[1:]]
        assert all((path.parent / name).exists() for name in named)


def test_a_timed_run_follows_an_untimed_run_of_the_same_function() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}  # type: ignore[misc]
    timings = interleaved(functions, runs=2)
    assert "".join(calls) == "aabbaabb"
    assert [len(timing.samples) for timing in timings.values()] == [2, 2]


def test_sizes_that_are_not_given_have_defaults() -> None:
    assert parse(["--vocab", "151936", "--tokens", "4096"]).shapes == ((4096, 151936, 576, 576),)
    assert parse([]).shapes == SHAPES
    assert parse(["--sweep", "--peers", "authors"]).shapes == SWEEP


@pytest.mark.parametrize(
    "arguments", [["--sweep", "--tokens", "8"], ["--peers", "nobody"], ["--divergences", "kl"], ["--vocab", "-1"]]
)
def test_bad_options_are_refused_in_words(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*arguments, "--runs", "1"])
    assert "error: " in capsys.readouterr().err
