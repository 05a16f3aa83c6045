"""What all buffers were at one moment, for threads that read it while training goes on.

Note [Snapshots]
~~~~~~~~~~~~~~~~
A snapshot is the state after the updates that have been captured when it is taken, also those that are still pending.
Nothing is flushed for it: a buffer is *ready* once its updates up to that moment have been applied, which the training
thread does anyway when it next needs the weights. Readers take pieces of ready buffers, in any order.

Before the training thread changes a buffer further it lets go of it (``Held``): the pieces in memory that nobody has
begun to read are copied, as far as a budget goes, and for the others it waits. Readers take the pieces of a buffer that
somebody waits for first. A reader never waits for something that only the training thread can do, except that a buffer
becomes ready; and who waits for a buffer has made it ready before. So there is no deadlock, whatever the order.

Weights that lie in place as plain parameters may be changed by code that we do not see, through ``p.data``, NumPy or an
extension: nothing short of the processor's page protection would tell before it is too late. So they are copied, or
read, at once when the buffer becomes ready, unless nothing goes on until all is read. No reader disturbs these copies,
and their memory is kept for the next snapshot (``leftover``): to write to pages for the first time takes several times
as long as the copy itself.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lightning_zinf.memory.pieces import Piece
from lightning_zinf.memory.slots import Ticket
from lightning_zinf.ops import copy_all, host_empty

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer

_COPIED_AT_ONCE = 64 * 2**20
"""Bytes after which somebody who copies looks again whether readers have got on meanwhile."""


class Saving(Protocol):
    """A checkpoint that is being saved in the background, as the engine sees it."""

    def poll(self, place: str) -> None:
        """Meet all ranks at ``place``, and do what can be done once they are done writing.

        Raises:
            OSError: On all ranks, if the checkpoint cannot be saved.
        """

    def settle(self) -> None:
        """Apply the pending updates that belong to it."""

    def wait(self) -> None:
        """Wait until it is complete, on all ranks.

        Raises:
            OSError: On all ranks, if the checkpoint cannot be saved.
        """

    def abandon(self) -> None:
        """Give it up, on this rank alone: others may not come any more."""

    def defer(self, removal: Callable[[], None]) -> bool:
        """Do something once it is complete, and never if it cannot be saved; False if it is complete."""


@dataclass(eq=False)
class Work:
    """A piece that is to be read.

    Attributes:
        held: Its buffer.
        piece: Where it lies.
        at: Where its first byte goes: what the snapshot was told of the plane, and the piece's place in it.
        copy: A copy in host memory, which is read instead.
        copying: The training thread is making one.
    """

    held: Held
    piece: Piece
    at: int
    copy: Tensor | None = None
    copying: bool = False


class Held:
    """One buffer of a snapshot, as the training thread sees it.

    Args:
        snapshot: The snapshot.
        buffer: The buffer.
        places: First byte of each plane that is wanted, wherever that is.
    """

    def __init__(self, snapshot: Snapshot, buffer: FlatBuffer, places: Mapping[str, int]) -> None:
        self.buffer = buffer
        self.places = places
        self.due = len(buffer.pending)
        self.ready = False
        self.open: deque[Work] = deque()
        self.busy = 0
        self.tickets: list[Ticket] = []
        self._snapshot = snapshot

    def before_update(self) -> None:
        """The next pending update is about to be applied."""
        if self.due:
            return
        if not self.ready:
            weights = self.buffer.weights
            weights.publish(updated=True)
            weights.arrive()
            self.settled()
        self.before_change()

    def updated(self) -> None:
        """A pending update has been applied."""
        self.due = max(0, self.due - 1)

    def settled(self) -> None:
        """Updates that have been applied are where the planes rest, or on their way there."""
        if not self.due and not self.ready:
            self._snapshot.make_ready(self)

    def before_change(self, plane: str | None = None) -> None:
        """A plane, or all of them, is about to change."""
        if not self._snapshot.over:
            assert self.ready, self.buffer
            self._snapshot.let_go(self, plane)
        if plane is None or self._snapshot.over:
            self.buffer.held = None

    def before_move(self) -> None:
        """The planes are about to lie elsewhere, as they are."""
        if self.ready:  # else it is only then that anybody learns where they lie
            self._snapshot.let_go(self)


class Snapshot:
    """The state of buffers at one moment; see Note [Snapshots].

    Args:
        buffers: Each with the first byte of every plane that is wanted of it, wherever that is.
        copy_bytes: Host memory for copies.
        in_order: Hand pieces out in the order of their places; no updates must be pending then.
        at_rest: Nothing changes until all of it has been read: who takes the snapshot waits for that.
        spare: Host memory that may be used for copies, and counts as such.
    """

    def __init__(
        self,
        buffers: Sequence[tuple[FlatBuffer, Mapping[str, int]]],
        copy_bytes: int,
        *,
        in_order: bool,
        at_rest: bool = False,
        spare: Sequence[Tensor] = (),
    ) -> None:
        self.over = False
        self._at_rest = at_rest
        self._begun = False
        self._changed = threading.Condition()
        self._room = copy_bytes
        self._copying = 0
        self._in_order = in_order
        self._ready: list[Held] = []
        self._queue: deque[Work] = deque()  # in order: everything; else copies
        self._urgent: Held | None = None
        self._spare = sorted(spare, key=Tensor.numel)
        self.held = [Held(self, buffer, places) for buffer, places in buffers]
        self._changes = [held.buffer.changes for held in self.held]
        self._not_ready = len(self.held)
        self._at_once = sum(b.shard_bytes for b, places in buffers if b.unseen and "weight" in places)
        for held in self.held:
            held.buffer.held = held

    def begin(self) -> None:
        """Make ready what is; readers must have been started, for there may be more to copy than there is room for."""
        try:
            for held in self.held:
                held.settled()
                assert held.ready or not self._in_order, held.buffer
        finally:
            with self._changed:
                self._begun = True
                self._changed.notify_all()

    # ------------------------------------------------------------------ the training thread

    def make_ready(self, held: Held) -> None:
        """Let readers have a buffer."""
        buffer = held.buffer
        works: list[Work] = []
        for plane, place in held.places.items():
            assert plane == "weight" or buffer.state is not None, buffer
            source = buffer.weights.pieces() if plane == "weight" else buffer.state.pieces(plane)  # type: ignore[union-attr]
            works.extend(Work(held, p, place + p.start * p.dtype.itemsize) for p in source)
        held.tickets = buffer.weights.under_way() + ([] if buffer.state is None else buffer.state.under_way())
        with self._changed:
            held.ready = True
            held.open.extend(works)
            if self._in_order:
                self._queue.extend(works)
                self._changed.notify_all()
        try:
            if buffer.unseen and not self._at_rest:
                self.let_go(held, "weight")
        except BaseException:
            self.stop()  # what has not been copied may change from now on
            raise
        finally:
            with self._changed:  # only now, so that there is no reader to wait for while there is room for copies
                self._not_ready -= 1
                self._ready.append(held)
                self._changed.notify_all()

    def let_go(self, held: Held, plane: str | None = None) -> None:
        """Return when no reader needs a plane of a buffer any more, or any of its planes."""
        while works := self._claim(held, plane):
            copies: list[Tensor | None] = [None] * len(works)
            try:
                copies[:] = self._copied([work.piece for work in works])
            except MemoryError:
                with self._changed:
                    self._room = 0  # less is free than when the budget was made: wait instead
            finally:
                with self._changed:
                    self._copying -= len(works)
                    for work, memory in zip(works, copies, strict=True):
                        work.copy, work.copying = memory, False
                        if memory is None:
                            held.open.append(work)
                        elif not self._in_order:
                            self._queue.append(work)
                    self._changed.notify_all()

    def _claim(self, held: Held, plane: str | None) -> list[Work]:
        """Return pieces to be copied at once, waiting for room or readers; none if nothing is left."""
        with self._changed:
            try:
                while not self.over:
                    # Readers begin at the other end.
                    wanted = [w for w in reversed(held.open) if plane in (None, w.piece.plane)]
                    if not wanted and not held.busy:
                        return []
                    works, nbytes = [], 0
                    for work in wanted:
                        if work.piece.memory is not None and nbytes < _COPIED_AT_ONCE:
                            if nbytes + work.piece.nbytes > self._room:
                                break
                            works.append(work)
                            nbytes += work.piece.nbytes
                    if works:
                        self._room -= nbytes
                        self._copying += len(works)
                        for work in works:
                            held.open.remove(work)
                            work.copying = True
                        return works
                    self._urgent = held
                    self._changed.notify_all()
                    self._changed.wait()
                return []
            finally:
                self._urgent = None

    def _copied(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Return copies of pieces, in host memory.

        Raises:
            MemoryError: If there is not that much; none has been made then.
        """
        copies = [self._memory(piece.nbytes) for piece in pieces]
        pairs: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for piece, copy in zip(pieces, copies, strict=True):
                assert piece.memory is not None
                to = copy[: piece.nbytes].view(piece.dtype)
                if piece.memory.is_cpu:
                    pairs.append((to, piece.memory))
                else:
                    to.copy_(piece.memory)
            copy_all(pairs)
        return copies

    def _memory(self, nbytes: int) -> Tensor:
        with self._changed:
            smallest = bisect_left(self._spare, nbytes, key=Tensor.numel)
            if smallest < len(self._spare):
                return self._spare.pop(smallest)
            self._spare.clear()  # all too small; within the budget the new one takes their place
        return host_empty(nbytes)

    @property
    def current(self) -> bool:
        """Whether another snapshot would be the same, as far as we can see."""
        return not any(h.buffer.unseen or h.buffer.changes != n for h, n in zip(self.held, self._changes, strict=True))

    def due(self) -> list[FlatBuffer]:
        """Return the buffers with updates that have to be applied before they are ready."""
        return [] if self.over else [held.buffer for held in self.held if held.due]

    # ------------------------------------------------------------------ readers

    def take(self) -> Work | None:
        """Return a piece to be read, once there is one; None if no more will come."""
        with self._changed:
            while not self.over:
                # Training waits while copies are made at the beginning: it has the cores and the memory to itself then.
                work = self._next() if self._begun or self._urgent is not None else None
                if work is not None:
                    work.held.busy += work.copy is None
                    return work
                if self._begun and not (
                    self._not_ready or self._copying or self._queue or any(h.open for h in self._ready)
                ):
                    return None
                self._changed.wait()
            return None

    def _next(self) -> Work | None:
        if self._in_order:
            if not self._queue or self._queue[0].copying:
                return None
            work = self._queue.popleft()
            if work.copy is None:
                work.held.open.remove(work)
            return work
        if self._urgent is not None and self._urgent.open:
            return self._urgent.open.popleft()
        if self._queue:
            return self._queue.popleft()
        left = [held for held in self._ready if held.open]
        if not left:
            return None
        # What is in memory will be changed first to last, all of it by the next step; what is on NVMe one after the
        # other, as it has become ready.
        return (left[0] if left[0].open[0].piece.memory is None else left[-1]).open.popleft()

    def done_with_source(self, work: Work) -> None:
        """The planes themselves are not needed for a piece any more."""
        with self._changed:
            if work.copy is None:
                work.held.busy -= 1
            else:
                self._room += work.piece.nbytes
                insort(self._spare, work.copy, key=Tensor.numel)
                work.copy = None
            self._changed.notify_all()

    def stop(self) -> None:
        """Let go of everything: nothing more will be read."""
        with self._changed:
            self.over = True
            self._queue.clear()
            self._ready.clear()
            for held in self.held:
                held.open.clear()
            self._changed.notify_all()

    def leftover(self) -> list[Tensor]:
        """Return memory of copies for another snapshot to use: no more than it will need at its beginning."""
        with self._changed:
            spare, self._spare = self._spare, []
        kept, room = [], self._at_once
        for memory in reversed(spare):
            if memory.numel() <= room:
                room -= memory.numel()
                kept.append(memory)
        return kept
