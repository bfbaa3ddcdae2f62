"""What a process group shares beside the plain divergences: numbers of one a token, and the cross-entropy's options."""

from pathlib import Path

from tests.kernels import shares


def test_shared_vocabularies_take_numbers_by_token_and_labels_alone(tmp_path: Path) -> None:
    shares.run("cpu", ("skew_rkl", "fkl", "alpha_beta", "mixed_kl"), tmp_path)
