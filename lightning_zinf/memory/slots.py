"""A ring of persistent slots, the memory that gathered weights pass through.

Note [Slots]
~~~~~~~~~~~~
Freeing and growing a storage per gather costs a page fault per page on a CPU and fragments a GPU's allocator, so
gathered buffers live in slots that are allocated once and reused. The sum of their sizes never exceeds the budget,
except where a running operator needs more at once than the budget holds: then the ring overcommits and counts it.

After that, free slots are given back, least recently used first, as soon as what is held, seen or being written leaves
room for the budget again. Where each step needs more than the budget, that alone would be in vain: what is given back
has to be made again, and counts again. It may be that the budget is too small, or that slots which are larger than what
they hold take up what is missing. So a ring that has to overcommit again soon after keeps as much as was needed then,
until that has not been needed for twice as long as was between two such times; then it comes back to its budget.

A free slot keeps its content and remembers whose it is (``holder``), so a unit that is needed again before its slot was
taken costs no read: that happens at the turn from forward to backward. The least recently used slot is taken first,
which for a palindrome (forward, then backward) is the one whose next use is farthest.

A slot is taken for somebody else only when its storage use count is at its baseline, that is when nobody outside of the
engine still sees it. A slot that stays visible is left to whoever holds it and counted as orphaned; so a weight that
was stashed outside of autograd's saved tensors stays right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_zinf.layout import FlatLayout
from lightning_zinf.monitor.counters import Counters

_SOON = 1024
"""Releases within which a ring that gives back and overcommits again has given back in vain."""


class Ticket(Protocol):
    """A request under way."""

    def wait(self, timeout: float | None = None) -> int:
        """Block until finished; raise what went wrong."""

    def done(self) -> bool:
        """Whether it has finished, well or not."""


def wait_all(tickets: Iterable[Ticket]) -> None:
    """Wait until all of these are finished, and raise what went wrong first."""
    failed: OSError | None = None
    for ticket in tickets:
        try:
            ticket.wait()
        except OSError as error:
            failed = failed or error
    if failed is not None:
        try:
            raise failed
        finally:
            del failed  # its traceback refers to this frame, and so to what every caller holds


def failed(ticket: Ticket) -> bool:
    """Wait until a request is finished, and tell whether it went wrong."""
    try:
        ticket.wait()
    except OSError:
        return True
    return False


def use_count(tensor: Tensor) -> int:
    """Return how many tensors and other owners share the storage of ``tensor``."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


class Slot:
    """A piece of memory that holds one flat buffer at a time."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.nbytes = memory.numel()
        self.holder: object | None = None
        self.free = False
        self.stamp = 0
        self.writes: list[Ticket] = []
        self.event: Any = None
        self._views: dict[tuple[int, torch.dtype], tuple[FlatLayout, list[Tensor]]] = {}
        self._baseline = use_count(memory)

    def views(self, layout: FlatLayout, dtype: torch.dtype) -> list[Tensor]:
        """Return one view per parameter of ``layout``; cached, since equal units share layouts."""
        key = (id(layout), dtype)
        cached = self._views.get(key)
        if cached is None:
            before = use_count(self.memory)
            flat = self.flat(layout.padded_numel, dtype)
            views = [
                flat[o : o + n].view(s) for o, n, s in zip(layout.offsets, layout.numels, layout.shapes, strict=True)
            ]
            del flat
            self._baseline += use_count(self.memory) - before  # the views, and a base that they keep alive
            cached = self._views[key] = (layout, views)
        return cached[1]

    def flat(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return the first ``numel`` elements as one tensor of ``dtype``."""
        return self.memory[: numel * dtype.itemsize].view(dtype)

    @property
    def visible(self) -> bool:
        """Whether somebody outside of the engine still sees this memory."""
        return use_count(self.memory) > self._baseline

    def use_count_beyond(self, expected: int) -> bool:
        """Whether more than ``expected`` tensors outside of the engine view this memory."""
        return use_count(self.memory) > self._baseline + expected

    @property
    def written(self) -> bool:
        """Whether nothing is being written from it."""
        return all(ticket.done() for ticket in self.writes)

    @property
    def at_rest(self) -> bool:
        """Whether nobody outside of the engine sees it and nothing is being written from it.

        What could not be written is not at rest: whoever waits for it is to be told.
        """
        if not self.written or any(failed(ticket) for ticket in self.writes):
            return False
        self.writes.clear()  # a request holds on to the memory until somebody waits for it
        return not self.visible

    def wait_writes(self, counters: Counters) -> None:
        """Wait until the content has been written where it was being written to."""
        if self.writes:
            with counters.timed("stall_write_seconds"):
                writes, self.writes = self.writes, []
                wait_all(writes)


