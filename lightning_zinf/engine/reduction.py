"""Gradients over several ranks: from each rank's own to the shard of everybody's mean.

Note [When gradients are reduced]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Stages 2 and 3 reduce in every backward: when the gradients of a unit are complete they go out at once, in an order that
all ranks have agreed on, as DDP does with its buckets. At the end of the backward the ranks tell each other which
parameters got a gradient on any of them; what has not gone out by then goes out now, with zeros where a rank has none;
what no rank touched stays without a gradient. Sums over several backwards are kept as shards, in float32.

Stage 1 keeps whole gradients on each rank, adds them up over backwards in float32, and does all of that once, when the
optimizer steps.

The order is that in which units complete on rank 0 in the first backward.

Nothing here waits for other ranks in the midst of a backward, unless the last one went alike on all of them: a rank
could be waiting for this one to serve it weights (see ``comm/rounds.py``).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_zinf.comm.group import Collectives, Reduction
from lightning_zinf.comm.rounds import Rounds
from lightning_zinf.engine.gradients import Piece, refuse_sparse
from lightning_zinf.engine.guard import KeptGradient, guard, plainly

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer
    from lightning_zinf.engine.context import EngineContext
    from lightning_zinf.engine.units import Unit

PATIENCE_SECONDS = 0.25
"""How long a backward waits for gradients under way before it goes over its budget."""


class ShardedGradients:
    """Gradients of one buffer on one of several ranks.

    Args:
        buffer: Whose gradients.
    """

    def __init__(self, buffer: FlatBuffer) -> None:
        self._buffer = buffer
        self._sums: dict[int, Tensor] = {}
        self._shard: Tensor | None = None
        self._have: set[int] = set()
        self._hidden: dict[int, Tensor] = {}
        self._guarded: set[int] = set()
        self._under_way: list[tuple[Reduction, set[int]]] = []

    # ------------------------------------------------------------------ this rank's own

    def take(self, index: int) -> None:
        """Leave the gradient of parameter ``index`` where it is, until the whole buffer goes out."""

    @plainly
    def hide(self) -> None:
        """Put a guard in the place of every gradient that there is, until the next backward."""
        for index, param in enumerate(self._buffer.params):
            grad = param.grad
            if isinstance(grad, KeptGradient):
                continue
            if grad is not None:
                self._hidden[index] = grad
            if grad is not None or index in self._have or index in self._sums:
                param.grad = guard(param)
                self._guarded.add(index)

    @plainly
    def show(self) -> None:
        """Take the guards away again."""
        self._forget_what_the_user_dropped()
        for index in self._guarded:
            param = self._buffer.params[index]
            param.grad = None  # first: the dtype may be another by now
            if index in self._hidden:
                param.grad = self._hidden.pop(index)
        self._guarded.clear()

    def _forget_what_the_user_dropped(self) -> None:
        """A guard that is gone means that ``module.zero_grad()`` or ``p.grad = None`` was meant for the gradient."""
        dropped = {i for i in self._guarded if not isinstance(self._buffer.params[i].grad, KeptGradient)}
        if dropped:
            self._guarded -= dropped
            for index in dropped:
                self._sums.pop(index, None)
                self._hidden.pop(index, None)
            self._forget(dropped, zero=True)

    @plainly
    def before_backward(self) -> None:
        """Stage 1: move what the last backward left to float32 sums."""
        self.show()
        if self._buffer.context.stage > 1 or self._buffer.compute_dtype == torch.float32:
            return
        for index, param in enumerate(self._buffer.params):
            if (grad := param.grad) is not None:
                if index in self._sums:
                    self._sums[index] += grad
                else:
                    self._sums[index] = grad.to(torch.float32, copy=True)
                param.grad = None

    @plainly
    def own(self) -> list[int]:
        """Return the parameters that have a gradient of this rank that has not gone out."""
        found = {i for i, p in enumerate(self._buffer.params) if p.grad is not None}
        return sorted(found | set(self._sums))

    @property
    def summed(self) -> bool:
        """Whether gradients of this rank have been added up in float32."""
        return bool(self._sums)

    # ------------------------------------------------------------------ everybody's

    def launch(self, comm: Collectives, have: Collection[int], wide: bool) -> int:
        """Send this rank's gradients out; return the bytes under way.

        Args:
            comm: The collectives.
            have: The parameters that have a gradient on any rank, as far as that is known.
            wide: Send float32, whatever the gradients are.
        """
        buffer = self._buffer
        dtype = torch.float32 if wide else buffer.compute_dtype
        whole = torch.zeros(buffer.layout.padded_numel, dtype=dtype, device=buffer.device)
        views = buffer.views_of(whole)
        for index in self.own():
            param = buffer.params[index]
            if (grad := param.grad) is not None:
                refuse_sparse(grad, buffer.names[index])
                views[index].copy_(grad)
                if index in self._sums:
                    views[index].add_(self._sums.pop(index))
                param.grad = None
            else:
                views[index].copy_(self._sums.pop(index))
        self._under_way.append((comm.reduce_scatter(whole, buffer.name), set(have)))
        return 2 * whole.nbytes

    def abandon(self) -> None:
        """Forget what is under way, which some ranks may never join."""
        self._under_way.clear()

    def arrived(self) -> bool:
        """Whether nothing is under way any more."""
        return all(r.work is None or r.work.is_completed() for r, _ in self._under_way)

    def absorb(self, have: Collection[int] = ()) -> None:
        """Wait for what is under way, and add it to the shard.

        Args:
            have: Parameters that are known by now to have a gradient on some rank.
        """
        while self._under_way:
            reduction, known = self._under_way.pop(0)
            mean = self._keep(reduction.mean())
            if self._shard is None:
                self._shard = mean
            else:
                self._shard += mean
            self._have |= known
        self._have |= set(have)

    def _keep(self, mean: Tensor) -> Tensor:
        """Move a shard to where updates run."""
        buffer = self._buffer
        if buffer.context.aliased or buffer.on_device:
            return mean
        host = buffer.context.allocate_host(mean.nbytes).view(torch.float32)
        ticket = buffer.context.download(mean, host, f"{buffer.name}/gradient")
        if ticket is not None:
            ticket.wait()
        return host

    def collect(self, indices: Collection[int], *, keep: bool) -> list[Piece]:
        """Return this rank's part of the gradients that are reduced.

        Parameters that lie in other ranks' shards come with an empty piece.
        """
        self._forget_what_the_user_dropped()
        if self._shard is None:
            return []
        wanted = [i for i in indices if i in self._have]
        parts = {
            index: (low, numel) for index, _, low, numel in self._buffer.layout.overlaps(*self._buffer.shard_range)
        }
        first = self._buffer.shard_range[0]
        pieces = []
        for index in wanted:
            low, numel = parts.get(index, (first, 0))
            pieces.append(Piece(index, low - first, self._shard[low - first : low - first + numel]))
        if not keep:
            for index in indices:
                self._buffer.params[index].grad = None
            self._guarded.difference_update(indices)
            self._forget(indices, zero=False)
        return pieces

    @plainly
    def clear(self, indices: Collection[int]) -> None:
        """Forget the gradients of these parameters."""
        for index in indices:
            self._sums.pop(index, None)
            self._hidden.pop(index, None)
            self._buffer.params[index].grad = None
        self._guarded.difference_update(indices)
        self._forget(indices, zero=True)

    def _forget(self, indices: Collection[int], *, zero: bool) -> None:
        self._have -= set(indices)
        if not self._have:
            self._shard = None
        elif zero and self._shard is not None:
            first = self._buffer.shard_range[0]
            for index, _, low, numel in self._buffer.layout.overlaps(*self._buffer.shard_range):
                if index in set(indices):
                    self._shard[low - first : low - first + numel] = 0
        elif self._shard is not None:  # somebody else's gradients stay behind: the caller's are his alone
            self._shard = self._shard.clone()
            self._forget(indices, zero=True)


class Reducer:
    """Reduces the gradients of a model's units.

    Args:
        units: The units.
        context: With the collectives.
        rounds: For agreement.
        budget: Bytes of gradients under way at which a backward waits for them, if it may.
    """

    def __init__(self, units: Sequence[Unit], context: EngineContext, rounds: Rounds, budget: int) -> None:
        assert context.comm is not None
        self._comm = context.comm
        self._context = context
        self._rounds = rounds
        self._budget = budget
        self._units = list(units)
        self._buffers = [b for u in units for b in u.buffers]
        self._order: list[int] = [u.index for u in reversed(self._units)]
        self._agreed = False
        self._alike = False
        self._completed: list[int] = []
        self._launched: set[int] = set()
        self._sent: set[int] = set()
        self._first_of: dict[int, int] = {}
        self._params = 0
        for buffer in self._buffers:
            self._first_of[id(buffer)] = self._params
            self._params += len(buffer.params)
        self._waiting: list[ShardedGradients] = []
        self._in_flight = 0
        self.dirty = False

    @property
    def early(self) -> bool:
        """Whether gradients go out during backward."""
        return self._context.stage > 1

    def complete(self, unit: Unit) -> None:
        """The gradients of ``unit`` are complete on this rank."""
        if not self.early or unit.index in self._completed:
            return
        self._completed.append(unit.index)
        if self._agreed:
            ready = set(self._completed)
            for index in self._order:
                if index in self._launched:
                    continue
                if index not in ready:
                    break
                self._launch(self._units[index])
            self._make_room()

    def _launch(self, unit: Unit) -> None:
        self._launched.add(unit.index)
        for buffer in unit.buffers:
            if own := _sharded(buffer).own():
                self._send(buffer, own, wide=False)

    def _send(self, buffer: FlatBuffer, have: Collection[int], *, wide: bool) -> None:
        gradients, first = _sharded(buffer), self._first_of[id(buffer)]
        self._sent |= {first + i for i in gradients.own()}
        with torch.no_grad():
            self._in_flight += gradients.launch(self._comm, have, wide)
        self._waiting.append(gradients)

    def _make_room(self) -> None:
        """Take in what has arrived; wait a little for the rest if that cannot be in anybody's way."""
        if self._comm.ranks.replica_group is not None:
            return  # the other copies of the model would have to take it in at the same time
        deadline = time.monotonic() + (PATIENCE_SECONDS if self._alike else 0.0)
        while self._waiting and (self._waiting[0].arrived() or self._in_flight > self._budget):
            if not self._waiting[0].arrived():
                if time.monotonic() > deadline:
                    return
                time.sleep(0.0005)
                continue
            self._absorb_first()

    def _absorb_first(self, have: Collection[int] = ()) -> None:
        gradients = self._waiting.pop(0)
        with torch.no_grad(), self._context.counters.timed("stall_gather_seconds"):
            gradients.absorb(have)
        if not self._waiting:
            self._in_flight = 0
        else:
            buffer = gradients._buffer
            self._in_flight -= 2 * buffer.layout.padded_numel * buffer.compute_dtype.itemsize

    def finish(self, place: str) -> bool:
        """Agree with all ranks on which parameters have gradients, and reduce what has not gone out yet.

        Returns:
            Whether all ranks have made the same changes to weights outside of compute.
        """
        for buffer in self._buffers:
            _sharded(buffer).show()
        first, late, wide = self._own()
        order = self._completed if self._comm.ranks.rank == 0 and self.early and not self._agreed else []
        payload = (
            struct.pack("<BI", wide, self._context.changes) + _pack(first, self._params) + _pack(late, self._params)
        )
        payload += struct.pack(f"<{len(order)}I", *order)
        answers = self._rounds.meet(place, payload)
        width = -(-self._params // 8)
        firsts = [_unpack(a[5 : 5 + width]) for a in answers]
        lates = [_unpack(a[5 + width : 5 + 2 * width]) for a in answers]
        wide = any(a[0] for a in answers)
        self._alike = all(f == firsts[0] for f in firsts) and not any(lates)
        everyone = set().union(*firsts)
        if not self._agreed and self.early:
            told = answers[0][5 + 2 * width :]
            known = struct.unpack(f"<{len(told) // 4}I", told)
            if known:
                self._order = [*known, *(i for i in self._order if i not in known)]
                self._agreed = True
        have = self._by_buffer(everyone)
        for index in self._order:
            for buffer in self._units[index].buffers:
                if index not in self._launched and have.get(id(buffer)):
                    self._send(buffer, have[id(buffer)], wide=wide and buffer.compute_dtype != torch.float32)
        self._reduce_late(set().union(*lates), wide)
        while self._waiting:
            self._absorb_first()
        for buffer in self._buffers:
            if have.get(id(buffer)):
                _sharded(buffer).absorb(have[id(buffer)])
        self.hide()
        self.reset()
        return len({a[1:5] for a in answers}) == 1

    def hide(self) -> None:
        """Let code that uses ``p.grad`` raise from here to the next backward."""
        for buffer in self._buffers:
            _sharded(buffer).hide()

    def _reduce_late(self, late: set[int], wide: bool) -> None:
        """Reduce what came for units whose gradients had gone out already (shared weights under recomputation)."""
        have = self._by_buffer(late)
        for index in self._order:
            for buffer in self._units[index].buffers:
                if have.get(id(buffer)):
                    self._send(buffer, have[id(buffer)], wide=wide and buffer.compute_dtype != torch.float32)

    def _own(self) -> tuple[set[int], set[int], bool]:
        """Return the parameters that had a gradient here, those that got one since it went out, and whether any sum."""
        first, late, wide = set(self._sent), set[int](), False
        for unit in self._units:
            for buffer in unit.buffers:
                gradients, start = _sharded(buffer), self._first_of[id(buffer)]
                wide = wide or gradients.summed
                (late if unit.index in self._launched else first).update(start + i for i in gradients.own())
        return first, late, wide

    def _by_buffer(self, params: Iterable[int]) -> dict[int, list[int]]:
        """Sort numbers of parameters by buffer, as ``id(buffer)``."""
        wanted = set(params)
        return {id(b): [i for i in range(len(b.params)) if self._first_of[id(b)] + i in wanted] for b in self._buffers}

    def reset(self) -> None:
        """Get ready for the next backward, whatever became of the last one."""
        for gradients in self._waiting:
            gradients.abandon()
        self._waiting.clear()
        self._in_flight = 0
        self._completed.clear()
        self._launched.clear()
        self._sent.clear()
        self.dirty = False


def _sharded(buffer: FlatBuffer) -> ShardedGradients:
    assert isinstance(buffer.gradients, ShardedGradients)
    return buffer.gradients


def _pack(numbers: Iterable[int], count: int) -> bytes:
    """Return a bit for each of ``count`` numbers."""
    bits = bytearray(-(-count // 8))
    for number in numbers:
        bits[number >> 3] |= 1 << (number & 7)
    return bytes(bits)


def _unpack(bits: bytes) -> set[int]:
    return {8 * i + j for i, byte in enumerate(bits) if byte for j in range(8) if byte >> j & 1}
