"""Slots keep content, budget and whatever somebody still sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_zinf.layout import FlatLayout
from lightning_zinf.memory.slots import Slot, SlotRing
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.ops import host_empty

PAGE = 4096


class Request:
    """A request under way that says when it is waited for."""

    def __init__(self) -> None:
        self.waits = 0

    def wait(self, timeout: float | None = None) -> int:
        self.waits += 1
        return 0

    def done(self) -> bool:
        return self.waits > 0


def ring_of(pages: int) -> tuple[SlotRing, Counters]:
    counters = Counters()
    return SlotRing(pages * PAGE, host_empty, counters), counters


def taken(ring: SlotRing, holder: object, pages: int = 1, *, force: bool = False) -> Slot:
    got = ring.acquire(pages * PAGE, holder, force=force)
    assert got is not None
    assert not got[1]
    return got[0]


def test_content_is_kept_and_found_again() -> None:
    ring, _ = ring_of(2)
    slot = taken(ring, "a")
    slot.memory.fill_(7)
    assert ring.find("a") is None  # it is in use
    ring.release(slot)
    taken(ring, "b")
    assert ring.find("a") is slot
    assert ring.acquire(PAGE, "a") == (slot, True)
    assert slot.memory.eq(7).all()


def test_forgotten_content_is_not_found() -> None:
    ring, _ = ring_of(1)
    slot = taken(ring, "a")
    ring.forget(slot)
    ring.release(slot)
    assert ring.find("a") is None
    assert ring.acquire(PAGE, "a") == (slot, False)


def test_the_least_recently_released_slot_goes_first() -> None:
    ring, _ = ring_of(3)
    slots = {name: taken(ring, name) for name in "abc"}
    for name in "bca":
        ring.release(slots[name])
    assert [taken(ring, name) for name in "xyz"] == [slots["b"], slots["c"], slots["a"]]


def test_memory_is_taken_before_content_is_given_up() -> None:
    ring, _ = ring_of(2)
    first = taken(ring, "a")
    ring.release(first)
    assert taken(ring, "b") is not first
    assert ring.find("a") is first


def test_a_full_ring_says_none_unless_forced() -> None:
    ring, counters = ring_of(2)
    taken(ring, "a", 2)
    assert ring.acquire(PAGE, "b") is None
    assert counters.overcommits == 0
    taken(ring, "b", force=True)
    assert counters.overcommits == 1
    assert (ring.total, ring.peak) == (3 * PAGE, 3 * PAGE)


def test_after_an_overcommit_the_ring_comes_back_to_its_budget() -> None:
    ring, counters = ring_of(2)
    for slot in [taken(ring, name, 2, force=True) for name in "ab"]:
        ring.release(slot)
    taken(ring, "c", 1)
    assert ring.total <= ring.budget
    assert counters.overcommits == 1


@pytest.mark.parametrize("look", [lambda s: s.memory[:8], lambda s: s.flat(4, torch.float32)[1:]])
def test_a_slot_that_somebody_views_is_left_to_them_and_counted(look: object) -> None:
    ring, counters = ring_of(1)
    slot = taken(ring, "a")
    slot.memory.fill_(1)
    view: Tensor = look(slot)  # type: ignore[operator]
    kept = view.clone()
    ring.release(slot)
    other = taken(ring, "b")
    other.memory.fill_(2)
    assert other is not slot
    assert torch.equal(view, kept)
    assert counters.orphaned_slots == 1
    assert ring.total == PAGE


def test_a_slot_can_be_used_again_when_the_view_is_gone() -> None:
    ring, counters = ring_of(1)
    slot = taken(ring, "a")
    view = slot.memory[:8]
    ring.release(slot)
    del view
    assert taken(ring, "b") is slot
    assert counters.orphaned_slots == 0


def test_its_own_cached_views_do_not_count_as_somebody() -> None:
    slot = Slot(host_empty(PAGE))
    layout = FlatLayout.build([(4, 4), (3,)], 4)
    views = slot.views(layout, torch.float32)
    assert slot.views(layout, torch.float32) is views
    assert [v.shape for v in views] == [(4, 4), (3,)]
    slot.views(layout, torch.bfloat16)
    assert not slot.visible
    alias = views[0].detach()
    assert slot.visible
    assert not slot.use_count_beyond(1)
    del alias
    assert not slot.visible


def test_what_is_being_written_is_waited_for_before_the_slot_is_used_again() -> None:
    ring, _ = ring_of(1)
    slot, request = taken(ring, "a"), Request()
    slot.writes.append(request)
    ring.release(slot)
    assert ring.acquire(PAGE, "a") == (slot, True)
    assert request.waits == 0  # the same content: nothing to wait for
    ring.release(slot)
    assert taken(ring, "b") is slot
    assert request.waits == 1


def test_drain_waits_for_every_write() -> None:
    ring, _ = ring_of(2)
    requests = [Request(), Request()]
    for name, request in zip("ab", requests, strict=True):
        taken(ring, name).writes.append(request)
    ring.drain()
    assert [r.waits for r in requests] == [1, 1]


def test_a_slot_much_too_large_is_not_wasted_on_a_small_buffer() -> None:
    ring, _ = ring_of(64)
    large = taken(ring, "large", 64)
    ring.release(large)
    small = taken(ring, "small", 1)
    assert small is not large
    assert small.nbytes == PAGE


def test_without_memory_the_budget_becomes_what_there_is() -> None:
    allowed = 2

    def allocate(nbytes: int) -> Tensor:
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            raise MemoryError(nbytes)
        return host_empty(nbytes)

    counters = Counters()
    ring = SlotRing(8 * PAGE, allocate, counters)
    first, second = taken(ring, "a"), taken(ring, "b")
    assert ring.acquire(PAGE, "c") is None
    assert ring.budget == 2 * PAGE
    ring.release(first)
    assert taken(ring, "c") is first
    assert second.holder == "b"


def test_without_memory_for_a_single_slot_it_is_said() -> None:
    def allocate(nbytes: int) -> Tensor:
        raise MemoryError(nbytes)

    with pytest.raises(MemoryError):
        SlotRing(8 * PAGE, allocate, Counters()).acquire(PAGE, "a")


def test_shrinking_drops_free_slots_oldest_first_and_never_one_in_use() -> None:
    ring, _ = ring_of(4)
    slots = {name: taken(ring, name) for name in "abcd"}
    for name in "bad":
        ring.release(slots[name])
    ring.shrink(2 * PAGE)
    assert ring.total == 2 * PAGE
    assert [ring.find(name) for name in "bad"] == [None, None, slots["d"]]
    ring.shrink(0)
    assert ring.total == PAGE
    assert slots["c"].holder == "c"
    ring.shrink(8 * PAGE)
    assert ring.budget == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40), st.booleans(), st.booleans()), max_size=60))
def test_whatever_happens_content_and_budget_are_kept(steps: list[tuple[int, int, bool, bool]]) -> None:
    """Each step takes a holder's slot or gives it back; some force, some keep a view."""
    ring, counters = ring_of(64)
    sizes: dict[int, int] = {}
    in_use: dict[int, Slot] = {}
    views: list[tuple[Tensor, int]] = []
    for holder, pages, force, look in steps:
        if holder in in_use:
            slot = in_use.pop(holder)
            if look:
                views.append((slot.memory[:16], holder))
            ring.release(slot)
        else:
            nbytes = sizes.setdefault(holder, pages) * PAGE
            overcommits = counters.overcommits
            got = ring.acquire(nbytes, holder, force=force)
            assert got is not None or not force
            if got is None:
                continue
            slot, hit = got
            assert slot.nbytes >= nbytes
            assert all(slot is not other for other in in_use.values())
            if hit:
                assert slot.memory[:16].eq(holder).all()
            slot.memory.fill_(holder)
            in_use[holder] = slot
            assert ring.total <= ring.budget or counters.overcommits > overcommits or hit or ring.peak > ring.budget
        assert all(view.eq(owner).all() for view, owner in views)
        assert all(slot.memory.eq(owner).all() for owner, slot in in_use.items())
        assert ring.total == sum(s.nbytes for s in ring._slots) <= ring.peak
        assert ring.peak <= ring.budget or counters.overcommits > 0


