"""Others start in the folder of a running recipe: `benchmarks/races.py` with few starts."""

from pathlib import Path

import pytest

from benchmarks.races import race


@pytest.mark.slow
def test_starts_at_random_moments_are_refused_and_the_run_is_undisturbed(
    recipe: Path, finished: Path, tmp_path: Path
) -> None:
    found = race(recipe, tmp_path, starts=4, alone=finished / "run")
    assert found.refused == 4, found.starts
    assert len(found.alone) == 64
    assert found.undisturbed
