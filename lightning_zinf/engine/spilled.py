"""Gradients of a buffer that rest on NVMe between backward and the update.

Note [Spilled gradients]
~~~~~~~~~~~~~~~~~~~~~~~~
Where the planner finds that gradients do not fit into host memory (one rank on a CPU, state on NVMe), those of a unit
are written as soon as they are complete, and read again one buffer at a time when it is updated. So memory has those of
one unit, and what is being written, whatever the step: the first, one that clips, or one that accumulates.

There are two planes. ``fresh`` has what the latest backward left, in the dtype that gradients have; ``sum`` has the
float32 sum of those before, and is made when a second backward comes. Before a backward's gradients go to ``fresh``,
what is there is added to ``sum``. So the bits are those of gradients that stay: autograd adds up within a backward in
the gradient's own dtype (what comes late is added to ``fresh`` like that), and we add backwards up in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_zinf.engine.gradients import Piece, refuse_sparse
from lightning_zinf.engine.guard import KeptGradient, guard, lift, plainly
from lightning_zinf.engine.spent import SpentGradients
from lightning_zinf.engine.squares import Squares, sums_of_squares
from lightning_zinf.memory.nvme import Extent
from lightning_zinf.memory.slots import Slot
from lightning_zinf.monitor.trace import span
from lightning_zinf.parameters import stand_in

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer


class SpilledGradients:
    """Gradients of one buffer where there is one rank and they rest on NVMe.

    Args:
        buffer: Whose gradients.
    """

    def __init__(self, buffer: FlatBuffer) -> None:
        self._buffer = buffer
        self._context = buffer.context
        self.squares = Squares(buffer.name, buffer.context.counters)
        self.spent = SpentGradients(buffer.params)
        nbytes = buffer.weight_bytes
        self._fresh = buffer.context.nvme.allocate(nbytes, f"{buffer.name}/gradient")
        self._sum: Extent | None = None
        self._in_fresh: set[int] = set()
        self._in_sum: set[int] = set()
        self._known: dict[int, float] = {}  # sums of squares of what is in fresh
        self._guarded: set[int] = set()
        self._older = False  # what is in fresh is of an earlier backward
        self._running = False
        self._source: Spilled | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that rest on NVMe."""
        return self._fresh.nbytes + (0 if self._sum is None else self._sum.nbytes)

    # ------------------------------------------------------------------ a backward

    def take(self, index: int) -> None:
        """Leave the gradient of one parameter where it is until those of the unit are complete."""

    @plainly
    def before_backward(self) -> None:
        """What there is belongs to an earlier backward from here on, also what the user has put there."""
        self._show()
        self.rest()
        self._older, self._running = bool(self._in_fresh), True

    def rest(self) -> None:
        """Write gradients that are complete."""
        grads = self._present()
        if grads:
            self._put(grads)

    @plainly
    def _present(self) -> dict[int, Tensor]:
        grads = {}
        for index, param in enumerate(self._buffer.params):
            if param.grad is not None and not isinstance(param.grad, KeptGradient):
                refuse_sparse(param.grad, self._buffer.names[index])
                grads[index] = param.grad.detach()
                param.grad = None
        return grads

    def _put(self, grads: dict[int, Tensor]) -> None:
        """Write gradients to the fresh plane."""
        if self._source is not None:
            self._source.keep()  # a pending update has not read its own yet
        again = self._buffer.compute_dtype == torch.float32 and any(i in self._in_fresh & self._in_sum for i in grads)
        if self._older or again:  # in float32 autograd adds what comes late to the sum, one after the other
            self._fold()
        with torch.no_grad():
            slot, flat = self._slot(self._buffer.compute_dtype)
            views = self._buffer.views_of(flat)
            if self._in_fresh:  # these came late, in the same backward
                self._read(self._fresh, flat)
            else:
                flat.zero_()
            for index, grad in grads.items():
                if index in self._in_fresh:
                    views[index].add_(grad)
                else:
                    views[index].copy_(grad)
            if self._context.norms_ahead:
                self._sum_ahead({i: views[i] for i in grads})
            else:
                for index in grads:
                    self._known.pop(index, None)
            self._write(self._fresh, slot, flat)
        self._in_fresh |= set(grads)

    def _sum_ahead(self, grads: dict[int, Tensor]) -> None:
        nbytes = sum(g.nbytes for g in grads.values())
        self._context.counters.norm_ahead_bytes += nbytes
        with span(self._context.counters, "norm", self._buffer.name, nbytes):
            self._known.update(zip(grads, sums_of_squares(list(grads.values())), strict=True))

    def _fold(self) -> None:
        """Add what earlier backwards left to the sum."""
        self._older = False
        if self._sum is None:
            nbytes = 4 * self._buffer.layout.padded_numel
            self._sum = self._context.nvme.allocate(nbytes, f"{self._buffer.name}/gradient sum")
        with torch.no_grad():
            slot, total = self._slot(torch.float32)
            self._total(total)
            self._write(self._sum, slot, total)
        self._in_sum |= self._in_fresh
        self._in_fresh.clear()
        self._known.clear()

    def _total(self, total: Tensor) -> None:
        """Fill a float32 tensor with the sum and what is fresh."""
        if self._in_sum:
            assert self._sum is not None
            self._read(self._sum, total)
        else:
            total.zero_()
        if self._in_fresh:
            slot, fresh = self._slot(self._buffer.compute_dtype)
            self._read(self._fresh, fresh)
            pairs = list(zip(self._buffer.views_of(total), self._buffer.views_of(fresh), strict=True))
            for index in self._in_fresh:
                into, grad = pairs[index]
                if index in self._in_sum:
                    into.add_(grad)
                else:
                    into.copy_(grad)  # a sum with zero would lose the sign of a negative one
            self._context.spill.release(slot)

    @plainly
    def hide(self) -> None:
        """A backward has ended: write what is left of it, and put guards where gradients are."""
        if self._running:
            self._running = False
            self.rest()
        for index in self._in_fresh | self._in_sum:
            param = self._buffer.params[index]
            if not isinstance(param.grad, KeptGradient):
                param.grad = guard(param)
                self._guarded.add(index)
        self.spent.put()

    @plainly
    def _show(self) -> None:
        """Take the guards away; one that the user has taken away means that the gradient was to go."""
        self.spent.lift()
        self._forget(lift(self._buffer.params, self._guarded))

    def _forget(self, indices: Collection[int]) -> None:
        self._in_fresh.difference_update(indices)
        self._in_sum.difference_update(indices)
        for index in indices:
            self._known.pop(index, None)

    # ------------------------------------------------------------------ after backward

    def sum_squares(self) -> bool:
        """Nothing: that is done as they are written."""
        return True

    def squares_of(self, pieces: Sequence[Piece]) -> list[float | None]:
        """Return the sum of squares of each gradient; what is not known is read for it."""
        if all(p.index in self._known and p.index not in self._in_sum for p in pieces):
            return [self._known[p.index] for p in pieces]
        source = pieces[0].source
        assert source is not None
        nbytes = sum(p.grad.nbytes for p in pieces)
        with source.loaded(), span(self._context.counters, "norm", self._buffer.name, nbytes):
            found: list[float | None] = list(sums_of_squares([p.grad for p in pieces]))
        self._context.counters.norm_bytes += nbytes
        return found

    def collect(self, indices: Collection[int], *, keep: bool) -> list[Piece]:
        """See :meth:`.Gradients.collect`. The pieces have values only while their source is loaded.

        In a backward, where the unit is updated at once, they are what has just come, with what was there before.
        """
        if self._running:
            return self._taken_at_once(indices)
        self._show()
        self.rest()
        have = self._in_fresh | self._in_sum
        wanted = [i for i in indices if i in have]
        dtype = torch.float32 if self._in_sum else self._buffer.compute_dtype
        layout = self._buffer.layout
        empty = [stand_in(layout.shapes[i], dtype, self._buffer.device) for i in wanted]
        source = Spilled(self, dtype, dict(zip(wanted, empty, strict=True)))
        pieces = [Piece(i, layout.offsets[i], g, source) for i, g in zip(wanted, empty, strict=True)]
        if not keep and wanted:
            source.take(self._in_fresh, self._in_sum)
            self._source = source
            self._forget(wanted)
            for index in wanted:
                self._buffer.params[index].grad = None
            if self._in_fresh | self._in_sum:
                source.keep()  # somebody else's stay, and may be written anew
        self.hide()
        return pieces

    def _taken_at_once(self, indices: Collection[int]) -> list[Piece]:
        grads = self._present()
        if others := {i: g for i, g in grads.items() if i not in set(indices)}:
            self._put(others)
            grads = {i: g for i, g in grads.items() if i not in others}
        layout = self._buffer.layout
        before = (self._in_fresh | self._in_sum) & set(indices)
        if before:
            with torch.no_grad():
                total = torch.empty(layout.padded_numel)
                self._total(total)
                views = self._buffer.views_of(total)
                for index in before:
                    if index in grads:
                        views[index].add_(grads[index])
                    grads[index] = views[index]
        self._forget(list(grads))
        return [Piece(i, layout.offsets[i], grads[i].contiguous()) for i in indices if i in grads]

    @plainly
    def clear(self, indices: Collection[int]) -> None:
        """Forget the gradients of these parameters."""
        self.spent.forget(indices)
        self._forget(list(indices))
        for index in indices:
            self._buffer.params[index].grad = None
        self._guarded.difference_update(indices)

    # ------------------------------------------------------------------ the disk

    def _slot(self, dtype: torch.dtype) -> tuple[Slot, Tensor]:
        numel = self._buffer.layout.padded_numel
        got = self._context.spill.acquire(numel * dtype.itemsize, object(), force=True)
        assert got is not None
        return got[0], got[0].flat(numel, dtype)

    def _write(self, extent: Extent, slot: Slot, flat: Tensor) -> None:
        slot.writes.append(self._context.nvme.write(extent, flat))
        self._context.spill.release(slot)

    def _read(self, extent: Extent, flat: Tensor) -> None:
        self._context.spill.drain()  # what is read may still be on its way there
        with self._context.counters.timed("stall_read_seconds"):
            self._context.nvme.read(extent, flat).wait()


