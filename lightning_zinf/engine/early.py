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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lightning_zinf.engine.units import Unit

LEFT_TO_FORWARD = 3
"""Of so many units one is updated in the next forward."""


class EarlyUpdates:
    """Which units are updated in backward, and when.

    Args:
        units: The units of a model.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = [u for u in units if u.has_trainable]
        self._clean: dict[int, bool] = {}
        self._complete: set[int] = set()
        self._apply: Callable[[Unit], None] | None = None
        self.updated: set[int] = set()
        self.running = False

    @property
    def learning(self) -> bool:
        """Whether a unit has not been watched in any backward yet."""
        return len(self._clean) < len(self._units)

    @contextmanager
    def allowed(self, apply: Callable[[Unit], None]) -> Iterator[None]:
        """Update units in a backward that runs inside.

        Args:
            apply: Updates a unit whose gradients are complete.
        """
        self._apply = apply
        self.updated.clear()
        try:
            yield
        finally:
            self._apply = None

    def begin(self) -> None:
        """A backward begins."""
        self._complete.clear()
        self.running = True

    def end(self) -> None:
        """A backward has ended."""
        self._complete.clear()
        self.running = False

    def expected(self, unit: Unit) -> bool:
        """Whether the backward that runs now will update a unit, and has not yet."""
        return self.running and self._apply is not None and self._eligible(unit) and unit.index not in self.updated

    def _eligible(self, unit: Unit) -> bool:
        return self._clean.get(unit.index, False) and unit.index % LEFT_TO_FORWARD != 0

    def touched(self, unit: Unit) -> None:
        """The weights of a unit are used in backward."""
        if unit.index in self._complete:
            self._clean[unit.index] = False

    def complete(self, unit: Unit) -> None:
        """All gradients of a unit have arrived.

        Raises:
            RuntimeError: If it has been updated in this backward already.
        """
        if unit.index in self.updated and self._apply is not None:
            raise RuntimeError(
                f"a gradient of unit {unit.name or '<root>'!r} came after the unit had been updated in the same "
                "backward: the graph is not the one of earlier steps. Set overlap.update='forward' for models whose "
                "weights are used at changing places; the weights are amid a step now, so go on from a checkpoint"
            )
        if unit.index in self._complete:
            self._clean[unit.index] = False  # gradients in two parts
        elif self._apply is not None and self._eligible(unit):
            self.updated.add(unit.index)
            self._apply(unit)
        else:
            self._clean.setdefault(unit.index, True)
        self._complete.add(unit.index)
