"""Where the weight plane of a buffer rests, and how it gets to where compute reads it.

Note [Home, part, whole]
~~~~~~~~~~~~~~~~~~~~~~~~
A slot holds the whole buffer, as compute reads it. Of that each rank owns one part, its shard; with one rank the part
is the whole. The shard rests at home: in a slot that stays in place, in memory of its own, or on NVMe. Updates act on
the shard, at home or in the slot's part where the read from NVMe lands. ``gather`` then fills the slot from the shards
of all ranks, in place; from there to the next update the weights are ``whole``.

Two classes, one for each kind of machine:

- ``AliasedWeights``: the accelerator is the CPU, so a slot is host memory: NVMe reads land in it, updates act on it.
- ``DeviceWeights``: the accelerator has memory of its own. Updates act on a host copy of the shard (for good in host
  memory, or staged from NVMe), which then goes up; without any offload they act on the device.

A write home that failed is remembered until a later one succeeds. What a slot still has is right and may be used; but
what is on NVMe is older than the weights are, so every read of it fails with what the write failed with, also when
whoever was told first has gone on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_zinf.memory.nvme import Extent, OutOfDate
from lightning_zinf.memory.pieces import Piece, cut_extent, cut_memory
from lightning_zinf.memory.slots import Slot, Ticket, failed
from lightning_zinf.monitor.counters import Counters

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer


class _Weights:
    """What both kinds have in common: a slot, and its part that is this rank's.

    Args:
        buffer: Whose weights.
        slot: The slot that is theirs for good, or None if they are paged.
        extent: Where the shard rests on NVMe, or None.
        home: Memory of its own where the shard rests, on the device, or None.
    """

    mirrored = False

    def __init__(self, buffer: FlatBuffer, slot: Slot | None, extent: Extent | None, home: Tensor | None) -> None:
        self.persistent = slot is not None
        self.slot = slot
        self.extent = extent
        self.whole = True
        self._home = home
        self._buffer = buffer
        self._context = buffer.context
        self._tickets: list[Ticket] = []
        self._written: Ticket | None = None
        self._gathering: Any = None

    def flat(self) -> Tensor:
        """Return the weight plane that compute reads."""
        assert self.slot is not None, self._buffer
        return self.slot.flat(self._buffer.layout.padded_numel, self._buffer.compute_dtype)

    def part(self) -> Tensor:
        """Return this rank's shard of :meth:`flat`."""
        start, stop = self._buffer.shard_range
        return self.flat()[start:stop]

    def resting(self) -> Tensor | None:
        """Return the shard where it rests in memory, or None if it rests on NVMe."""
        raise NotImplementedError

    def pieces(self) -> Iterable[Piece]:
        """Return where this rank's shard lies; updates must have been applied."""
        self.finish()
        resting = self.resting()
        if resting is not None:
            return cut_memory("weight", resting)
        assert self.extent is not None, self._buffer
        return cut_extent("weight", self.extent, self._buffer.shard_numel, self._buffer.compute_dtype)

    def under_way(self) -> list[Ticket]:
        """Return the writes that whoever reads pieces has to wait for."""
        return [] if self._written is None else [self._written]

    def gather(self) -> None:
        """Start to fill the slot from the shards of all ranks, which must all do so."""
        assert self._context.comm is not None
        self.finish()
        source = self.part() if self._home is None else self._home
        self._gathering = self._context.comm.all_gather(self.flat(), source, f"{self._buffer.name}/weight")

    def finish(self) -> None:
        """Wait until the slot is filled."""
        if self._gathering is not None:
            with self._context.counters.timed("stall_gather_seconds"):
                self._gathering.wait()
            self._gathering = None
            self.whole = True

    @property
    def at_home(self) -> bool:
        """Whether updates act on memory where the shard rests for good, which is no slot's."""
        return self._home is not None

    @property
    def at_hand(self) -> bool:
        """Whether a slot has the shard, or had it and was not taken for anything else."""
        return self.slot is not None or self._context.ring.find(self._buffer) is not None

    @property
    def collected(self) -> bool:
        """Whether the slot is filled, or will be without another call."""
        return self.slot is not None and (self.whole or self._gathering is not None)

    def would_wait(self, *, pending: bool) -> bool:
        """Whether :meth:`start` would wait for slots whose content is being written."""
        return self.slot is None and self._context.ring.would_wait(self._buffer.weight_bytes, self._buffer)

    def drop(self) -> None:
        """Let go the memory that the shard rests in; there are no weights any more."""
        self._home = None

    def claim(self) -> None:
        """Take a slot whose content does not matter, to be filled from the outside."""
        if self.slot is None:
            got = self._context.ring.acquire(self._buffer.weight_bytes, self._buffer, force=True)
            assert got is not None
            self.slot = got[0]
        self.whole = True

    def _read_home(self, part: Tensor) -> None:
        """Start to read the shard from NVMe, if it is there."""
        assert self.extent is not None, self._buffer
        written = self._written
        if written is not None and failed(written):  # it is done as a rule, or the slot would still have the content
            self._tickets.append(OutOfDate(written, self._buffer.name))
        else:
            self._tickets.append(self._context.nvme.read(self.extent, part))

    def _acquire(self, *, force: bool) -> bool | None:
        """Take a slot; return whether it still has the content, or None if none is free and ``force`` is not set."""
        got = self._context.ring.acquire(self._buffer.weight_bytes, self._buffer, force=force)
        if got is None:
            return None
        self.slot, hit = got
        if hit:  # compute may use it from here on without a copy, which the event says nothing of
            self.slot.event = None
        self.whole = self._context.comm is None or (hit and self.whole)
        return hit