def test_who_asks_first_need_not_wait_for_what_is_being_written() -> None:
    ring, counters = ring_of(2)
    assert not ring.would_wait(PAGE, "a")
    first, second = taken(ring, "a"), taken(ring, "b")
    write = Request()
    first.writes.append(write)
    ring.release(first)
    ring.release(second)
    assert ring.would_wait(PAGE, "c")  # for the first, which is next to go
    assert ring.would_wait(2 * PAGE, "c")
    assert not ring.would_wait(PAGE, "a")
    assert not ring.would_wait(PAGE, "b")
    assert write.waits == 0
    write.waits += 1  # it is done, and nobody has waited for it
    assert not ring.would_wait(PAGE, "c")
    assert ring.acquire(PAGE, "c") == (first, False)
    assert counters.overcommits == 0


def test_where_there_is_no_slot_at_all_nobody_would_wait() -> None:
    ring, _ = ring_of(1)
    slot = taken(ring, "a")
    slot.writes.append(Request())
    assert not ring.would_wait(PAGE, "b")
    assert ring.acquire(PAGE, "b") is None


def test_a_slot_that_somebody_sees_is_not_the_next_to_go() -> None:
    ring, _ = ring_of(2)
    first, second = taken(ring, "a"), taken(ring, "b")
    seen = first.memory[:8]
    second.writes.append(Request())
    ring.release(first)
    ring.release(second)
    assert ring.would_wait(PAGE, "c")
    del seen
    assert not ring.would_wait(PAGE, "c")
