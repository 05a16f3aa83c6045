"""The arithmetic of a timeline: lanes on which events nest, and bytes under way."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lightning_zinf.monitor.chrome import lanes, under_way
from lightning_zinf.monitor.trace import Event, Trace

TIMES = st.integers(0, 12)
EVENTS = st.lists(
    st.tuples(TIMES, TIMES, st.integers(0, 99)).map(
        lambda t: Event("nvme_read", "unit", t[2], min(t[0], t[1]), max(t[0], t[1]))
    ),
    max_size=12,
)


def ends(events: list[Event]) -> dict[int, int]:
    return {id(e): e.end or 0 for e in events}


@given(EVENTS)
def test_events_of_one_lane_nest_or_follow(events: list[Event]) -> None:
    events.sort(key=lambda e: (e.begin, -(e.end or 0)))
    placed = lanes(events, ends(events))
    assert len(placed) == len(events)
    assert sorted(set(placed)) == list(range(len(set(placed))))
    for i, first in enumerate(events):
        for second, lane in zip(events[i + 1 :], placed[i + 1 :], strict=True):
            if lane == placed[i]:
                assert first.end is not None
                assert second.end is not None
                assert first.end <= second.begin or second.end <= first.end


@given(EVENTS)
def test_what_does_not_overlap_takes_one_lane(events: list[Event]) -> None:
    one_after_the_other = [Event("update", "", 0, 20 * i, 20 * i + (e.end or 0)) for i, e in enumerate(events)]
    assert set(lanes(one_after_the_other, ends(one_after_the_other))) <= {0}


@given(EVENTS)
def test_bytes_under_way_are_those_of_the_events_that_are_open(events: list[Event]) -> None:
    points = under_way(events, ends(events))
    assert [at for at, _ in points] == sorted({t for e in events for t in (e.begin, e.end or 0)})
    for at, nbytes in points:
        assert nbytes == sum(e.nbytes for e in events if e.begin <= at < (e.end or 0))


class Request:
    def __init__(self) -> None:
        self.finished = False

    def done(self) -> bool:
        return self.finished


class Timed(Request):
    elapsed = 123


def test_a_request_ends_when_its_ticket_says_or_when_it_is_seen_to() -> None:
    trace = Trace()
    timed, plain, lost = Timed(), Request(), Request()
    for ticket in (timed, plain, lost):
        assert trace.request("nvme_read", "a", 1, lambda ticket=ticket: ticket) is ticket
    assert [e.end for e in trace.events()] == [None] * 3
    timed.finished = plain.finished = True
    first, second, third = trace.events()
    assert first.end == first.begin + 123
    assert not first.observed
    assert second.observed
    assert third.end is None
    assert trace.request("h2d", "b", 1, lambda: None) is None
    assert trace.events()[-1].end is not None


def test_what_is_under_way_is_said_to_be(tmp_path: Path) -> None:
    trace = Trace(rank=3)
    trace.request("nvme_read", "a", 4096, Request)
    trace.save(tmp_path / "t.json.gz")
    found = json.loads(gzip.decompress((tmp_path / "t.json.gz").read_bytes()))["traceEvents"]
    (event,) = [e for e in found if e["ph"] == "X"]
    assert event["args"] == {"thread": "MainThread", "bytes": 4096, "end": "under way when the trace was saved"}
    assert {e["pid"] for e in found} == {3}


def test_a_trace_that_only_marks_keeps_nothing() -> None:
    trace = Trace(keep=False)
    with trace.span("update", "a"):
        trace.request("nvme_read", "a", 1, Request)
        trace.begin("backward", "a")
        trace.level("tiles", 1, 1, 1)
    trace.end("backward")
    assert trace.events() == []
    assert trace.levels == []
    assert trace._under_way == []
