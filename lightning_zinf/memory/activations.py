"""Activations on host memory or NVMe: out in forward, ahead of their use back in backward.

Note [Activations that are away]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
``put`` takes the bytes of a storage and copies them at once into a slot of staging memory, so that whoever had them may
free or change them. From there they are written to NVMe in the background. Staging is a ring under a byte budget: when
it is used up, ``put`` waits for the write that was started longest ago. A slot keeps its content until it is taken,
so what was put last, which backward wants first, is still there and is not read (``activation_reused_bytes``).

Backward wants things in the reverse of the order in which they were put. So ``get`` starts to read what was put before
it, as far down as staging has room. Where host and device are one memory, what ``get`` returns lies in the slot itself,
which is free again when nobody sees it any more (the storage use count tells). On an accelerator with memory of its
own, ``get`` copies to fresh memory there, and copies the next one ahead. In the tier ``host`` the slots are where
things rest: as many as are needed, kept from step to step.

Who is done with an activation drops its ``Saved``. That may happen on any thread and at any time, so it is only noted
then; the room is taken back at the next call.

Whoever changes what ``get`` returned in place changes a copy: versions tell, and the next ``get`` brings a clean one.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_zinf.layout import SHARD_ALIGNMENT, round_up
from lightning_zinf.memory.extents import ExtentHeap, Room
from lightning_zinf.memory.link import Copy, DeviceLink
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.memory.pool import BlockPool
from lightning_zinf.memory.slots import Slot, SlotRing, Ticket
from lightning_zinf.monitor.counters import Counters

_NOWHERE = 1 << 62
"""More than any record's number."""
_SIBLINGS = 4
"""An operator that saved several tensors wants them back in the order in which they were put."""


class _Record:
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
        self.device_version = -1
        self.changed = False  # by its owner, while it was copied
        self.dead = False


class Saved:
    """The right to get an activation back; whoever drops the last reference gives it up."""

    __slots__ = ("__weakref__", "_dead", "record")

    def __init__(self, record: _Record, dead: deque[_Record]) -> None:
        self.record = record
        self._dead = dead

    def __del__(self) -> None:
        self._dead.append(self.record)