class SlotRing:
    """Slots of several sizes under one byte budget.

    Args:
        budget: Most bytes that all slots together may take.
        allocate: Makes a ``uint8`` tensor of that many bytes, aligned for direct I/O.
        counters: Where reuse, orphans and overcommits are counted.
        name: For traces.
    """

    def __init__(self, budget: int, allocate: Callable[[int], Tensor], counters: Counters, name: str = "slots") -> None:
        self.name = name
        self.budget = budget
        self.total = 0
        self.peak = 0
        self._kept = 0
        self._exceeded: int | None = None  # when more than the budget was last in use, by the clock
        self._gap = 0
        self._gave_back = False
        self._allocate = allocate
        self._counters = counters
        self._slots: list[Slot] = []
        self._clock = 0  # counts releases

    def find(self, holder: object) -> Slot | None:
        """Return the free slot that still has the content of ``holder``."""
        return next((s for s in self._slots if s.free and s.holder is holder), None)

    def would_wait(self, nbytes: int, holder: object) -> bool:
        """Whether :meth:`acquire` would wait until the content of the slot that is next to go has been written."""
        if self.find(holder) is not None or self.total + nbytes <= self._limit:
            return False
        for slot in self._fitting(nbytes):
            if not slot.written:
                return True
            if slot.at_rest:
                return False
        held = self.total
        for slot in self._free():
            if held + nbytes <= self._limit:
                break
            if not slot.written:
                return True
            held -= slot.nbytes
        return False

    def acquire(self, nbytes: int, holder: object, *, force: bool = False) -> tuple[Slot, bool] | None:
        """Take a slot of at least ``nbytes`` for ``holder``.

        Args:
            nbytes: Size needed.
            holder: Whose content it will have.
            force: Exceed the budget rather than return None.

        Returns:
            The slot and whether it still has the content of ``holder``; None if the budget is used up by slots in use.
        """
        found = self.find(holder)
        if found is not None:
            self._take(found, holder)
        self._come_back()
        if found is not None:
            return found, True
        slot = self._pick(nbytes)
        if slot is None and self._make_room(nbytes):
            slot = self._new(nbytes)
        if slot is None and force:
            slot = self._overcommit(nbytes)
        if slot is None:
            return None
        slot.wait_writes(self._counters)
        return self._take(slot, holder), False

    def release(self, slot: Slot) -> None:
        """Give a slot back; it keeps its content until somebody else needs it."""
        self._clock += 1
        if self.total > self.budget and self._used() > self.budget:
            self._exceeded = self._clock
        slot.free, slot.stamp = True, self._clock
        self._come_back()
        self._sample()

    def forget(self, slot: Slot) -> None:
        """Let the content of ``slot`` not be found again."""
        slot.holder = None

    def shrink(self, budget: int) -> None:
        """Lower the budget, and give free slots back until the rest fits."""
        self.resize(min(self.budget, budget))

    def resize(self, budget: int) -> None:
        """Set the budget, and give free slots back until the rest fits."""
        self.budget, self._kept = budget, 0
        self._make_room(0)

    def drain(self) -> None:
        """Wait for every write under way."""
        for slot in self._slots:
            slot.wait_writes(self._counters)

    def _take(self, slot: Slot, holder: object) -> Slot:
        slot.free, slot.holder = False, holder
        self._sample()
        return slot

    def _sample(self) -> None:
        if (trace := self._counters.trace) is not None:
            used = sum(s.nbytes for s in self._slots if not s.free)
            trace.level(self.name, used, self.total, self.budget)

    def _pick(self, nbytes: int) -> Slot | None:
        # A new slot is better than one with content somebody may come back for, as long as the budget lasts.
        if self.total + nbytes <= self._limit:
            try:
                return self._new(nbytes)
            except MemoryError:
                if not self._slots:
                    raise
                # Less is free than when the budget was made: go on with what is there.
                self.budget, self._kept = min(self.budget, self.total), 0
        for slot in self._fitting(nbytes):
            slot.wait_writes(self._counters)  # a request under way holds on to the memory too
            if not slot.visible:
                return slot
        return None

    def _fitting(self, nbytes: int) -> list[Slot]:
        """Return the free slots that may be taken for so many bytes, least recently used first."""
        roof = max(2 * nbytes, nbytes + 65536)
        used = self._used()
        if used + nbytes <= self.budget:  # no slot so large that what is in use exceeds the budget by that alone
            roof = min(roof, self.budget - used)
        return [s for s in self._free() if nbytes <= s.nbytes <= roof]

    def _make_room(self, nbytes: int) -> bool:
        """Drop free slots, least recently used first, until ``nbytes`` more fit."""
        free = self._free()
        if nbytes and self.total - sum(s.nbytes for s in free) + nbytes > self._limit:
            return False
        for slot in free:
            if self.total + nbytes <= self._limit:
                break
            slot.wait_writes(self._counters)
            self._counters.orphaned_slots += slot.visible
            self._drop(slot)
        return True

    def _come_back(self, nbytes: int = 0) -> None:
        """Give back what there is beyond the limit, as far as it is at rest.

        Args:
            nbytes: So many more are about to be allocated.
        """
        if self._exceeded is not None and self._clock - self._exceeded > 2 * self._gap:
            self._kept = 0
        if self.total + nbytes <= self._limit:
            return
        for slot in self._free():
            if self.total + nbytes <= self._limit:
                break
            if slot.at_rest:
                self._drop(slot)

    def _overcommit(self, nbytes: int) -> Slot:
        """Exceed the limit, by no more than it takes."""
        self._counters.overcommits += 1
        if self._exceeded is not None and self._gave_back and self._clock - self._exceeded <= _SOON:
            self._gap = max(self._gap, self._clock - self._exceeded)
            self._kept = max(self._kept, self._used() + nbytes)
        self._exceeded, self._gave_back = self._clock, False
        self._come_back(nbytes)
        return self._new(nbytes)

    @property
    def _limit(self) -> int:
        """Bytes that all slots together may take now."""
        return max(self.budget, self._kept)

    def _used(self) -> int:
        return sum(s.nbytes for s in self._slots if not s.free)

    def _free(self) -> list[Slot]:
        """Return free slots, least recently used first."""
        return sorted((s for s in self._slots if s.free), key=lambda s: s.stamp)

    def _drop(self, slot: Slot) -> None:
        self._slots.remove(slot)
        self.total -= slot.nbytes
        self._gave_back = True

    def _new(self, nbytes: int) -> Slot:
        slot = Slot(self._allocate(nbytes))
        self._slots.append(slot)
        self.total += nbytes
        self.peak = max(self.peak, self.total)
        return slot
