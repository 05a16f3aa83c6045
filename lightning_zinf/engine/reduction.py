"""Gradients over several ranks: from each rank's own to the shard of everybody's mean.

Note [When gradients are reduced]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Stages 2 and 3 reduce in every backward: when the gradients of a unit are complete they go out at once, in an order that
all ranks have agreed on, as DDP does with its buckets. At the end of the backward the ranks tell each other which
parameters got a gradient on any of them; what has not gone out by then goes out now, with zeros where a rank has none;
what no rank touched stays without a gradient. Sums over several backwards are kept as shards, in float32.

Stage 1 keeps whole gradients on each rank, adds them up over backwards in float32, and does all of that once, when the
optimizer steps.

The order is that in which units complete on rank 0 in the first backward. What has arrived is taken in in the same
order, since with copies of the model it goes out a second time then; and from there a unit may be updated in backward
(see ``early.py``).

Nothing here waits for other ranks in the midst of a backward, unless the last one went alike on all of them: a rank
could be waiting for this one to serve it weights (see ``comm/rounds.py``).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_zinf.comm.rounds import Rounds
from lightning_zinf.engine.early import EarlyUpdates
from lightning_zinf.engine.sharded import ShardedGradients

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer
    from lightning_zinf.engine.context import EngineContext
    from lightning_zinf.engine.units import Unit

PATIENCE_SECONDS = 0.25
"""How long a backward waits for gradients under way before it goes over its budget."""


_HEAD = struct.Struct("<??I")


@dataclass(frozen=True)
class _Said:
    """What a rank tells the others at the end of a backward.

    Attributes:
        wide: It has gradients that are sums in float32.
        wanted: It wants its updates in this backward.
        changes: Stands for what code outside of compute changed.
        first: Numbers of the parameters that got a gradient.
        late: Of those that got one since it went out.
        clean: Indices of the units that may be updated in backward, as far as this rank knows.
        order: On rank 0, once: the units in the order in which they were complete.
    """

    wide: bool
    wanted: bool
    changes: int
    first: set[int]
    late: set[int]
    clean: set[int]
    order: Sequence[int]


class Reducer:
    """Reduces the gradients of a model's units.

    Args:
        units: The units.
        context: With the collectives.
        rounds: For agreement.
        early: Updates units whose gradients are reduced, if it may.
        budget: Bytes of gradients under way at which a backward waits for them, if it may.
    """

    def __init__(
        self, units: Sequence[Unit], context: EngineContext, rounds: Rounds, early: EarlyUpdates, budget: int
    ) -> None:
        assert context.comm is not None
        self._comm = context.comm
        self._context = context
        self._rounds = rounds
        self._updates = early
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
        self._waiting: list[tuple[Unit, FlatBuffer, int]] = []
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
            self.poll(PATIENCE_SECONDS if self._alike else 0.0)

    def _launch(self, unit: Unit) -> None:
        self._launched.add(unit.index)
        for buffer in unit.buffers:
            if own := _sharded(buffer).own():
                self._send(unit, buffer, own, wide=False)

    def _send(self, unit: Unit, buffer: FlatBuffer, have: Collection[int], *, wide: bool) -> None:
        gradients, first = _sharded(buffer), self._first_of[id(buffer)]
        self._sent |= {first + i for i in gradients.own()}
        with torch.no_grad():
            nbytes = gradients.launch(self._comm, have, wide)
        self._in_flight += nbytes
        self._waiting.append((unit, buffer, nbytes))

    def poll(self, patience: float = 0.0) -> None:
        """Take in what has arrived in backward.

        Args:
            patience: Seconds to wait for the rest if more is under way than there is room for.
        """
        deadline = time.monotonic() + patience
        while self._waiting:
            unit, buffer, _ = self._waiting[0]
            if _sharded(buffer).arrived():
                self._absorb_first()
                if not self._waiting or self._waiting[0][0] is not unit:
                    self._updates.reduced(unit)
                    if self._context.norms_ahead:
                        for own in unit.buffers:
                            own.gradients.sum_squares()
            elif self._in_flight > self._budget and time.monotonic() <= deadline:
                time.sleep(0.0005)
            else:
                return

    def _absorb_first(self) -> None:
        _, buffer, nbytes = self._waiting.pop(0)
        with torch.no_grad(), self._context.counters.timed("stall_gather_seconds"):
            _sharded(buffer).absorb()
        self._in_flight -= nbytes

    def finish(self, place: str) -> bool:
        """Agree with all ranks on which parameters have gradients, and reduce what has not gone out yet.

        Returns:
            Whether all ranks have made the same changes to weights outside of compute.
        """
        for buffer in self._buffers:
            _sharded(buffer).show()
        first, late, wide = self._own()
        order = self._completed if self._comm.ranks.rank == 0 and self.early and not self._agreed else []
        mine = _Said(wide, self._updates.wanted, self._context.changes, first, late, self._updates.clean(), order)
        said = [self._decode(a) for a in self._rounds.meet(place, self._encode(mine))]
        wide = any(s.wide for s in said)
        self._alike = all(s.first == said[0].first and not s.late for s in said)
        everyone = set().union(*(s.first for s in said))
        if not self._agreed and self.early and said[0].order:
            known = said[0].order
            self._order = [*known, *(i for i in self._order if i not in known)]
            self._agreed = True
        self._updates.agree([s.wanted for s in said], [s.clean for s in said])
        have = self._by_buffer(everyone)
        for index in self._order:
            for buffer in self._units[index].buffers:
                if index not in self._launched and have.get(id(buffer)):
                    self._send_late(index, buffer, have[id(buffer)], wide)
        self._reduce_late(set().union(*(s.late for s in said)), wide)
        while self._waiting:
            _, buffer, _ = self._waiting[0]
            self._absorb_first()
            _sharded(buffer).know(have.get(id(buffer), ()))
            if self._context.norms_ahead and all(other is not buffer for _, other, _ in self._waiting):
                buffer.gradients.sum_squares()
        self.hide()
        self.reset()
        return len({s.changes for s in said}) == 1

    def _encode(self, said: _Said) -> bytes:
        head = _HEAD.pack(said.wide, said.wanted, said.changes)
        sets = _pack(said.first, self._params) + _pack(said.late, self._params) + _pack(said.clean, len(self._units))
        return head + sets + struct.pack(f"<{len(said.order)}I", *said.order)

    def _decode(self, data: bytes) -> _Said:
        wide, wanted, changes = _HEAD.unpack_from(data)
        params, units = -(-self._params // 8), -(-len(self._units) // 8)
        late, clean, order = (_HEAD.size + n for n in (params, 2 * params, 2 * params + units))
        return _Said(
            wide,
            wanted,
            changes,
            first=_unpack(data[_HEAD.size : late]),
            late=_unpack(data[late:clean]),
            clean=_unpack(data[clean:order]),
            order=struct.unpack(f"<{(len(data) - order) // 4}I", data[order:]),
        )

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
                    self._send_late(index, buffer, have[id(buffer)], wide)

    def _send_late(self, index: int, buffer: FlatBuffer, have: Collection[int], wide: bool) -> None:
        self._send(self._units[index], buffer, have, wide=wide and buffer.compute_dtype != torch.float32)

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
        for _, buffer, _ in self._waiting:
            _sharded(buffer).abandon()
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