class Spilled:
    """Gives gradients their values while they are used.

    Args:
        gradients: Where they rest.
        dtype: What they are read as.
        grads: Stand-ins by number of the parameter, whose data this sets.
    """

    def __init__(self, gradients: SpilledGradients, dtype: torch.dtype, grads: dict[int, Tensor]) -> None:
        self._gradients = gradients
        self._dtype = dtype
        self._grads = grads
        self._parts: tuple[set[int], set[int]] | None = None
        self._kept: Tensor | None = None

    def take(self, fresh: set[int], total: set[int]) -> None:
        """Remember what is where: who collected the gradients has forgotten it."""
        self._parts = (set(fresh), set(total))

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """While this is open, the gradients have their values."""
        if self._kept is not None:
            yield
            return
        slot, flat = self._gradients._slot(self._dtype)
        try:
            self._fill(flat)
            yield
        finally:
            self._drop()
            self._gradients._context.spill.release(slot)

    def keep(self) -> None:
        """Have the values in memory from here on: where they rest will be written to."""
        if self._kept is None and self._gradients._source is self:
            self._kept = torch.empty(self._gradients._buffer.layout.padded_numel, dtype=self._dtype)
            self._fill(self._kept)
        self._gradients._source = None

    def done(self) -> None:
        """The update that they were collected for has been applied."""
        if self._gradients._source is self:
            self._gradients._source = None
        self._kept = None

    def _fill(self, flat: Tensor) -> None:
        own, now = self._gradients, (self._gradients._in_fresh, self._gradients._in_sum)
        if self._parts is not None:
            own._in_fresh, own._in_sum = self._parts
        try:
            if own._in_sum:
                own._total(flat)
            else:
                own._read(own._fresh, flat)
        finally:
            own._in_fresh, own._in_sum = now
        views = own._buffer.views_of(flat)
        for index, grad in self._grads.items():
            grad.data = views[index]

    def _drop(self) -> None:
        for grad in self._grads.values():
            grad.data = stand_in(grad.shape, grad.dtype, grad.device)
