"""The memory and the disk that activations take while they are away, and who takes it back.

Note [Room of activations]
~~~~~~~~~~~~~~~~~~~~~~~~~~
Staging is a ring under a byte budget: when it is used up, whoever needs a slot waits for the copy from the device or
the write that was started longest ago. In the tier ``host`` the slots are where things rest: as many as are needed,
kept from step to step. A slot that was lent to compute is free again when nobody sees it any more (the storage use
count tells).

Who is done with an activation drops its ``Saved``. That may happen on any thread and at any time, so it is only noted
then; the room is taken back at the next call (``settle``).
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable

from torch import Tensor

from lightning_zinf.layout import SHARD_ALIGNMENT, round_up
from lightning_zinf.memory.extents import ExtentHeap, Room
from lightning_zinf.memory.link import Copy, DeviceLink
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.memory.pool import BlockPool
from lightning_zinf.memory.slots import Slot, SlotRing, Ticket, failed
from lightning_zinf.monitor.counters import Counters

NOWHERE = 1 << 62
"""More than any record's number."""


class Record:
    """Where the bytes of one activation are."""

    def __init__(self, number: int, numel: int) -> None:
        self.number = number
        self.numel = numel
        self.padded = round_up(numel, SHARD_ALIGNMENT)
        self.slot: Slot | None = None  # a slot that is held for it
        self.version = -1  # of the slot's memory, when its content was right
        self.room: Room | None = None
        self.write: Ticket | None = None
        self.read: Ticket | None = None
        self.copy: Copy | None = None  # on its way from the device
        self.device: Tensor | None = None
        self.arrival: Copy | None = None  # what brings ``device``
        self.device_version = -1
        self.changed = False  # by its owner, while it was copied
        self.dead = False


class Saved:
    """The right to get an activation back; whoever drops the last reference gives it up."""

    __slots__ = ("__weakref__", "_dead", "record")

    def __init__(self, record: Record, dead: deque[Record]) -> None:
        self.record = record
        self._dead = dead

    def __del__(self) -> None:
        self._dead.append(self.record)


