"""As `test_parallel_losses.py`, with Triton's kernels."""

from pathlib import Path

from tests.kernels import shares


def test_shared_vocabularies_take_numbers_by_token_and_labels_alone(tmp_path: Path) -> None:
    shares.run("triton", ("fkl", "jsd", "mixed_kl"), tmp_path)
