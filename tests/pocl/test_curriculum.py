"""The curriculum as pure functions of counts and steps."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl import curriculum
from pocl.curriculum import Curriculum, Ramp, Stage, per_stage


def quarters(count: int) -> list[int]:
    return [min(i // max(1, count // 4), 3) for i in range(count)]


def test_defaults_are_the_papers_forward_kl_run() -> None:
    stages = Curriculum.baby_step().stages
    assert [stage.subsets for stage in stages] == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]
    assert [round(stage.temperature, 2) for stage in stages] == [1.0, 1.33, 1.67, 2.0]
    assert [round(stage.kd_ratio, 2) for stage in stages] == [0.7, 0.8, 0.9, 1.0]
    assert Curriculum.baby_step().passes(quarters(400)) == 20


@given(count=st.integers(2, 9), start=st.floats(0.1, 4), end=st.floats(0.1, 4))
def test_ramps_meet_their_ends_and_are_monotone(count: int, start: float, end: float) -> None:
    for spacing in ("linear", "geometric"):
        values = Ramp(start, end, spacing).values(count)
        assert values[0] == pytest.approx(start)
        assert values[-1] == pytest.approx(end)
        ordered = sorted(values, reverse=start > end)
        assert list(values) == pytest.approx(ordered)


def test_values_are_a_number_a_pair_a_list_or_a_ramp() -> None:
    assert per_stage("x", 2, 3) == (2.0, 2.0, 2.0)
    assert per_stage("x", (1, 3), 3) == (1.0, 2.0, 3.0)
    assert per_stage("x", [1, 5, 2, 8], 4) == (1.0, 5.0, 2.0, 8.0)
    assert per_stage("x", {"start": 1, "end": 4, "spacing": "geometric"}, 3) == pytest.approx((1, 2, 4))
    with pytest.raises(ValueError, match="x must be a number, a pair"):
        per_stage("x", [1, 2, 3], 4)
    with pytest.raises(ValueError, match="start, end"):
        per_stage("x", {"begin": 1}, 4)


def test_controls_differ_from_baby_step_in_the_samples_only() -> None:
    base = Curriculum.baby_step(3)
    one_pass, backwards, shuffled = Curriculum.one_pass(3), Curriculum.reversed(3), Curriculum.shuffled(3)
    assert [stage.subsets for stage in one_pass.stages] == [(0,), (1,), (2,)]
    assert [stage.subsets for stage in backwards.stages] == [(2,), (2, 1), (2, 1, 0)]
    assert [stage.subsets for stage in shuffled.stages] == [stage.subsets for stage in base.stages]
    for control in (one_pass, backwards, shuffled):
        assert [s.temperature for s in control.stages] == [s.temperature for s in base.stages]
        assert control.name != base.name


def test_shuffled_keeps_the_sizes_and_is_seeded() -> None:
    subsets = quarters(40)
    rows = Curriculum.shuffled(seed=1).rows(subsets)
    assert [len(r) for r in rows] == [len(r) for r in Curriculum.baby_step().rows(subsets)]
    assert rows == Curriculum.shuffled(seed=1).rows(subsets)
    assert rows != Curriculum.shuffled(seed=2).rows(subsets)
    assert rows[0] != Curriculum.baby_step().rows(subsets)[0]


@given(count=st.integers(4, 60), batch=st.integers(1, 9))
def test_every_step_belongs_to_the_stage_whose_turn_it_is(count: int, batch: int) -> None:
    curriculum = Curriculum.baby_step(epochs=2)
    steps = curriculum.stage_steps(quarters(count), batch)
    indices = [curriculum.stage_at(step, steps).index for step in range(sum(steps))]
    assert indices == [i for i, n in enumerate(steps) for _ in range(n)]
    assert curriculum.stage_at(sum(steps) + 5, steps).index == 3


def test_steps_match_the_papers_when_the_last_batch_is_counted() -> None:
    # 11,435 samples in batches of 64: 44.6 steps an epoch in the first stage
    subsets = [min(i // 2858, 3) for i in range(11435)]
    assert Curriculum.baby_step().stage_steps(subsets, 64) == (8 * 45, 8 * 90, 8 * 134, 8 * 179)


def test_passes_count_steps_where_a_stage_has_them() -> None:
    curriculum = Curriculum.baby_step(2, epochs=2, max_steps=None)
    assert curriculum.passes([0, 1] * 5) == 3
    assert Curriculum.constant(num_subsets=2, max_steps=10).passes([0, 1] * 10, batch_size=4) == 2
    with pytest.raises(ValueError, match="batch_size is needed"):
        Curriculum.constant(num_subsets=2, max_steps=10).passes([0, 1] * 10)


def test_stage_at_needs_step_counts_where_epochs_are_counted() -> None:
    assert Curriculum.baby_step(2, max_steps=(3, 5)).stage_at(4).index == 1
    with pytest.raises(ValueError, match="stage_steps"):
        Curriculum.baby_step(2).stage_at(0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature of stage 0 must be a finite number > 0"),
        ({"temperature": float("nan")}, "temperature of stage 0"),
        ({"kd_ratio": 1.2}, r"kd_ratio of stage 0 must be a number in \[0, 1\]"),
        ({"kd_ratio": -0.1}, "kd_ratio of stage 0"),
        ({"skew": 1.0}, "skew of stage 0"),
        ({"epochs": 0}, "epochs of stage 0"),
        ({"subsets": ()}, "subsets of stage 0"),
        ({"learning_rate": 0.0}, "learning_rate of stage 0"),
        ({"max_steps": 0}, "max_steps of stage 0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(**({"index": 0, "subsets": (0,)} | fields))


def test_rules_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="patience"):
        Curriculum.baby_step(patience=0)
    with pytest.raises(ValueError, match="start must be one of best, last"):
        Curriculum.baby_step(start="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="numbered"):
        Curriculum((Stage(1, (0,)),))
    with pytest.raises(ValueError, match="num_stages"):
        Curriculum.baby_step(0)


def test_more_stages_than_samples_and_empty_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples for 4 stages"):
        Curriculum.baby_step().rows([0, 1, 2])
    with pytest.raises(ValueError, match=r"stage 0 has no samples.*num_subsets=4"):
        Curriculum.baby_step().rows([1, 2, 3, 3])


def test_table_shows_samples_steps_and_values() -> None:
    text = Curriculum.baby_step(epochs=2).describe(quarters(40), 4, learning_rate=1e-4, seconds_per_step=6.0)
    lines = text.splitlines()
    assert lines[0].split() == ["stage", "subsets", "samples", "epochs", "steps", "temperature", "kd_ratio", "skew",
                                "learning_rate", "time"]  # fmt: skip
    assert lines[2].split() == ["1", "0-1", "20", "2", "10", "1.33", "0.8", "-", "0.0001", "1.0", "min"]
    assert "best weights" in lines[-1]


def test_the_module_needs_neither_torch_nor_transformers() -> None:
    # the file alone: the package around it offers the losses, which need torch
    code = (
        f"import runpy, sys; runpy.run_path({curriculum.__file__!r}); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
