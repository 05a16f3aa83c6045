"""Updates in backward: a unit whose gradients are complete is updated there and then.

Note [Updates in backward]
~~~~~~~~~~~~~~~~~~~~~~~~~~
Where nothing has to know all gradients before the first update (no clipping by norm, no loss scaling, no hook that
looks at them), a unit can be updated as soon as its own are complete. Its weights are in memory then anyway, its
gradient is freed at once, and the disk moves state while backward computes. Units that are updated just in time in the
next forward move it then, so some are left to that: backward takes about twice as long as forward, and the disk gets
work in proportion.

The result is the same only if nobody needs the unit's old weights later in that backward, and no gradient comes late
(shared weights under reentrant checkpointing do that). So units are watched in every backward that takes no updates,
and only those that were never touched after they were complete are updated early. A graph that then changes is refused
by name: a late gradient here, a late use by the version that the saved-tensor net compares.

Note [Updates in backward on several ranks]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Here a gradient is complete when its reduction is (stages 2 and 3; stage 1 reduces when the optimizer steps). Then every
rank has sent its part, so all are past the unit, or past the whole backward. A rank updates its own shard when it finds
that the reduction has arrived, and sends nothing for that: some ranks may do so in backward and others in the next
forward. Until the end of the step the shards of such a unit are a mixture, which nobody may compute with:

- Which units are watched and clean is agreed on at the end of every backward: a unit has to be so on all ranks. So is
  whether all ranks want the coming steps in backward, by what they wanted last.
- On every rank, a use of such a unit's weights after its gradients are complete is refused, updated here or not.
- A gathering that is under way for somebody who fetches ahead may bring a mixture. So when the optimizer steps, where
  all ranks have met, what was gathered of units that were updated here no longer counts (``take_mixed``); for those
  updated later the pending update sees to that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lightning_zinf.engine.units import Unit

LEFT_TO_FORWARD = 3
"""Of so many units one is updated in the next forward."""
_CHANGED = (
    "the graph is not the one of earlier steps. Set overlap.update='forward' for models whose weights are used at "
    "changing places; the weights are amid a step now, so go on from a checkpoint"
)


class EarlyUpdates:
    """Which units are updated in backward, and when.

    Args:
        units: The units of a model.
        shared: There are several ranks.
    """

    def __init__(self, units: Sequence[Unit], *, shared: bool = False) -> None:
        self._units = [u for u in units if u.has_trainable]
        self._shared = shared
        self._clean: dict[int, bool] = {}
        self._clean_everywhere: set[int] = set()
        self._wanted_everywhere = not shared
        self._complete: dict[int, Unit] = {}  # by index, in this order
        self._order: list[Unit] = []  # that of the backward before
        self._passed = 0  # so many of these are not expected any more
        self._apply: Callable[[Unit], None] | None = None
        self._mixed: set[int] = set()
        self.wanted = False
        self.updated: set[int] = set()
        self.running = False

    @property
    def learning(self) -> bool:
        """Whether a unit has not been watched in any backward yet."""
        return len(self._clean) < len(self._units)

    @contextmanager
    def allowed(self, apply: Callable[[Unit], None]) -> Iterator[None]:
        """Update units in a backward that runs inside; with several ranks, if all of them wanted that the last time.

        Args:
            apply: Updates a unit whose gradients are complete.
        """
        self.wanted = True
        self._apply = apply if self._wanted_everywhere else None
        self.updated.clear()
        try:
            yield
        finally:
            self.wanted = False
            self._apply = None

    def begin(self) -> None:
        """A backward begins."""
        self._complete.clear()
        self._passed = 0
        self.running = True

    def coming(self) -> Iterator[Unit]:
        """Yield the units that are still to be updated in this backward, in the order of the backward before."""
        while self._passed < len(self._order) and not self.expected(self._order[self._passed]):
            self._passed += 1
        return (unit for unit in itertools.islice(self._order, self._passed, None) if self.expected(unit))

    def end(self) -> None:
        """A backward has ended."""
        self._order = list(self._complete.values())
        self._complete.clear()
        self.running = False

    def expected(self, unit: Unit) -> bool:
        """Whether the backward that runs now will update a unit, and has not yet."""
        return self._may_update(unit) and unit.index not in self.updated

    def _may_update(self, unit: Unit) -> bool:
        if not self.running or self._apply is None or unit.index % LEFT_TO_FORWARD == 0:
            return False
        clean = unit.index in self._clean_everywhere if self._shared else self._clean.get(unit.index, False)
        return clean and any(b.deferred for b in unit.buffers)

    def may_be_mixed(self, unit: Unit) -> bool:
        """Whether other ranks may have updated a unit whose gradients are complete here."""
        return self._shared and unit.index in self._complete and self._may_update(unit)

    def touched(self, unit: Unit, *, used: bool = False) -> None:
        """The weights of a unit are used in backward.

        Args:
            unit: The unit.
            used: Code computes with them; else what was saved of them is compared with what they were.

        Raises:
            RuntimeError: If they may have been updated in this backward already.
        """
        if unit.index not in self._complete:
            return
        if self.may_be_mixed(unit) or (used and self._apply is not None and unit.index in self.updated):
            raise RuntimeError(
                f"the weights of unit {unit.label!r} are used in backward after its gradients were complete, where it "
                f"may have been updated: {_CHANGED}"
            )
        self._clean[unit.index] = False

    def arrived(self, unit: Unit) -> None:
        """A gradient of a unit has arrived.

        Raises:
            RuntimeError: If the unit may have been updated in this backward already.
        """
        if self.may_be_mixed(unit) or (self._apply is not None and unit.index in self.updated):
            raise RuntimeError(
                f"a gradient of unit {unit.label!r} came after the unit had been updated in the same backward: "
                f"{_CHANGED}"
            )
        if unit.index in self._complete:
            self._clean[unit.index] = False  # gradients in two parts

    def complete(self, unit: Unit) -> None:
        """All gradients of a unit have arrived on this rank; with one rank it is updated if it may be."""
        if not self._shared and self.expected(unit):
            self.reduced(unit)
        else:
            self._clean.setdefault(unit.index, True)
        self._complete[unit.index] = unit

    def reduced(self, unit: Unit) -> None:
        """All gradients of a unit have arrived from all ranks: update it if it may be."""
        if not self.expected(unit):
            return
        assert self._apply is not None
        self.updated.add(unit.index)
        if self._shared:
            self._mixed.add(unit.index)
        self._apply(unit)

    # ------------------------------------------------------------------ with other ranks

    def clean(self) -> set[int]:
        """Return the units that were watched on this rank, and never touched after they were complete."""
        return {index for index, clean in self._clean.items() if clean}

    def agree(self, wanted: Sequence[bool], clean: Sequence[set[int]]) -> None:
        """Go by what all ranks said at the end of a backward.

        Args:
            wanted: By rank, whether it wants its updates in this backward.
            clean: By rank, what :meth:`clean` returned.

        Raises:
            ValueError: On all ranks, if some took updates in this backward and others did not expect any.
        """
        self._clean_everywhere = set.intersection(*clean)
        if not any(wanted):
            return
        before, self._wanted_everywhere = self._wanted_everywhere, all(wanted)
        if before and not all(wanted):
            others = ", ".join(str(rank) for rank, flag in enumerate(wanted) if not flag)
            raise ValueError(
                f"rank {others} can no longer take optimizer steps in backward, since a callback, a hook or clipping "
                "wants all gradients first, and the other ranks still do; they may be one step ahead. Use the same "
                "callbacks and options on all ranks, or set overlap.update='forward', and go on from a checkpoint"
            )

    def take_mixed(self) -> list[int]:
        """Return the units whose gathered weights count for nothing, once all ranks are past backward."""
        mixed = sorted(self._mixed)
        self._mixed.clear()
        return mixed
