"""When each stage worked on what: a recorder of events, off by default.

Note [Trace]
~~~~~~~~~~~~
Every arrow of the data flow is a stage. While ``Counters.trace`` is None, and it is unless somebody wants a timeline,
each place that could record something looks at that one attribute and goes on.

What runs on the calling thread is a span. What runs beside it is a request: it begins when it is submitted. It ends, if
its ticket has an ``elapsed`` (that of file I/O does, measured by the thread that finished it), exactly then; else when
somebody was seen to have waited for it, or when it was first found done, and the event says ``observed``.

Times are those of ``time.perf_counter_ns``: on Linux one clock for all processes of a machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

if TYPE_CHECKING:
    from lightning_zinf.monitor.counters import Counters

Stage = Literal[
    "step",
    "forward",
    "backward",
    "gather",
    "wait",
    "update",
    "norm",
    "nvme_read",
    "nvme_write",
    "h2d",
    "d2h",
    "all_gather",
    "reduce_scatter",
]
"""What may take time.

The computation: ``step`` is a step's forward, ``forward`` a unit's, ``backward`` a unit's up to its last gradient. What
it needs: ``gather`` is that a unit becomes resident, whatever that takes, ``update`` an optimizer step of one buffer,
``norm`` a sum of squares of gradients,
``wait`` that the computation stands still for a request. The rest are requests.
"""

T = TypeVar("T")


@dataclass
class Event:
    """Something that a stage did.

    Attributes:
        stage: Which stage.
        name: The unit, and what of it, separated by slashes: ``blocks.0/bfloat16/state``.
        nbytes: Bytes that moved; 0 for what moves none.
        begin: When it began or was submitted, in nanoseconds of ``time.perf_counter_ns``.
        end: When it ended, or None while it is under way.
        thread: Name of the thread that did or submitted it.
        observed: Whether ``end`` is only when it was seen to have ended.
    """

    stage: Stage
    name: str
    nbytes: int
    begin: int
    end: int | None = None
    thread: str = field(default_factory=lambda: threading.current_thread().name)
    observed: bool = False

    def close(self) -> None:
        """It has been waited for: it ended now at the latest."""
        if self.end is None:
            self.end, self.observed = time.perf_counter_ns(), True


@dataclass(frozen=True)
class Level:
    """How much of a budget was taken at a time.

    Attributes:
        track: What has the budget: ``slots``, ``staging``, ``tiles``.
        at: When, in nanoseconds of ``time.perf_counter_ns``.
        used: Bytes in use.
        held: Bytes allocated, in use or not.
        budget: Most bytes that may be allocated.
    """

    track: str
    at: int
    used: int
    held: int
    budget: int


class Trace:
    """Records events, and marks them for torch.profiler while one is running.

    Args:
        rank: Number of this rank.
        keep: Whether to record at all, or only to mark.
    """

    def __init__(self, rank: int = 0, *, keep: bool = True) -> None:
        self.rank = rank
        self.keep = keep
        self.levels: list[Level] = []
        self._events: list[Event] = []
        self._under_way: list[tuple[Event, Any]] = []
        self._lock = threading.Lock()  # several threads may submit requests
        self._open: dict[tuple[Stage, str], Event] = {}

    # ------------------------------------------------------------------ recording

    @contextmanager
    def span(self, stage: Stage, name: str, nbytes: int = 0) -> Iterator[None]:
        """Record what runs inside."""
        self._poll()
        event = Event(stage, name, nbytes, time.perf_counter_ns())
        try:
            with marked(stage):
                yield
        finally:
            event.end = time.perf_counter_ns()
            self._add(event)

    def request(self, stage: Stage, name: str, nbytes: int, submit: Callable[[], T]) -> T:
        """Record a request from its submission to its completion.

        Args:
            stage: Which stage.
            name: Of what.
            nbytes: Bytes that move.
            submit: Submits it and returns its ticket: something with ``done()``, or None if it is done already.

        Returns:
            The ticket.
        """
        self._poll()
        event = Event(stage, name, nbytes, time.perf_counter_ns())
        with marked(stage):
            ticket = submit()
        if ticket is None:
            event.end = time.perf_counter_ns()
        elif self.keep:
            with self._lock:
                self._under_way.append((event, ticket))
        self._add(event)
        return ticket

    def observe(self, stage: Stage, name: str, nbytes: int) -> Event:
        """Record something that begins now and ends when somebody calls :meth:`Event.close`."""
        event = Event(stage, name, nbytes, time.perf_counter_ns())
        self._add(event)
        return event

    def begin(self, stage: Stage, name: str) -> None:
        """Something begins whose end is seen elsewhere; no news if it has begun already."""
        if self.keep and (stage, name) not in self._open:
            event = self._open[stage, name] = Event(stage, name, 0, time.perf_counter_ns())
            self._add(event)

    def end(self, stage: Stage, name: str | None = None) -> None:
        """What had begun has ended; no news if it had not.

        Args:
            stage: Which stage.
            name: Of what; None for all of this stage.
        """
        for key in [k for k in self._open if k[0] == stage and name in (None, k[1])]:
            self._open.pop(key).end = time.perf_counter_ns()

    def level(self, track: str, used: int, held: int, budget: int) -> None:
        """Record how much of a budget is taken now."""
        if self.keep:
            self.levels.append(Level(track, time.perf_counter_ns(), used, held, budget))

    def _add(self, event: Event) -> None:
        if self.keep:
            self._events.append(event)

    def _poll(self) -> None:
        """Close requests that are done, and let go of their tickets."""
        with self._lock:
            left: list[tuple[Event, Any]] = []
            for event, ticket in self._under_way:
                if not ticket.done():
                    left.append((event, ticket))
                elif (elapsed := getattr(ticket, "elapsed", None)) is not None:
                    event.end = event.begin + elapsed
                else:
                    event.close()
            self._under_way = left

    # ------------------------------------------------------------------ what was recorded

    def events(self) -> list[Event]:
        """Return what was recorded, by the time of its begin; ``end`` is None for what is still under way."""
        self._poll()
        return sorted(self._events, key=lambda e: e.begin)

    def save(self, path: str | Path) -> None:
        """Write a file that Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

        Args:
            path: Where; folders are made. With the suffix ``.gz`` it is compressed.
        """
        from lightning_zinf.monitor.chrome import write

        write(self, Path(path))


def marked(stage: str) -> AbstractContextManager[Any]:
    """Be a range ``zinf::stage`` of torch.profiler, if one is running."""
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"zinf::{stage}")
    return nullcontext()


def follow_profiler(counters: Counters) -> None:
    """Mark stages for as long as torch.profiler is running; to be called now and then."""
    if torch.autograd.profiler._is_profiler_enabled:
        if counters.trace is None:
            counters.trace = Trace(keep=False)
    elif counters.trace is not None and not counters.trace.keep:
        counters.trace = None


def span(counters: Counters, stage: Stage, name: str, nbytes: int = 0) -> AbstractContextManager[Any]:
    """Record what runs inside, if anything is recorded."""
    trace = counters.trace
    return nullcontext() if trace is None else trace.span(stage, name, nbytes)
