"""A trace in the JSON format of Chrome's tracing, which Perfetto opens.

Note [Lanes]
~~~~~~~~~~~~
Every stage is a track. The format wants events on one track to nest, and requests overlap as they like. So a stage has
as many lanes as are needed for that: an event goes to the first lane on which it nests or follows.

The format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import gzip
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lightning_zinf.monitor.trace import Event, Level, Stage, Trace

if TYPE_CHECKING:
    from collections.abc import Mapping

MOVING: tuple[Stage, ...] = ("nvme_read", "nvme_write", "h2d", "d2h", "all_gather", "reduce_scatter")
"""Stages whose bytes under way are shown."""
_LANES = 1000
"""Room for lanes between the numbers of two stages' tracks."""


def lanes(events: Sequence[Event], end_of: Mapping[int, int]) -> list[int]:
    """Return a lane for each event, so that events of one lane nest or follow each other.

    Args:
        events: Events by the time of their begin; of those that begin together the longest first.
        end_of: When each ends, by ``id``.
    """
    open_until: list[list[int]] = []
    found: list[int] = []
    for event in events:
        end = end_of[id(event)]
        for ends in open_until:
            while ends and ends[-1] <= event.begin:
                ends.pop()
        lane = next((i for i, ends in enumerate(open_until) if not ends or end <= ends[-1]), len(open_until))
        if lane == len(open_until):
            open_until.append([])
        open_until[lane].append(end)
        found.append(lane)
    return found


def under_way(events: Iterable[Event], end_of: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return ``(time, bytes under way from then on)``; what ends at a time ends before what begins."""
    steps = sorted([(e.begin, e.nbytes) for e in events] + [(end_of[id(e)], -e.nbytes) for e in events])
    total, points = 0, list[tuple[int, int]]()
    for at, change in steps:
        total += change
        if points and points[-1][0] == at:
            points.pop()
        points.append((at, total))
    return points


def trace_events(trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield every event of the format."""
    now = time.perf_counter_ns()
    events, pid = trace.events(), trace.rank
    end_of = {id(e): max(e.begin, now if e.end is None else e.end) for e in events}
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": f"rank {pid}"}}
    yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
    for number, stage in enumerate(get_args(Stage)):
        own = sorted((e for e in events if e.stage == stage), key=lambda e: (e.begin, -end_of[id(e)]))
        placed = lanes(own, end_of)
        for lane in sorted(set(placed)):
            tid, title = number * _LANES + lane, f"{stage} {lane + 1}" if lane else stage
            yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": title}}
            yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}
        for event, lane in zip(own, placed, strict=True):
            yield _complete(event, pid, number * _LANES + lane, end_of[id(event)])
        if stage in MOVING:
            for at, nbytes in under_way(own, end_of):
                yield _counter(f"{stage} bytes under way", pid, at, nbytes)
    yield from _levels(trace.levels, pid)


def _complete(event: Event, pid: int, tid: int, end: int) -> dict[str, Any]:
    args: dict[str, Any] = {"thread": event.thread}
    if event.nbytes:
        args["bytes"] = event.nbytes
    if event.end is None or event.observed:
        args["end"] = "under way when the trace was saved" if event.end is None else "observed"
    times = {"ts": event.begin / 1000, "dur": (end - event.begin) / 1000}
    return {"ph": "X", "pid": pid, "tid": tid, "name": event.name, "cat": event.stage, **times, "args": args}


def _counter(name: str, pid: int, at: int, nbytes: int) -> dict[str, Any]:
    return {"ph": "C", "pid": pid, "name": name, "ts": at / 1000, "args": {"bytes": nbytes}}


def _levels(levels: Sequence[Level], pid: int) -> Iterator[dict[str, Any]]:
    budgets: dict[str, int] = defaultdict(lambda: -1)
    for level in levels:
        yield _counter(f"{level.track} in use", pid, level.at, level.used)
        yield _counter(f"{level.track} allocated", pid, level.at, level.held)
        if budgets[level.track] != level.budget:
            budgets[level.track] = level.budget
            yield _counter(f"{level.track} budget", pid, level.at, level.budget)


def write(trace: Trace, path: Path) -> None:
    """Write a trace to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"displayTimeUnit": "ms", "traceEvents": list(trace_events(trace))}
    text = json.dumps(whole, separators=(",", ":"))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
