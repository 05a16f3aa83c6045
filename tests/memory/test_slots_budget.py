"""A ring of slots comes back to its budget after an overcommit, and does not overcommit again and again for that."""

from __future__ import annotations

import errno

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_zinf.memory.slots import Slot, SlotRing
from lightning_zinf.monitor.counters import Counters


class Request:
    """A request that is done when it is told to be, well or badly."""

    def __init__(self) -> None:
        self.finished = self.wrong = False

    def wait(self, timeout: float | None = None) -> int:
        self.finished = True
        if self.wrong:
            raise OSError(errno.EIO, "Input/output error", "here")
        return 0

    def done(self) -> bool:
        return self.finished


class Memory:
    """Allocates, and counts it."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __call__(self, nbytes: int) -> Tensor:
        self.nbytes += nbytes
        return torch.zeros(nbytes, dtype=torch.uint8)


def ring_of(budget: int) -> tuple[SlotRing, Counters, Memory]:
    counters, memory = Counters(), Memory()
    return SlotRing(budget, memory, counters), counters, memory


def taken(ring: SlotRing, holder: object, nbytes: int) -> Slot:
    got = ring.acquire(nbytes, holder, force=True)
    assert got is not None
    return got[0]


def use_all(ring: SlotRing, sizes: list[int]) -> None:
    """Do what one operator on everything does."""
    for slot in [taken(ring, holder, size) for holder, size in enumerate(sizes)]:
        ring.release(slot)


def test_what_was_used_longest_ago_goes_first_and_no_more_than_has_to() -> None:
    ring, counters, _ = ring_of(6)
    slots = [taken(ring, name, 3) for name in "abc"]
    assert (ring.total, counters.overcommits) == (9, 1)
    for number in (1, 0):
        ring.release(slots[number])
        assert ring.total == 6
    assert [ring.find(name) for name in "ab"] == [slots[0], None]
    ring.release(slots[2])
    assert [ring.find(name) for name in "abc"] == [slots[0], None, slots[2]]


def test_an_overcommit_exceeds_the_budget_by_no_more_than_it_takes() -> None:
    ring, counters, _ = ring_of(10)
    held = taken(ring, "held", 6)
    ring.release(taken(ring, "free", 4))
    taken(ring, "large", 7)
    assert (ring.total, ring.peak, counters.overcommits) == (13, 13, 1)
    assert held.holder == "held"


@pytest.mark.parametrize("how", ["seen", "written", "failed"])
def test_what_is_not_at_rest_is_left_where_it_is_until_it_is(how: str) -> None:
    ring, counters, _ = ring_of(4)
    first, second = taken(ring, "a", 4), taken(ring, "b", 4)
    request, view = Request(), first.memory[:1] if how == "seen" else None
    if how != "seen":
        first.writes.append(request)
        request.finished = request.wrong = how == "failed"
    ring.release(first)
    assert ring.find("a") is first
    assert (ring.total, counters.orphaned_slots) == (8, 0)
    del view
    if how == "failed":  # giving back is not where one is told
        ring.release(second)
        assert ring.find("a") is first
        with pytest.raises(OSError, match="Input/output error"):
            ring.acquire(4, "c")
        return
    request.finished = True
    if how == "seen":
        ring.release(second)
        assert (ring.find("a"), ring.find("b")) == (None, second)
    else:
        assert ring.acquire(1, "c") is None
        assert ring.find("a") is None
    assert (ring.total, counters.overcommits, counters.orphaned_slots) == (4, 1, 0)


def test_what_has_come_to_rest_is_given_back_beside_content_that_is_used_again() -> None:
    ring, _, _ = ring_of(4)
    slots = [taken(ring, name, 4) for name in ("a", "b", "c")]
    for slot in slots[:2]:
        slot.writes.append(Request())
        ring.release(slot)
    for slot in slots[:2]:
        slot.writes[0].wait()
    assert ring.acquire(4, "a") == (slots[0], True)
    assert (ring.find("b"), ring.total) == (None, 8)


STEPS = st.tuples(st.integers(0, 5), st.sampled_from(["", "force", "see", "write", "forget"]), st.booleans())


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=6, max_size=6),
    steps=st.lists(STEPS, max_size=60),
)
def test_a_ring_never_has_more_than_its_budget_or_what_is_needed_now(
    sizes: list[int], steps: list[tuple[int, str, bool]]
) -> None:
    ring, counters, _ = ring_of(64)
    used: dict[int, Slot] = {}
    seen: list[Tensor] = []
    requests: list[Request] = []
    most = 0
    for holder, how, settle in steps:
        before = counters.overcommits
        if settle:  # the ring hears of that when it is next asked
            seen.clear()
            for request in requests:
                request.finished = True
        if holder in used:
            slot = used.pop(holder)
            if how == "see":
                seen.append(slot.memory[:1])
            elif how == "write":
                requests.append(Request())
                slot.writes.append(requests[-1])
            elif how == "forget":
                ring.forget(slot)
            ring.release(slot)
        else:
            got = ring.acquire(sizes[holder], holder, force=how == "force")
            assert got is not None or how != "force"
            if got is not None:
                used[holder] = got[0]
        needed = sum(
            s.nbytes for s in ring._slots if not s.free or s.visible or not all(request.done() for request in s.writes)
        )
        most = max(most, sum(s.nbytes for s in used.values()))
        assert ring.total <= max(ring.budget, needed, most if counters.overcommits > 1 else 0)
        assert counters.overcommits == before or sum(s.nbytes for s in used.values()) > ring.budget


def test_what_is_needed_again_soon_is_kept_until_it_is_not_for_long() -> None:
    ring, counters, memory = ring_of(4)
    for _ in range(8):
        root = taken(ring, "root", 4)
        for name in ("a", "b", "c"):
            ring.release(taken(ring, name, 2))
        ring.release(root)
    assert counters.overcommits == 3  # at first, after one release and after two, of the root and what came before
    assert (ring.total, ring.peak) == (6, 6)
    before = memory.nbytes
    for number in range(6):
        assert ring.total == (6 if number < 2 else 4)
        ring.release(taken(ring, "root", 4))
    assert (ring.find("root") is not None, counters.overcommits, memory.nbytes) == (True, 3, before)


def test_a_budget_that_changes_is_what_counts_from_then_on() -> None:
    for change in (SlotRing.shrink, SlotRing.resize):
        ring, counters, _ = ring_of(4)
        root = taken(ring, "root", 4)
        for _ in range(3):
            ring.release(taken(ring, "a", 2))
        assert (ring.total, counters.overcommits) == (6, 2)
        ring.release(root)
        change(ring, 3)
        assert ring.total <= ring.budget == 3


@settings(max_examples=100, deadline=None)
@given(
    budget=st.integers(1, 100),
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    order=st.lists(st.integers(0, 5), min_size=2, max_size=20),
)
def test_a_schedule_that_repeats_comes_to_an_end_of_overcommits(
    budget: int, sizes: list[int], order: list[int]
) -> None:
    """Whether it fits or not, and also after an operator on everything."""
    ring, counters, _ = ring_of(budget)
    use_all(ring, sizes)
    for number in range(20):
        before, used = counters.overcommits, dict[int, Slot]()
        for holder in [n % len(sizes) for n in order]:
            if holder in used:
                ring.release(used.pop(holder))
            else:
                used[holder] = taken(ring, holder, sizes[holder])
        for slot in used.values():
            ring.release(slot)
        assert counters.overcommits == before or number < 15
    for _ in range(100):  # twice the length of a round
        ring.release(taken(ring, "other", 1))
    assert ring.total <= ring.budget


def steps_of_training(ring: SlotRing, memory: Memory, sizes: list[int], root: int) -> list[tuple[int, int]]:
    """Go through units forward and backward, the root's held throughout; return overcommits and new bytes by step."""
    seen = []
    for _ in range(6):
        before = ring._counters.overcommits, memory.nbytes
        top = taken(ring, "root", root)
        for holder in [*range(len(sizes)), *reversed(range(len(sizes)))]:
            ring.release(taken(ring, holder, sizes[holder]))
        ring.release(top)
        seen.append((ring._counters.overcommits - before[0], memory.nbytes - before[1]))
    return seen


def test_a_tight_ring_trains_on_after_an_operator_on_everything_as_if_there_had_been_none() -> None:
    """Units of a U-Net: giving back alone had the root in a slot that is too large, and each step overcommit."""
    sizes, root = [2**20, 2**21, 2**22, 2**22, 2**21, 2**20], 2**20
    undisturbed, counters, memory = ring_of(max(sizes) + root)
    expected = steps_of_training(undisturbed, memory, sizes, root)
    assert counters.overcommits == 0
    ring, _, memory = ring_of(max(sizes) + root)
    steps_of_training(ring, memory, sizes, root)
    use_all(ring, sizes)
    ring.release(taken(ring, "other", 2**22))  # nothing of the root is left
    found = steps_of_training(ring, memory, sizes, root)
    assert [count for count, _ in found[2:]] == [0] * 4
    assert sum(nbytes for _, nbytes in found[2:]) <= sum(nbytes for _, nbytes in expected[2:])
