"""Held-out parts: disjoint, repeatable, and no question on two sides."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.split import hold_out, normalized

PROMPTS = [f"question {i // 2}{'?' * (i % 2)}" for i in range(60)]


@given(st.integers(0, 5), st.lists(st.integers(0, 12), min_size=2, max_size=2))
def test_parts_are_disjoint_and_cover_everything(seed: int, sizes: list[int]) -> None:
    parts = hold_out(PROMPTS, sizes, seed=seed)
    assert sorted(index for part in parts for index in part.tolist()) == list(range(60))
    assert all(len(part) <= size for part, size in zip(parts[:-1], sizes, strict=True))


@given(
    st.lists(st.sampled_from(["", "?", "a", "A!", "b", "\u00e9", "c d", "C  d"]), min_size=1, max_size=40),
    st.lists(st.integers(0, 6), max_size=3),
    st.integers(0, 3),
)
def test_parts_are_those_of_the_texts_sorted_by_their_hashes(prompts: list[str], sizes: list[int], seed: int) -> None:
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(normalized(prompt) or prompt, []).append(index)
    order = sorted(groups, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
    wanted: list[list[int]] = []
    for size in sizes:
        part: list[int] = []
        for text in list(order):
            if len(part) + len(groups[text]) <= size:
                part += groups[text]
                order.remove(text)
        wanted.append(sorted(part))
    if order:
        found = hold_out(iter(prompts), sizes, seed=seed)
        assert [part.tolist() for part in found] == [*wanted, [i for text in order for i in groups[text]]]


def test_spellings_of_one_question_stay_on_one_side() -> None:
    parts = hold_out(PROMPTS, [10, 10], seed=0)
    sides = [{normalized(PROMPTS[index]) for index in part} for part in parts]
    assert sum(map(len, sides)) == len(set.union(*sides))


def test_the_seed_alone_decides() -> None:
    first, second, other = (hold_out(PROMPTS, [10], seed=seed)[0].tolist() for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_the_rest_is_in_random_order_so_that_its_beginning_is_a_fair_sample() -> None:
    rest = hold_out(PROMPTS, [0], seed=0)[-1].tolist()
    assert rest != sorted(rest)


def test_a_question_with_more_answers_than_fit_is_left_to_train_on() -> None:
    parts = hold_out(["same"] * 5 + ["other"], [2], seed=0)
    assert [part.tolist() for part in parts] == [[5], [0, 1, 2, 3, 4]]


def test_holding_out_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="2 samples with 2 distinct prompts leave none to train on"):
        hold_out(["a", "b"], [1, 1], seed=0)
    with pytest.raises(ValueError, match="must not be negative"):
        hold_out(["a", "b"], [-1], seed=0)