class AliasedWeights(_Weights):
    """Weights of a CPU accelerator."""

    def __init__(
        self, buffer: FlatBuffer, slot: Slot | None, extent: Extent | None, home: Tensor | None = None
    ) -> None:
        assert sum(place is not None for place in (slot, extent, home)) == 1
        super().__init__(buffer, slot, extent, home)

    def resting(self) -> Tensor | None:
        """Return the shard where it rests in memory, or None if it rests on NVMe."""
        return None if self.extent is not None else self.host()

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that are taken for good."""
        return self._buffer.weight_bytes if self.persistent else 0 if self._home is None else self._home.nbytes

    def start(self, *, force: bool, pending: bool) -> bool:
        """Start to bring the shard; return False if there is no slot for it now and ``force`` is not set."""
        if self.slot is not None:
            return True
        hit = self._acquire(force=force)
        if hit is None:
            return False
        if hit and (self._context.comm is None or (self.whole and not pending)):
            self._context.counters.reused_bytes += self._buffer.weight_bytes
        if not hit and self.extent is not None:
            self._read_home(self.part())
        return True

    def arrive(self) -> None:
        """Wait until updates can act on the shard."""
        _wait_all(self._tickets, self._context.counters)

    def host(self) -> Tensor:
        """Return the shard that updates act on."""
        return self.part() if self._home is None else self._home

    def publish(self, *, updated: bool) -> None:
        """Let compute see the shard, and take changes home."""
        if updated:
            self.whole = self._context.comm is None
            self._write_home()

    def store(self) -> None:
        """Write this rank's part of the slot home."""
        if self._home is not None:
            self._home.copy_(self.part())
        self._write_home()

    def _write_home(self) -> None:
        if self.extent is not None:
            assert self.slot is not None
            self.slot.wait_writes(self._context.counters)
            self._written = self._context.nvme.write(self.extent, self.part())
            self.slot.writes.append(self._written)

    def leave(self) -> None:
        """Give the slot back, unless it is theirs for good."""
        if self.slot is not None and not self.persistent:
            self.finish()
            if self._tickets:
                _settle(self._tickets, self.slot)
            self._context.ring.release(self.slot)
            self.slot = None


