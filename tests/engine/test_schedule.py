"""The recorded order says what comes next."""

from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from lightning_zinf.engine.schedule import RESYNC_WINDOW, Schedule


def recorded(order: list[int], kind: str = "train") -> Schedule:
    """Return a schedule that has seen one step and begins another."""
    schedule = Schedule()
    schedule.begin(kind)
    touch(schedule, order)
    schedule.begin(kind)
    return schedule


def touch(schedule: Schedule, order: list[int]) -> None:
    for unit in order:
        schedule.touch(unit)


def test_nothing_is_expected_of_a_first_step() -> None:
    schedule = Schedule()
    schedule.begin("train")
    schedule.touch(1)
    assert list(schedule.ahead()) == []


def test_a_step_is_expected_to_go_as_the_one_before() -> None:
    schedule = recorded([0, 1, 2, 1, 0])
    assert list(schedule.ahead()) == [0, 1, 2, 1, 0]
    touch(schedule, [0, 1])
    assert list(schedule.ahead()) == [2, 1, 0]
    touch(schedule, [2, 1, 0])
    assert list(schedule.ahead()) == []


def test_every_step_replaces_the_record() -> None:
    schedule = recorded([0, 1, 2])
    touch(schedule, [2, 0])
    schedule.begin("train")
    assert list(schedule.ahead()) == [2, 0]


def test_a_step_without_units_leaves_the_record() -> None:
    schedule = recorded([0, 1])
    schedule.begin("train")
    assert list(schedule.ahead()) == [0, 1]


def test_kinds_have_their_own_order() -> None:
    schedule = recorded([0, 1, 2], "train")
    touch(schedule, [0, 1, 2])
    schedule.begin("validate")
    assert list(schedule.ahead()) == []
    touch(schedule, [2, 1])
    schedule.begin("train")
    assert list(schedule.ahead()) == [0, 1, 2]
    schedule.begin("validate")
    assert list(schedule.ahead()) == [2, 1]


def test_a_unit_that_was_left_out_is_skipped() -> None:
    schedule = recorded([0, 1, 2, 3])
    touch(schedule, [0, 2])
    assert list(schedule.ahead()) == [3]


def test_a_unit_that_is_new_moves_nothing() -> None:
    schedule = recorded([0, 1, 2])
    touch(schedule, [0, 9])
    assert list(schedule.ahead()) == [1, 2]


def test_a_unit_that_comes_again_later_is_taken_at_its_next_mention() -> None:
    schedule = recorded([0, 1, 0, 2, 0])
    touch(schedule, [0, 0])
    assert list(schedule.ahead()) == [2, 0]


def test_a_mention_far_away_does_not_count() -> None:
    order = [0, *range(10, 10 + RESYNC_WINDOW), 1]
    schedule = recorded(order)
    touch(schedule, [0, 1])
    assert list(schedule.ahead()) == order[1:]
    touch(schedule, [10, 1])  # now it is within the window
    assert list(schedule.ahead()) == []


def test_after_the_end_comes_the_beginning() -> None:
    schedule = recorded([0, 1, 2])
    touch(schedule, [0, 1])
    assert list(schedule.ahead(wrap=True)) == [2, 0, 1, 2]


def test_the_first_step_expects_itself_again() -> None:
    schedule = Schedule()
    schedule.begin("train")
    touch(schedule, [0, 1])
    assert list(schedule.ahead(wrap=True)) == [0, 1]


def test_touching_while_looking_ahead_is_harmless() -> None:
    schedule = recorded([0, 1, 2, 3])
    ahead = schedule.ahead()
    assert list(islice(ahead, 2)) == [0, 1]
    schedule.touch(0)
    assert list(ahead) == [2, 3]


@given(st.lists(st.lists(st.integers(0, 5), max_size=20), min_size=1, max_size=4), st.integers(0, 20))
def test_a_step_that_repeats_is_foreseen_at_every_point(steps: list[list[int]], at: int) -> None:
    schedule = Schedule()
    for step in steps:
        schedule.begin("train")
        touch(schedule, step)
    last = next((step for step in reversed(steps) if step), [])
    schedule.begin("train")
    touch(schedule, last[:at])
    assert list(schedule.ahead()) == last[at:]
