"""Activations on host memory or NVMe: out in forward, ahead of their use back in backward.

Note [Activations that are away]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
``put`` takes the bytes of a storage and copies them at once into a slot of staging memory, so that whoever had them may
free or change them. From there they are written to NVMe in the background. A slot keeps its content until it is taken,
so what was put last, which backward wants first, is still there and is not read (``activation_reused_bytes``).

Backward wants things in the reverse of the order in which they were put. So ``get`` starts to read what was put before
it, as far down as staging has room. Where host and device are one memory, what ``get`` returns lies in the slot itself.
On an accelerator with memory of its own, ``get`` copies to fresh memory there, and copies the next one ahead.

Whoever changes what ``get`` returned in place changes a copy: versions tell, and the next ``get`` brings a clean one.
What becomes of slots and of room on disk is in ``activation_room.py``.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left

import torch
from torch import Tensor

from lightning_zinf.memory.activation_room import NOWHERE, ActivationRoom, Record, Saved

_SIBLINGS = 4
"""An operator that saved several tensors wants them back in the order in which they were put."""


class ActivationStore(ActivationRoom):
    """Keeps bytes of storages away from the device.

    The arguments are those of :class:`ActivationRoom`.
    """

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
            self._cursor = NOWHERE
            record = Record(self._next, source.numel())
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
                if record.arrival is not None:
                    self._link.arrive(record.arrival)
            assert found is not None
            self._look_ahead(record)
            return found

    def _fetch(self, record: Record) -> None:
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

    def _start(self, record: Record, *, force: bool) -> bool:
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

    def _finish_read(self, record: Record) -> None:
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

    def _upload(self, record: Record) -> None:
        slot = record.slot
        assert slot is not None
        assert self._link is not None
        record.device, record.arrival = self._link.up(slot.memory[: record.numel])
        record.device_version = record.device._version
        if record.arrival is not None:
            slot.writes.append(record.arrival)
        if self.nvme is None:
            self._counters.activation_read_bytes += record.padded
        else:
            record.slot = None
            self.staging.release(slot)

    def _look_ahead(self, record: Record) -> None:
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

    # ------------------------------------------------------------------ the end

    def end_of_backward(self) -> None:
        """Take back what backward is done with; the next one starts to look ahead from its own end.

        Raises:
            OSError: Something could not be written.
        """
        with self._lock:
            self._cursor = NOWHERE
            self.settle()

    def after_exception(self) -> None:
        """Wait for what is under way, whatever becomes of it, and take back what nobody wants."""
        with self._lock:
            while self._filling:
                with contextlib.suppress(OSError):
                    self._land(self._filling.popleft())
            while self._ahead:
                self._drop(next(iter(self._ahead)))
            self._cursor = NOWHERE
            self.drain()

    def close(self) -> None:
        """Give everything back. What is still away is lost."""
        with self._lock:
            if self._closed:
                return
            self.after_exception()
            self._closed = True
            if self.nvme is not None:
                self.nvme.close()
