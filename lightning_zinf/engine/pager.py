"""Updates of units that may not be in memory, and what flushes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_zinf.comm.rounds import Want
from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.gathering import Gatherer, described
from lightning_zinf.engine.units import Unit, UnitState
from lightning_zinf.optim.update import Update


class Pager(Gatherer):
    """Brings units into memory and takes them out again, and applies optimizer steps to them, now or just in time."""

    # ------------------------------------------------------------------ for the net

    def buffer_at(self, storage: int) -> FlatBuffer | None:
        """Return the paged buffer whose slot has this storage, if any."""
        return self._by_storage.get(storage)

    def refill(self, buffer: FlatBuffer) -> Tensor:
        """Make the buffer's unit resident for backward and return the flat weights."""
        unit = self.unit_with(buffer)
        self.early.touched(unit)
        if unit.state is not UnitState.RESIDENT:
            self.counters.refills += not buffer.persistent  # what is in place costs nothing
            self.gather([unit])
        return buffer.weights.flat()

    # ------------------------------------------------------------------ flushing

    @contextmanager
    def loaded(self, unit: Unit) -> Iterator[Unit]:
        """Have a unit's masters gathered and its updates applied, to read or replace whole planes.

        With several ranks, all of them must do so, for all units in the same order.
        """
        self.close_wholes()
        if unit.state is UnitState.HOST:
            self.close_host(unit)
        if self.rounds is not None:
            # Not by wants: what is here already may differ between ranks.
            self.rounds.meet(f"reading whole {described([unit])}")
            self._wanted.append(unit)
            self.collect([Want(unit.index, whole=True)])
            self._wanted.remove(unit)
        self.gather([unit], whole=self.rounds is not None)
        self._take_in(unit)
        try:
            yield unit
        finally:
            for buffer in unit.buffers:
                buffer.gathered_low = None
            if unit.index not in self._live():
                self.release(unit)

    def _settle(self, unit: Unit) -> None:
        """Apply the pending updates of a unit to this rank's shard."""
        with torch.inference_mode(False), torch.no_grad():
            self._start(unit, keep=[unit])
            try:
                for buffer in unit.buffers:
                    buffer.settle()
            finally:
                self.release(unit, stale=True)

    @staticmethod
    def _take_in(unit: Unit) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for buffer in unit.buffers:
                if buffer.persistent:
                    buffer.take_in()

    # ------------------------------------------------------------------ updates

    def update(self, buffer: FlatBuffer, update: Update) -> None:
        """Apply an optimizer step to a buffer, now or when its weights are next needed."""
        self.close_wholes()
        unit = self.unit_with(buffer)
        with torch.inference_mode(False), torch.no_grad():
            if unit.state is UnitState.HOST:
                self.close_host(unit)
            buffer.defer(update)
            if buffer.deferred:
                if buffer.persistent:  # a graph may have saved the parameters, whose values are about to change
                    buffer.outdate(update.touches)
                self.release(unit, stale=True)
                self.has_pending = True
            else:
                buffer.take_in()
                if self.rounds is None:
                    buffer.load()
                else:
                    buffer.collect()  # arrives by the end of the step
                    self._arriving.append(buffer)
                buffer.outdate(update.touches)
                self.release(unit)  # code that changes weights between steps must find the master

    def update_now(self, unit: Unit, updates: list[tuple[FlatBuffer, Update]]) -> None:
        """Apply an optimizer step to a unit in backward, where its weights are as a rule; else when they come."""
        if not updates:
            return
        with torch.inference_mode(False), torch.no_grad():
            for buffer, update in updates:
                buffer.defer(update)
            if self.rounds is not None:
                self._update_shard(unit)
            elif unit.persistent or unit.state is UnitState.RESIDENT:
                for buffer, update in updates:
                    buffer.settle()
                    buffer.outdate(update.touches)
            else:
                self.release(unit, stale=True)
        self.has_pending = True

    def _update_shard(self, unit: Unit) -> None:
        """Apply the pending updates of a unit that is as a rule released by now, if its shard is still in memory.

        Its other parts in a slot are out of date from then on; what stays in place is not to be used as it is.
        """
        if unit.persistent:
            for buffer in unit.buffers:
                buffer.outdate()
        elif unit.state is UnitState.RELEASED and all(b.weights.at_home for b in unit.buffers):
            for buffer in unit.buffers:
                buffer.settle()
            return
        elif not all(b.weights.at_hand for b in unit.buffers):
            self.release(unit, stale=True)
            return
        self._settle(unit)

    def forget_mixed(self) -> None:
        """Have weights gathered again before they are used, if they may be from before and after an update in part."""
        for index in self.early.take_mixed():
            unit = self.units[index]
            self.release(unit, stale=True)
            for buffer in unit.buffers:
                if buffer.deferred:
                    buffer.weights.finish()
                    buffer.weights.whole = False

    def arrive(self) -> None:
        """Wait for weights that were updated in place to come from all ranks."""
        while self._arriving:
            self._arriving.pop().weights.finish()

    def flush(self) -> None:
        """Apply every pending update, take in the user's changes, and wait for every write.

        This is each rank's own business: nothing is gathered.
        """
        self.flush_host()
        for unit in self.units:
            if any(b.pending for b in unit.buffers):
                self.catch_up(unit)
            else:
                self._take_in(unit)
        self.has_pending = False
        self.context.drain()

    def catch_up(self, unit: Unit) -> None:
        """Apply the pending updates of a unit; this is each rank's own business."""
        if self.rounds is not None:
            self._settle(unit)
            return
        with self.loaded(unit):
            pass

    def forget_gathered(self) -> None:
        """Have weights that slots still hold gathered again before they are used."""
        for unit in self.units:
            if not unit.persistent:
                self.release(unit)
                for buffer in unit.buffers:
                    buffer.weights.whole = False
