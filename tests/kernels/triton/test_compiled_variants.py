"""Every kernel compiles for every GPU, without a spill, with 128-bit loads; and the check would notice otherwise."""

import pytest

from pocl_kernels.triton_backend import aot, divergence_rows, launch

ROWS_16_BIT = aot.Variant("divergence_rows", "fkl", "bf16", "fp16")


def test_every_kernel_compiles_for_every_target_without_a_spill(capsys: pytest.CaptureFixture[str]) -> None:
    status = aot.main([])
    table = capsys.readouterr().out
    assert status == 0, table
    kernels = {variant.kernel for variant, _ in aot.default_variants()}
    assert all(f"{target} " in table for target in aot.TARGETS)
    assert all(kernel in table for kernel in kernels)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_16_bit_rows_are_read_128_bits_at_a_time(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = aot.compile_variant(ROWS_16_BIT, target)
    assert report.fine
    assert report.widest_load == report.narrowest_load == 128
    # Half the block is half the load for each thread: the check must say so.
    monkeypatch.setattr(divergence_rows, "BLOCK", divergence_rows.BLOCK // 2)
    narrow = aot.compile_variant(ROWS_16_BIT, target)
    assert narrow.narrowest_load == 64
    assert not narrow.fine


@pytest.mark.parametrize(("target", "squeeze"), [("sm_80", {"maxnreg": 32}), ("gfx942", {"waves_per_eu": 8})])
def test_a_spill_is_noticed(target: str, squeeze: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    options = launch.options
    monkeypatch.setattr(launch, "options", lambda *arguments: options(*arguments) | squeeze)
    report = aot.compile_variant(aot.Variant("divergence_rows", "jsd", "fp32", "fp32"), target)
    assert report.spilled_bytes > 0
    assert not report.fine


def test_nothing_to_compile_is_no_success() -> None:
    assert aot.main(["--match", "no such kernel"]) == 1