class ActivationRoom:
    """Slots and places on disk of activations: takes them, and takes them back.

    Args:
        budget: Bytes of staging, and of copies from the device under way.
        allocate: Makes a ``uint8`` tensor of that many bytes of host memory, aligned for direct I/O.
        counters: Where bytes and stalls are counted.
        nvme: Where things rest; None for host memory. Closed with this.
        link: The way to the device; None where device and host are one memory.
    """

    def __init__(
        self,
        budget: int,
        allocate: Callable[[int], Tensor],
        counters: Counters,
        nvme: NvmeStore | None = None,
        link: DeviceLink | None = None,
    ) -> None:
        assert nvme is not None or link is not None, "there is nowhere to bring anything"
        self.budget = budget
        self.nvme = nvme
        self.heap = None if nvme is None else ExtentHeap(nvme)
        self.staging: SlotRing | BlockPool = (
            BlockPool(allocate, counters) if nvme is None else SlotRing(budget, allocate, counters, "activations")
        )
        self._link = link
        self._counters = counters
        self._lock = threading.RLock()
        self._dead: deque[Record] = deque()
        self._records: dict[int, Record] = {}
        self._numbers: list[int] = []  # of live records, in the order in which they were put
        self._next = 0
        self._cursor = NOWHERE  # what is wanted soon and has a lower number was not looked at yet
        self._filling: deque[Record] = deque()
        self._sources: dict[int, tuple[Tensor, int]] = {}
        self._lent: dict[Record, None] = {}
        self._ahead: dict[Record, None] = {}
        self._loose: list[Slot] = []  # slots of nobody that somebody still sees
        self._closing: list[Record] = []  # dead, but still being written
        self._closed = False

    # ------------------------------------------------------------------ out

    def _land(self, record: Record) -> None:
        """Wait for a copy from the device, then go on with it."""
        assert record.copy is not None
        with self._counters.timed("stall_write_seconds"):
            record.copy.wait()
        record.copy = None
        owner, version = self._sources.pop(record.number)
        record.changed = owner._version != version
        if record.dead:
            assert record.slot is not None
            self._give_back(record.slot)
        else:
            self._landed(record)

    def _landed(self, record: Record) -> None:
        """The bytes are in the slot: start to write them."""
        if self.nvme is None or self.heap is None:
            return
        slot = record.slot
        assert slot is not None
        try:
            record.room = self.heap.allocate(record.padded)
            record.write = self.nvme.write(
                self.heap.extent(record.room), slot.memory[: record.padded], record.room.offset
            )
        except BaseException:
            self._give_back(slot)
            raise
        slot.writes.append(record.write)
        record.slot = None
        self.staging.release(slot)

    # ------------------------------------------------------------------ slots

    def _acquire(self, record: Record, *, force: bool) -> tuple[Slot, bool] | None:
        """Take a slot; with ``force``, wait for copies, drop what was fetched ahead, or exceed the budget."""
        self._collect()
        while True:
            try:
                found = self.staging.acquire(record.padded, record)
            except OSError as error:
                raise _explained(error, "written") from error
            if found is not None or not force:
                return found
            if self._filling:
                self._land(self._filling.popleft())
            elif self._ahead:
                self._drop(min(self._ahead, key=lambda r: r.number))
            else:
                return self.staging.acquire(record.padded, record, force=True)

    def _drop(self, record: Record) -> None:
        """Give up what was fetched too far ahead."""
        del self._ahead[record]
        self._cursor = max(self._cursor, record.number + 1)
        slot, record.slot = record.slot, None
        assert slot is not None
        ticket, record.read = record.read, None
        if ticket is not None:
            with contextlib.suppress(OSError):
                ticket.wait()
        self._give_back(slot)

    def _collect(self) -> None:
        """Take back slots that nobody sees any more."""
        for record in [r for r in self._lent if r.slot is not None and not r.slot.visible]:
            del self._lent[record]
            slot, record.slot = record.slot, None
            assert slot is not None
            self.staging.release(slot)
        for slot in [s for s in self._loose if not _visible(s)]:
            self._loose.remove(slot)
            self._give_back(slot)

    def _give_back(self, slot: Slot) -> None:
        self.staging.forget(slot)
        self.staging.release(slot)

    # ------------------------------------------------------------------ the end

    def settle(self, *, wait: bool = False) -> None:
        """Take back the room of what nobody wants any more.

        Args:
            wait: Also of what is still being written.

        Raises:
            OSError: It could not be written. Nobody wanted it; but the next one may be wanted.
        """
        with self._lock:
            self._collect()
            while self._filling and (copy := self._filling[0].copy) is not None and copy.done():
                self._land(self._filling.popleft())
            while self._dead:
                self._bury(self._dead.popleft())
            closing, self._closing = self._closing, []
            failed: OSError | None = None
            for record in closing:
                assert record.write is not None
                if not wait and not record.write.done():
                    self._closing.append(record)
                    continue
                try:
                    self._wait(record.write, "written")
                except OSError as error:
                    failed = failed or error
                self._vacate(record)
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # the traceback refers to this frame

    def _bury(self, record: Record) -> None:
        del self._records[record.number]
        del self._numbers[bisect_left(self._numbers, record.number)]
        record.dead, record.device, record.arrival = True, None, None
        if record.copy is not None:
            return  # its slot is taken back when the copy has landed
        if record in self._ahead:
            self._drop(record)
        elif record.slot is not None:
            slot, record.slot = record.slot, None
            self._lent.pop(record, None)
            self.staging.forget(slot)
            if _visible(slot):
                self._loose.append(slot)
            else:
                self._give_back(slot)
        elif (kept := self.staging.find(record)) is not None:
            self.staging.forget(kept)
        if record.write is not None:
            self._closing.append(record)

    def _vacate(self, record: Record) -> None:
        assert self.heap is not None
        assert record.room is not None
        self.heap.release(record.room)
        record.room = None

    def drain(self) -> None:
        """Wait until nothing is under way. What could not be written is said when it is wanted."""
        with self._lock:
            with contextlib.suppress(OSError):
                self.settle(wait=True)
            for record in self._records.values():
                if record.write is not None:
                    with contextlib.suppress(OSError):
                        record.write.wait()
            with contextlib.suppress(OSError):
                self.staging.drain()

    @staticmethod
    def _wait(ticket: Ticket, did: str) -> None:
        try:
            ticket.wait()
        except OSError as error:
            raise _explained(error, did) from error


def _visible(slot: Slot) -> bool:
    """Whether somebody outside still sees a slot's memory, or a copy to the device still reads it."""
    slot.writes = [t for t in slot.writes if not t.done() or failed(t)]  # a request has hold of the memory it reads
    return slot.visible


def _explained(error: OSError, did: str) -> OSError:
    return OSError(
        error.errno,
        f"activations could not be {did} ({error.strerror}): offload_activations='nvme' keeps them in files in "
        "nvme_path; see whether that disk is healthy, or give another one",
        error.filename,
    )