class ActivationStore:
    """Keeps bytes of storages away from the device.

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
        self._dead: deque[_Record] = deque()
        self._records: dict[int, _Record] = {}
        self._numbers: list[int] = []  # of live records, in the order in which they were put
        self._next = 0
        self._cursor = _NOWHERE  # what is wanted soon and has a lower number was not looked at yet
        self._filling: deque[_Record] = deque()
        self._sources: dict[int, tuple[Tensor, int]] = {}
        self._lent: dict[_Record, None] = {}
        self._ahead: dict[_Record, None] = {}
        self._loose: list[Slot] = []  # slots of nobody that somebody still sees
        self._closing: list[_Record] = []  # dead, but still being written
        self._closed = False

    @property
    def live(self) -> int:
        """Number of activations that somebody may still want."""
        with self._lock:
            self.settle()
            return len(self._records)

    @property
    def resting_bytes(self) -> int:
        """Bytes on the tier where things rest, padding included."""
        if self.heap is not None:
            return self.heap.used_bytes
        return sum(r.padded for r in self._records.values())

    # ------------------------------------------------------------------ out

    def put(self, source: Tensor, owner: Tensor) -> Saved:
        """Take a copy of ``source``, a flat ``uint8`` tensor on the device; ``owner`` has the version of its content.

        Raises:
            OSError: The disk is full, or an earlier write failed.
        """
        with self._lock, torch.no_grad():
            self.settle()
            self._cursor = _NOWHERE
            record = _Record(self._next, source.numel())
            self._next += 1
            found = self._acquire(record, force=True)
            assert found is not None
            record.slot = slot = found[0]
            host = slot.memory[: record.numel]
            if self._link is None:
                host.copy_(source)
            else:
                record.copy = self._link.down(source, host)
            record.version = slot.memory._version
            if record.copy is None:
                self._landed(record)
            else:
                self._filling.append(record)
                self._sources[record.number] = owner, owner._version
                while sum(r.padded for r in self._filling) > self.budget and len(self._filling) > 1:
                    self._land(self._filling.popleft())
            self._records[record.number] = record
            self._numbers.append(record.number)
            self._counters.activation_write_bytes += record.padded
            return Saved(record, self._dead)

    def _land(self, record: _Record) -> None:
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

    def _landed(self, record: _Record) -> None:
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

    # ------------------------------------------------------------------ back

    def get(self, saved: Saved) -> Tensor:
        """Return the bytes of an activation as a flat ``uint8`` tensor on the device.

        Raises:
            OSError: They could not be written or read.
            RuntimeError: They were changed while they were copied, or the store is closed.
        """
        with self._lock, torch.no_grad():
            self.settle()
            record = saved.record
            if self._closed:
                raise RuntimeError("backward needs activations of a forward before the model was given back")
            if record.copy is not None:
                self._filling.remove(record)
                self._land(record)
            if record.changed:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation "
                    "while it was copied to where activations are kept (offload_activations)"
                )
            if record.device is None or record.device._version != record.device_version:
                self._fetch(record)
            if self._link is None:
                assert record.slot is not None
                found: Tensor | None = record.slot.memory[: record.numel]  # seen from here on, so nobody takes it
            else:
                found = record.device
            assert found is not None
            self._look_ahead(record)
            return found

    def _fetch(self, record: _Record) -> None:
        """Have a record's bytes where compute can read them."""
        if record.slot is not None and record.read is None and record.slot.memory._version != record.version:
            self._lent.pop(record, None)
            self._loose.append(record.slot)  # whoever changed it keeps it
            record.slot = None
        if record.slot is None:
            self._start(record, force=True)
        self._finish_read(record)
        if self._link is not None:
            self._upload(record)
        elif record not in self._lent:
            if record.write is not None:
                self._wait(record.write, "written")  # it must not be changed before
            self._lent[record] = None

    def _start(self, record: _Record, *, force: bool) -> bool:
        """Hold a slot for a record, and read unless its content is still there; return False if there is none."""
        found = self._acquire(record, force=force)
        if found is None:
            return False
        slot, kept = found
        if kept and slot.memory._version == record.version:
            record.slot = slot
            self._counters.activation_reused_bytes += record.padded
            return True
        assert self.nvme is not None
        assert self.heap is not None
        assert record.room is not None
        try:
            if record.write is not None:
                self._wait(record.write, "written")
            extent = self.heap.extent(record.room)
            record.read = self.nvme.read(extent, slot.memory[: record.padded], record.room.offset)
        except BaseException:
            self._give_back(slot)
            raise
        record.slot, record.version = slot, slot.memory._version
        self._counters.activation_read_bytes += record.padded
        return True

    def _finish_read(self, record: _Record) -> None:
        self._ahead.pop(record, None)
        ticket, record.read = record.read, None
        if ticket is None:
            return
        try:
            with self._counters.timed("stall_read_seconds"):
                self._wait(ticket, "read back")
        except OSError:
            assert record.slot is not None
            self._give_back(record.slot)
            record.slot = None
            raise

    def _upload(self, record: _Record) -> None:
        slot = record.slot
        assert slot is not None
        assert self._link is not None
        record.device, copy = self._link.up(slot.memory[: record.numel])
        record.device_version = record.device._version
        if copy is not None:
            slot.writes.append(copy)
        if self.nvme is None:
            self._counters.activation_read_bytes += record.padded
        else:
            record.slot = None
            self.staging.release(slot)

    def _look_ahead(self, record: _Record) -> None:
        """Start to bring what was put before ``record``, the latest first."""
        at = bisect_left(self._numbers, min(record.number + _SIBLINGS + 1, self._cursor))
        while at > 0 and self.nvme is not None:
            at -= 1
            lower = self._records[self._numbers[at]]
            if lower.slot is None and lower.device is None:
                if not self._start(lower, force=False):
                    break
                self._ahead[lower] = None
            self._cursor = lower.number
        if self._link is None:
            return
        at = bisect_left(self._numbers, record.number)
        before = self._records[self._numbers[at - 1]] if at else None
        if before is None or before.device is not None or before.slot is None or before.copy is not None:
            return
        if before.read is None or before.read.done():
            self._finish_read(before)
            self._upload(before)

    # ------------------------------------------------------------------ slots

    def _acquire(self, record: _Record, *, force: bool) -> tuple[Slot, bool] | None:
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

    def _drop(self, record: _Record) -> None:
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
        for slot in [s for s in self._loose if not s.visible]:
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

    def _bury(self, record: _Record) -> None:
        del self._records[record.number]
        del self._numbers[bisect_left(self._numbers, record.number)]
        record.dead, record.device = True, None
        if record.copy is not None:
            return  # its slot is taken back when the copy has landed
        if record in self._ahead:
            self._drop(record)
        elif record.slot is not None:
            slot, record.slot = record.slot, None
            self._lent.pop(record, None)
            self.staging.forget(slot)
            if slot.visible:
                self._loose.append(slot)
            else:
                self._give_back(slot)
        elif (kept := self.staging.find(record)) is not None:
            self.staging.forget(kept)
        if record.write is not None:
            self._closing.append(record)

    def _vacate(self, record: _Record) -> None:
        assert self.heap is not None
        assert record.room is not None
        self.heap.release(record.room)
        record.room = None

    def end_of_backward(self) -> None:
        """Take back what backward is done with; the next one starts to look ahead from its own end.

        Raises:
            OSError: Something could not be written.
        """
        with self._lock:
            self._cursor = _NOWHERE
            self.settle()

    def after_exception(self) -> None:
        """Wait for what is under way, whatever becomes of it, and take back what nobody wants."""
        with self._lock:
            while self._filling:
                with contextlib.suppress(OSError):
                    self._land(self._filling.popleft())
            while self._ahead:
                self._drop(next(iter(self._ahead)))
            self._cursor = _NOWHERE
            self.drain()

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

    def close(self) -> None:
        """Give everything back. What is still away is lost."""
        with self._lock:
            if self._closed:
                return
            self.after_exception()
            self._closed = True
            if self.nvme is not None:
                self.nvme.close()

    @staticmethod
    def _wait(ticket: Ticket, did: str) -> None:
        try:
            ticket.wait()
        except OSError as error:
            raise _explained(error, did) from error


def _explained(error: OSError, did: str) -> OSError:
    return OSError(
        error.errno,
        f"activations could not be {did} ({error.strerror}): offload_activations='nvme' keeps them in files in "
        "nvme_path; see whether that disk is healthy, or give another one",
        error.filename,
    )
