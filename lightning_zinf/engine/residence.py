"""Where the weight plane of a buffer rests, and how it gets to where compute reads it.

Two classes, one for each kind of machine:

- ``AliasedWeights``: the accelerator is the CPU, so a slot is host memory: NVMe reads land in it, updates act on it.
- ``DeviceWeights``: the accelerator has memory of its own. Updates act on a host copy (for good in host memory, or
  staged from NVMe), which then goes up; without any offload they act on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_zinf.memory.nvme import Extent
from lightning_zinf.memory.slots import Slot, Ticket
from lightning_zinf.monitor.counters import Counters

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer


class AliasedWeights:
    """Weights of a CPU accelerator.

    Args:
        buffer: Whose weights.
        slot: The slot that is theirs for good, or None if they are paged.
        extent: Where they rest on NVMe if they are paged.
    """

    def __init__(self, buffer: FlatBuffer, slot: Slot | None, extent: Extent | None) -> None:
        assert (slot is None) != (extent is None)
        self.persistent = slot is not None
        self.mirrored = False
        self.slot = slot
        self.extent = extent
        self._buffer = buffer
        self._context = buffer.context
        self._tickets: list[Ticket] = []

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that are taken for good."""
        return self._buffer.weight_bytes if self.persistent else 0

    def flat(self) -> Tensor:
        """Return the weight plane that compute reads."""
        assert self.slot is not None, self._buffer
        return self.slot.flat(self._buffer.layout.padded_numel, self._buffer.compute_dtype)

    def start(self, *, force: bool, pending: bool) -> bool:
        """Start to bring the weights; return False if there is no slot for them now and ``force`` is not set."""
        if self.slot is not None:
            return True
        got = self._context.ring.acquire(self._buffer.weight_bytes, self._buffer, force=force)
        if got is None:
            return False
        self.slot, hit = got
        if hit:
            self._context.counters.reused_bytes += self._buffer.weight_bytes
        else:
            assert self.extent is not None
            self._tickets.append(self._context.nvme.read(self.extent, self.flat()))
        return True

    def claim(self) -> None:
        """Take a slot whose content does not matter, to be filled from the outside."""
        if self.slot is None:
            got = self._context.ring.acquire(self._buffer.weight_bytes, self._buffer, force=True)
            assert got is not None
            self.slot = got[0]

    def arrive(self) -> None:
        """Wait until updates can act on the weights."""
        _wait_all(self._tickets, self._context.counters)

    def host(self) -> Tensor:
        """Return the weight plane that updates act on."""
        return self.flat()

    def publish(self, *, updated: bool) -> None:
        """Let compute see the weights, and take changes home."""
        if updated:
            self.store()

    def store(self) -> None:
        """Write the weights home."""
        if self.extent is not None:
            assert self.slot is not None
            self.slot.wait_writes(self._context.counters)
            self.slot.writes.append(self._context.nvme.write(self.extent, self.flat()))

    def leave(self) -> None:
        """Give the slot back, unless it is theirs for good."""
        if self.slot is not None and not self.persistent:
            if self._tickets:
                _settle(self._tickets, self.slot)
            self._context.ring.release(self.slot)
            self.slot = None