class DeviceWeights(_Weights):
    """Weights of an accelerator with memory of its own.

    Args:
        buffer: Whose weights.
        slot: The slot that is theirs for good, or None if they are paged.
        host_plane: A copy of the shard in host memory, or None.
        extent: Where the shard rests on NVMe, or None.
        home: Memory on the device where the shard rests, or None.
    """

    def __init__(
        self,
        buffer: FlatBuffer,
        slot: Slot | None,
        host_plane: Tensor | None,
        extent: Extent | None,
        home: Tensor | None = None,
    ) -> None:
        assert slot is not None or home is not None or (host_plane is None) != (extent is None)
        super().__init__(buffer, slot, extent, home)
        self.mirrored = self.persistent and host_plane is not None
        self._host_plane = host_plane
        self._staged: Slot | None = None
        self._stale = False
        self._sent: Ticket | None = None  # the copy to the device that may still be reading the host's memory

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that are taken for good."""
        return 0 if self._host_plane is None else self._host_plane.nbytes

    def resting(self) -> Tensor | None:
        """Return the shard where it rests in memory, or None if it rests on NVMe."""
        if self._host_plane is not None:
            return self._host_plane
        return None if self.extent is not None else self._target()

    def _target(self) -> Tensor:
        """Return where the shard is on the device."""
        return self.part() if self._home is None else self._home

    def start(self, *, force: bool, pending: bool) -> bool:
        """Start to bring the shard; return False if there is no slot for it now and ``force`` is not set."""
        if self.slot is None:
            hit = self._acquire(force=force)
            if hit is None:
                return False
            self._stale = self._home is None and not hit
            if hit and not pending and self.whole:
                self._context.counters.reused_bytes += self._buffer.weight_bytes
        if (self._stale or pending) and not self._stage(read=True, force=force):
            self.leave()
            return False
        return True

    def would_wait(self, *, pending: bool) -> bool:
        """Whether :meth:`start` would wait for slots whose content is being written."""
        if super().would_wait(pending=pending):
            return True
        if self._host_plane is not None or self.extent is None or self._staged is not None:
            return False
        here = self.slot is not None or self._context.ring.find(self._buffer) is not None
        if here and not pending and not (self.slot is not None and self._stale):
            return False
        return self._context.staging.would_wait(self._buffer.shard_bytes, self._buffer)

    def claim(self) -> None:
        """Take a slot whose content does not matter, to be filled from the outside."""
        self._stale = self._stale and self.slot is not None
        super().claim()

    def arrive(self) -> None:
        """Wait until updates can act on the shard."""
        if self._buffer.pending:
            self._stage(read=True)
            if self._sent is not None:  # the update is about to change what it reads
                self._sent.wait()
                self._sent = None
        _wait_all(self._tickets, self._context.counters)

    def host(self) -> Tensor:
        """Return the shard that updates act on."""
        if self._host_plane is not None:
            return self._host_plane
        if self._staged is not None:
            return self._staged.flat(self._buffer.shard_numel, self._buffer.compute_dtype)
        return self._target()

    def publish(self, *, updated: bool) -> None:
        """Let compute see the shard, and take changes home."""
        assert self.slot is not None or self._home is not None
        host = self.host()
        if (updated or self._stale) and host.data_ptr() != self._target().data_ptr():
            assert self.slot is not None
            self._sent = self._context.upload(host, self.slot, self._target(), self._buffer.name)
            self._stale = False
        if updated:
            self.whole = self._context.comm is None
            self._write_home()
        self._unstage()

    def store(self) -> None:
        """Write this rank's part of the slot home."""
        if self._home is not None:
            self._home.copy_(self.part())
        if self._host_plane is None and self.extent is None:
            return
        self._stage(read=False)
        ticket = self._context.download(self.part(), self.host(), f"{self._buffer.name}/weight")
        if ticket is not None:
            ticket.wait()
            self._context.drop_left()  # what is kept there is the slot, which nobody else is to seem to see
        self._write_home()
        self._unstage()

    def leave(self) -> None:
        """Give the slot back, unless it is theirs for good."""
        if self.slot is not None and not self.persistent:
            self.finish()
            if self._tickets and self._staged is not None:
                _settle(self._tickets, self._staged)
            self._unstage()
            if self._stale:
                self._context.ring.forget(self.slot)
            self._context.mark_used(self.slot)
            self._context.ring.release(self.slot)
            self.slot = None

    def _stage(self, *, read: bool, force: bool = True) -> bool:
        """Have the shard in host memory; return False if there is no room for it now and ``force`` is not set."""
        if self._host_plane is not None or self.extent is None or self._staged is not None:
            return True
        got = self._context.staging.acquire(self._buffer.shard_bytes, self._buffer, force=force)
        if got is None:
            return False
        self._staged, hit = got
        if read and hit:
            self._context.counters.reused_bytes += self._buffer.shard_bytes
        elif read:
            self._read_home(self.host())
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
            self._written = self._context.nvme.write(self.extent, self.host())
            self._staged.writes.append(self._written)


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
