"""How fast this run computes, updates and moves bytes, measured over a few of its steps.

Note [Measured speeds]
~~~~~~~~~~~~~~~~~~~~~~
Where a plan has something that speeds decide (``memory/planner/speeds.py``), a few steps after the first ones are
recorded by a trace, which knows when the I/O threads finished, and dropped after: a disk was at work while anything was
asked of it, the update while its spans ran and did not wait, and compute took what is left of the steps. An evaluation
between two of them is not of the steps; updates that had waited until then, and that it runs, are.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from lightning_zinf.memory.planner.speeds import Speeds
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.monitor.trace import Event, Trace

WARM_UP = 3
"""Optimizer steps before the measured ones: orders are recorded, slots are full, code is compiled."""
STEPS = 3
"""Optimizer steps that are measured."""


class SpeedProbe:
    """Measures some steps.

    Args:
        counters: Whose ``trace`` is used.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._seen = 0
        self._trace: Trace | None = None
        self._begin = 0
        self._evaluations: list[tuple[int, int]] = []
        self._evaluating: int | None = None

    @property
    def due(self) -> bool:
        """Whether the steps to be measured are over."""
        return self._seen > WARM_UP + STEPS

    def between_steps(self) -> Speeds | None:
        """A step is about to begin, and none is under way; return what was measured, once, when it is due.

        It is None also if somebody else recorded meanwhile.
        """
        self._seen += 1
        if self._seen == WARM_UP + 1 and self._counters.trace is None:
            self._trace = self._counters.trace = Trace()
            self._begin = time.perf_counter_ns()
        if not self.due:
            return None
        trace = self._trace
        mine = trace is not None and self._counters.trace is trace
        events = trace.events() if trace is not None else []
        self.stop()
        end = time.perf_counter_ns()
        return speeds_of(events, self._begin, end, STEPS, self._evaluations) if mine else None

    def evaluation_begins(self) -> None:
        """What follows is no part of a step."""
        if self._trace is not None:
            self._evaluating = time.perf_counter_ns()

    def evaluation_ended(self) -> None:
        """What follows is."""
        if self._evaluating is not None:
            self._evaluations.append((self._evaluating, time.perf_counter_ns()))
            self._evaluating = None

    def stop(self) -> None:
        """Record no more."""
        if self._trace is not None and self._counters.trace is self._trace:
            self._counters.trace = None
        self._trace = None


def speeds_of(
    events: Sequence[Event], begin: int, end: int, steps: int, evaluations: Sequence[tuple[int, int]] = ()
) -> Speeds:
    """Return the speeds that events tell of.

    Args:
        events: What was recorded between two moments.
        begin: The first, in nanoseconds.
        end: The second.
        steps: Optimizer steps in between.
        evaluations: When each evaluation in between began and ended, in nanoseconds.
    """
    done = [e for e in events if e.end is not None]
    spans = {s: [(e.begin, e.end or 0) for e in done if e.stage == s] for s in ("update", "wait")}
    moved = {s: sum(e.nbytes for e in done if e.stage == s) for s in ("nvme_read", "nvme_write")}
    busy = {s: length([(e.begin, e.end or 0) for e in done if e.stage == s]) for s in moved}
    either = length([(e.begin, e.end or 0) for e in done if e.stage in moved])
    waits, both = length(spans["wait"]), length([*spans["update"], *spans["wait"]])
    elsewhere = length([*spans["update"], *spans["wait"], *evaluations])
    return Speeds(
        compute_seconds=max(0, end - begin - elsewhere) * 1e-9 / steps,
        update_seconds=max(0, both - waits) * 1e-9 / steps,
        nvme_read=_rate(moved["nvme_read"], busy["nvme_read"]),
        nvme_write=_rate(moved["nvme_write"], busy["nvme_write"]),
        nvme_mixed=_rate(sum(moved.values()), either),
    )


def length(spans: Iterable[tuple[int, int]]) -> int:
    """Return how long at least one of these spans lasted."""
    total, until = 0, None
    for begin, end in sorted(spans):
        if until is None or begin > until:
            total, until = total + max(0, end - begin), max(begin, end)
        elif end > until:
            total, until = total + end - until, end
    return total


def _rate(nbytes: int, nanoseconds: int) -> float | None:
    return nbytes / (nanoseconds * 1e-9) if nbytes and nanoseconds else None