class DeviceWeights:
    """Weights of an accelerator with memory of its own.

    Args:
        buffer: Whose weights.
        slot: The slot that is theirs for good, or None if they are paged.
        host_plane: Their copy in host memory, or None.
        extent: Where they rest on NVMe, or None.
    """

    def __init__(self, buffer: FlatBuffer, slot: Slot | None, host_plane: Tensor | None, extent: Extent | None) -> None:
        assert slot is not None or (host_plane is None) != (extent is None)
        self.persistent = slot is not None
        self.mirrored = self.persistent and host_plane is not None
        self.slot = slot
        self.extent = extent
        self._host_plane = host_plane
        self._staged: Slot | None = None
        self._buffer = buffer
        self._context = buffer.context
        self._tickets: list[Ticket] = []
        self._stale = False

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that are taken for good."""
        return 0 if self._host_plane is None else self._host_plane.nbytes

    def flat(self) -> Tensor:
        """Return the weight plane that compute reads."""
        assert self.slot is not None, self._buffer
        return self.slot.flat(self._buffer.layout.padded_numel, self._buffer.compute_dtype)

    def start(self, *, force: bool, pending: bool) -> bool:
        """Start to bring the weights; return False if there is no slot for them now and ``force`` is not set."""
        if self.slot is None:
            got = self._context.ring.acquire(self._buffer.weight_bytes, self._buffer, force=force)
            if got is None:
                return False
            self.slot, hit = got
            self._stale = not hit
            if hit and not pending:
                self._context.counters.reused_bytes += self._buffer.weight_bytes
        if (self._stale or pending) and not self._stage(read=True, force=force):
            self.leave()
            return False
        return True

    def claim(self) -> None:
        """Take a slot whose content does not matter, to be filled from the outside."""
        if self.slot is None:
            got = self._context.ring.acquire(self._buffer.weight_bytes, self._buffer, force=True)
            assert got is not None
            self.slot = got[0]
            self._stale = False

    def arrive(self) -> None:
        """Wait until updates can act on the weights."""
        if self._buffer.pending:
            self._stage(read=True)
        _wait_all(self._tickets, self._context.counters)

    def host(self) -> Tensor:
        """Return the weight plane that updates act on."""
        if self._host_plane is not None:
            return self._host_plane
        if self._staged is not None:
            return self._staged.flat(self._buffer.layout.padded_numel, self._buffer.compute_dtype)
        return self.flat()

    def publish(self, *, updated: bool) -> None:
        """Let compute see the weights, and take changes home."""
        assert self.slot is not None
        host = self.host()
        if (updated or self._stale) and host.data_ptr() != self.flat().data_ptr():
            self._context.upload(host, self.slot, self.flat())
            self._stale = False
        if updated:
            self._write_home()
        self._unstage()

    def store(self) -> None:
        """Write the weights home."""
        if self._host_plane is None and self.extent is None:
            return
        self._stage(read=False)
        ticket = self._context.download(self.flat(), self.host())
        if ticket is not None:
            ticket.wait()
        self._write_home()
        self._unstage()

    def leave(self) -> None:
        """Give the slot back, unless it is theirs for good."""
        if self.slot is not None and not self.persistent:
            if self._tickets and self._staged is not None:
                _settle(self._tickets, self._staged)
            self._unstage()
            if self._stale:
                self._context.ring.forget(self.slot)
            self._context.mark_used(self.slot)
            self._context.ring.release(self.slot)
            self.slot = None

    def _stage(self, *, read: bool, force: bool = True) -> bool:
        """Have the weights in host memory; return False if there is no room for them now and ``force`` is not set."""
        if self._host_plane is not None or self.extent is None or self._staged is not None:
            return True
        got = self._context.staging.acquire(self._buffer.weight_bytes, self._buffer, force=force)
        if got is None:
            return False
        self._staged, hit = got
        if read and hit:
            self._context.counters.reused_bytes += self._buffer.weight_bytes
        elif read:
            self._tickets.append(self._context.nvme.read(self.extent, self.host()))
        return True

    def _unstage(self) -> None:
        if self._staged is not None:
            # The copy to the device reads it too: the slot's own list of things under way has both.
            assert self.slot is not None
            self._staged.writes.extend(t for t in self.slot.writes if t not in self._staged.writes)
            self._context.staging.release(self._staged)
            self._staged = None

    def _write_home(self) -> None:
        if self.extent is not None and self._staged is not None:
            self._staged.wait_writes(self._context.counters)
            self._staged.writes.append(self._context.nvme.write(self.extent, self.host()))


Weights = AliasedWeights | DeviceWeights


def _wait_all(tickets: list[Ticket], counters: Counters) -> None:
    if tickets:
        with counters.timed("stall_read_seconds"):
            while tickets:
                tickets[-1].wait()  # stays in the list if it raises, so that nobody takes the content for good
                tickets.pop()


def _settle(tickets: list[Ticket], slot: Slot) -> None:
    """Let reads that are still under way, or that failed, end before their memory is given back."""
    for ticket in tickets:
        try:
            ticket.wait()
        except OSError:
            slot.holder = None  # what came is not the content
    tickets.clear()
