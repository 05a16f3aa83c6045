"""The recorded order of units, and what comes next.

Note [Recorded order]
~~~~~~~~~~~~~~~~~~~~~
Each kind of step (training, validation...) records in which order it touches units, forward and backward alike. The
next step of that kind follows the record with a cursor; what lies ahead of the cursor is worth fetching. A step that
turns out different (an expert that was not routed to, an early exit) moves the cursor to the unit's next mention close
by, or leaves it where it is: prefetching gets worse for a while, never the result. Every step's record replaces the
last one.
"""

from __future__ import annotations

from collections.abc import Iterator

RESYNC_WINDOW = 64
"""How far ahead a unit that came unexpectedly is searched for."""


class Schedule:
    """Order of units by kind of step."""

    def __init__(self) -> None:
        self._recorded: dict[str, list[int]] = {}
        self._recording: list[int] = []
        self._kind = ""
        self._cursor = 0

    def begin(self, kind: str) -> None:
        """A step of ``kind`` begins; the record of the one before becomes what its kind follows from now on."""
        if self._recording:
            self._recorded[self._kind] = self._recording
        self._recording = []
        self._kind = kind
        self._cursor = 0

    def touch(self, unit: int) -> None:
        """Unit number ``unit`` is needed now."""
        self._recording.append(unit)
        order = self._recorded.get(self._kind, [])
        for position in range(self._cursor, min(self._cursor + RESYNC_WINDOW, len(order))):
            if order[position] == unit:
                self._cursor = position + 1
                return

    def ahead(self, *, wrap: bool = False) -> Iterator[int]:
        """Yield the units that are expected next; with ``wrap``, go on with the beginning of the same kind of step."""
        order = self._recorded.get(self._kind, [])
        yield from order[self._cursor :]
        if wrap:
            yield from order or self._recording
