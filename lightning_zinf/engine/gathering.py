"""Which units are in memory: gathering, releasing, fetching ahead, and the user's view of them.

Note [Three ways to be in memory]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
A unit is LOADING while its reads are under way, RESIDENT when its parameters view the weights that compute uses, and
HOST when they view the master, for code that is not compute. Any unit that no running frame needs may be evicted at any
time: one that was fetched for the farthest future first, else the one that was needed longest ago.

With several ranks, loading has two halves. Reading one's own shard (``start``) is everybody's own business; gathering
it from all ranks (``collect``) is agreed on in rounds, see ``comm/rounds.py``. A rank also collects what only others
want.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from lightning_zinf.comm.rounds import Rounds, Want
from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.early import EarlyUpdates
from lightning_zinf.engine.schedule import Schedule
from lightning_zinf.engine.units import Unit, UnitState
from lightning_zinf.monitor.trace import span
from lightning_zinf.parameters import owner_of

STATES_AHEAD = 4
"""Units whose state is fetched ahead in backward."""
MAX_HOST_UNITS = 2
"""Units that code outside of a training step keeps in memory at once, unless it holds on to more."""


class Gatherer:
    """Brings units into memory and takes them out again.

    Args:
        units: The units of a model.
        context: Rings, stores and counters.
        live: Tells which units running frames need: the ``index`` of each.
        prefetch: Whether to fetch ahead along the recorded order.
    """

    def __init__(
        self, units: list[Unit], context: EngineContext, live: Callable[[], set[int]], *, prefetch: bool = True
    ) -> None:
        self.units = units
        self.context = context
        self.counters = context.counters
        self.schedule = Schedule()
        self.has_pending = False
        self.held: dict[Unit, None] = {}  # resident or loading, least recently needed first
        self._host: list[Unit] = []  # HOST, least recently needed first
        self._live = live
        self._prefetch_on = prefetch
        self.rounds: Rounds | None = None
        self.early = EarlyUpdates(units, shared=context.comm is not None)
        self.close_wholes: Callable[[], None] = _nothing
        self._wanted: list[Unit] = []
        self._updated: dict[Unit, None] = {}  # since the last backward, for forward; in this order
        self._first: list[Unit] = []  # the same of the step before
        self._backwards = self._expected_backwards = 0  # in this step, and as many as there were in the one before
        self._arriving: list[FlatBuffer] = []
        self._unit_of: dict[int, Unit] = {id(b): u for u in units for b in u.buffers}
        self._by_storage: dict[int, FlatBuffer] = {}
        self._moving: set[int] = set()
        self._put_off: Unit | None = None  # is fetched ahead next, once slots are written
        for unit in units:
            self.admit(unit)

    @property
    def _any_moves(self) -> bool:
        return bool(self._moving)

    def admit(self, unit: Unit) -> None:
        """Take in a unit whose planes are where they rest."""
        unit.state = UnitState.RELEASED
        if unit.moves:
            self._moving.add(unit.index)
        elif not unit.flips:
            unit.state = UnitState.RESIDENT  # for good
        for buffer in unit.buffers:
            if buffer.persistent and buffer.deferred:
                self._by_storage[buffer.storage_key()] = buffer

    def expel(self, unit: Unit) -> None:
        """Forget where a unit's planes are, which are about to move; nothing of it may be pending."""
        self._put_off = None
        self.held.pop(unit, None)
        self._moving.discard(unit.index)
        for buffer in unit.buffers:
            if buffer.persistent:
                self._by_storage.pop(buffer.storage_key(), None)

    def unit_of(self, param: nn.Parameter) -> tuple[Unit, FlatBuffer, int] | None:
        """Return where a parameter lives, or None if it is not of these units."""
        entry = owner_of(param)
        if entry is None or id(entry[0]) not in self._unit_of:
            return None
        return self._unit_of[id(entry[0])], entry[0], entry[1]

    def unit_with(self, buffer: FlatBuffer) -> Unit:
        """Return the unit that a buffer is part of."""
        return self._unit_of[id(buffer)]

    # ------------------------------------------------------------------ gathering

    def need(self, unit: Unit) -> None:
        """Make a unit resident for compute, and fetch ahead."""
        self.schedule.touch(unit.index)
        self.gather([unit])
        self.prefetch()

    def gather(
        self, units: list[Unit], keep: list[Unit] | None = None, *, whole: bool = False, afresh: bool = False
    ) -> None:
        """Make units resident for compute.

        Args:
            units: Which.
            keep: Units that must not be evicted for them; themselves by default.
            whole: Have the low halves of their masters gathered too.
            afresh: With several ranks, gather also what is here already.
        """
        with torch.inference_mode(False), torch.no_grad():
            for unit in units:
                if unit.state is UnitState.HOST:
                    self.close_host(unit)
            for unit in units:
                self._start(unit, keep=keep or units)
            if self.rounds is not None:
                self._agree(self.rounds, units, whole, afresh)
            for unit in units:
                if unit.state is UnitState.RESIDENT:
                    for buffer in unit.buffers if self.rounds is not None else ():
                        buffer.weights.finish()
                    if unit in self.held:
                        self.held.pop(unit)
                        self.held[unit] = None
                else:
                    self._finish(unit)

    # ------------------------------------------------------------------ with other ranks

    def _agree(self, rounds: Rounds, units: list[Unit], whole: bool, afresh: bool) -> None:
        """Have ``units`` collected by all ranks, and what the recorded order expects next along with them."""
        before = rounds.count

        def missing() -> list[Want]:
            return [
                Want(u.index, whole)
                for u in units
                if not u.collected
                or (whole and any(b.split and b.gathered_low is None for b in u.buffers))
                or (afresh and rounds.count == before)
            ]

        def ahead() -> list[Want]:
            return [Want(u.index) for u in self.held if u.state is UnitState.LOADING and not u.collected]

        if not missing():
            return
        self._wanted.extend(units)
        try:
            rounds.want(missing, ahead, described(units))
        finally:
            del self._wanted[len(self._wanted) - len(units) :]

    def collect(self, wants: list[Want]) -> None:
        """Gather units together with all other ranks, which call this with the same list."""
        with torch.inference_mode(False), torch.no_grad():
            for want in wants:
                unit = self.units[want.unit]
                if unit.state is UnitState.HOST:
                    self.close_host(unit)
                self._start(unit, keep=[unit, *self._wanted])
                for buffer in unit.buffers:
                    buffer.collect(residual=want.whole)
                    if unit not in self._wanted:
                        buffer.gathered_low = None
                    if buffer.persistent and self.early.may_be_mixed(unit):  # a graph that saved them has to refuse
                        buffer.outdate()

    def _start(self, unit: Unit, keep: list[Unit]) -> None:
        """Start loading, evicting whatever has to go."""
        if unit.index in self._live() and any(buffer.pending for buffer in unit.buffers):
            self._updated[unit] = None
        if unit.state in (UnitState.LOADING, UnitState.RESIDENT):
            return
        pinned = self._live() | {u.index for u in keep}
        for buffer in unit.buffers:
            while not buffer.start(force=False):
                if (victim := self._victim(pinned)) is not None:
                    self.release(victim)
                elif (opened := self._unseen_host(pinned)) is not None:
                    self.close_host(opened)
                else:
                    buffer.start(force=True)
                    break
            buffer.prefetch_state()
        unit.state = UnitState.LOADING
        self.held[unit] = None

    def _unseen_host(self, pinned: set[int]) -> Unit | None:
        """Return the unit that code outside of a step has used longest ago and no longer sees."""
        return next((u for u in self._host if u.index not in pinned and not any(b.seen for b in u.buffers)), None)

    def _victim(self, pinned: set[int]) -> Unit | None:
        """Return the unit to evict: what was fetched for the farthest future, else what was needed longest ago."""
        spare = [u for u in self.held if u.index not in pinned and not u.persistent]
        loading = [u for u in spare if u.state is UnitState.LOADING]
        return loading[-1] if loading else next(iter(spare), None)

    def _finish(self, unit: Unit) -> None:
        try:
            with span(self.counters, "gather", unit.label, unit.weight_bytes):
                for buffer in unit.buffers:
                    buffer.load()
        except BaseException:
            self.release(unit)
            raise
        for buffer in unit.buffers:
            buffer.bind()
            if not buffer.persistent:
                self._by_storage[buffer.storage_key()] = buffer
        unit.state = UnitState.RESIDENT
        self.counters.gathers += 1

    def release(self, unit: Unit, *, stale: bool = False) -> None:
        """Give a unit's slots back.

        Args:
            unit: The unit.
            stale: Its weights are out of date, so also weights that stay in place must not be used as they are.
        """
        if unit.state not in (UnitState.LOADING, UnitState.RESIDENT):
            return
        if unit.persistent and not stale and not unit.flips:
            return
        self.held.pop(unit, None)
        unit.state = UnitState.RELEASED
        with torch.inference_mode(False):
            for buffer in unit.buffers:
                if buffer.bound == "compute" and not buffer.persistent:
                    self._by_storage.pop(buffer.storage_key(), None)
                buffer.unbind()

    def prefetch(self, *, wrap: bool = False) -> None:
        """Start to fetch what the recorded order expects next; with ``wrap``, what the next step begins with too."""
        if not self._prefetch_on or not self._any_moves:
            return
        with torch.inference_mode(False), torch.no_grad():
            self._start_ahead(wrap=wrap)  # weights before state: they are less, and wanted sooner
        self.prefetch_states()
        for unit in self.held:
            if unit.state is UnitState.LOADING:
                unit.prefetch_state()

    def go_on(self) -> None:
        """Go on fetching ahead, if slots had to be written first and are by now."""
        if self._put_off is not None and not self._would_wait(self._put_off):
            self.prefetch()

    def before_backward(self, *, after_step: bool) -> None:
        """A backward begins: the disk has time to fetch state.

        Args:
            after_step: It is the first one since an optimizer step.
        """
        if self._updated:  # else this is another backward of the same step
            self._first = list(self._updated)
            self._updated.clear()
        if after_step:
            self._backwards, self._expected_backwards = 0, self._backwards
        self._backwards += 1
        self.early.begin()
        self.prefetch_states()

    def prefetch_states(self) -> None:
        """Start to fetch the state that updates want next: in this backward, then in the next forward.

        State waits for the weights of its unit: backward wants those before.
        """
        if not self._prefetch_on or not self.early.running:
            return
        coming = list(itertools.islice(self.early.coming(), STATES_AHEAD))
        for unit in coming:
            if unit.state is UnitState.RELEASED and not unit.persistent:
                return
            unit.prefetch_state()
        if self._backwards < self._expected_backwards:  # tiles have to be free for what the last one updates
            return
        left = (u for u in self._first if u.index not in self.early.updated)
        for unit in itertools.islice(left, STATES_AHEAD - len(coming)):
            unit.prefetch_state(before_step=True)

    def _start_ahead(self, *, wrap: bool) -> None:
        """Start to load what the recorded order expects next, until no slot is free.

        While something is on its way for what comes next, the computation does not wait for slots that are still being
        written from: they are asked for again when a gradient arrives, or at the next unit.
        """
        self._put_off = None
        under_way = any(u.state is UnitState.LOADING for u in self.held)
        for index in self.schedule.ahead(wrap=wrap):
            unit = self.units[index]
            if unit.state is not UnitState.RELEASED or not unit.moves:
                continue
            if under_way and self._would_wait(unit):
                self._put_off = unit
                return
            started: list[FlatBuffer] = []
            for buffer in unit.buffers:
                if not buffer.start(force=False):
                    for other in started:
                        other.weights.leave()
                    return
                started.append(buffer)
            unit.state = UnitState.LOADING
            self.held[unit] = None
            under_way = True

    def _would_wait(self, unit: Unit) -> bool:
        return unit.state is UnitState.RELEASED and any(buffer.would_wait() for buffer in unit.buffers)

    def release_idle(self) -> None:
        """Release every resident unit that no running frame needs."""
        live = self._live()
        for unit in [u for u in self.held if u.index not in live and u.state is UnitState.RESIDENT]:
            self.release(unit)

    # ------------------------------------------------------------------ the user's view

    def open_host(self, units: list[Unit]) -> None:
        """Let the parameters of units view their masters."""
        with torch.inference_mode(False), torch.no_grad():
            for unit in units:
                if unit.state is UnitState.HOST:
                    self._host.remove(unit)
                else:
                    # A round in any case: else a rank that still has the weights could change them, and then serve
                    # its changed shard to one that comes later to do the same.
                    self.gather([unit], keep=units, whole=True, afresh=unit.moves or unit.flips)
                    for buffer in unit.buffers:
                        buffer.open_master()
                        buffer.gathered_low = None
                    self.held.pop(unit, None)
                    unit.state = UnitState.HOST
                self._host.append(unit)
            spare = [u for u in self._host if u not in units]
            for unit in spare[: max(0, len(self._host) - max(MAX_HOST_UNITS, len(units)))]:
                if not any(b.seen for b in unit.buffers):
                    self.close_host(unit)

    def close_host(self, unit: Unit) -> None:
        """Take the user's changes to a unit back and release it."""
        with torch.inference_mode(False), torch.no_grad():
            for buffer in unit.buffers:
                buffer.close_master()
            self.context.drop_scratch()
            if not unit.persistent:
                # A graph built outside of a step may have saved the parameters: have it refuse, not read NaN.
                for buffer in unit.buffers:
                    buffer.outdate()
        self._host.remove(unit)
        self.held[unit] = None
        unit.state = UnitState.RESIDENT
        self.release(unit)

    def flush_host(self) -> None:
        """Take in what code outside of compute did to parameters, and release them."""
        self.close_wholes()
        for unit in list(self._host):
            self.close_host(unit)


def _nothing() -> None:
    pass


def described(units: list[Unit]) -> str:
    """Name units and their first parameters, for messages."""
    first = units[0]
    name = first.buffers[0].names[0] if first.buffers and first.buffers[0].names else "?"
    rest = f" and {len(units) - 1} more units" if len(units) > 1 else ""
    return f"unit {first.label!r} (parameter {name!r}, ...){rest}"
