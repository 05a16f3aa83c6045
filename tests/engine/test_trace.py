"""What a trace says about a run: everything that moved, in the right order, within the budgets."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Session, Where, buffer_sizes, least_memory, session
from models import ZOO
from oracle import Recipe, assert_same

from lightning_zinf.config import IOConfig
from lightning_zinf.engine.pager import Pager
from lightning_zinf.monitor.chrome import MOVING, under_way
from lightning_zinf.monitor.trace import Event, Level, Trace

BYTES = {
    "nvme_read": "nvme_read_bytes",
    "nvme_write": "nvme_write_bytes",
    "h2d": "host_to_device_bytes",
    "d2h": "device_to_host_bytes",
}
PLACES = [
    Where("nvme", "nvme"),
    Where("nvme", "nvme", tight=True),
    Where("nvme", "nvme", aliased=False),
    Where("nvme", "nvme", aliased=False, tight=True),
    Where("nvme", "nvme", prefetch=False),
    Where("none", "nvme"),
    Where("cpu", "cpu", aliased=False, tight=True),
]


def traced(running: Session, steps: int = 2) -> tuple[Trace, dict[str, float]]:
    """Record some steps after the order of units is known; return the trace, and what the counters grew by."""
    running.train(2)
    running.engine.flush()
    counters = running.engine.counters
    snapshot = counters.snapshot()
    trace = counters.trace = Trace()
    running.train(steps)
    running.engine.flush()
    counters.trace = None
    return trace, counters.since(snapshot)


@contextmanager
def small(folder: Path, where: Where, *, more: int = 0) -> Iterator[Session]:
    """Have room for the largest unit beside the root's and ``more`` of them, and for two small tiles."""
    memory, io = least_memory(ZOO["gpt"], "bf16-mixed"), IOConfig(tile_numel=4096, threads=2, backend="threads")
    assert memory.host_bytes is not None
    largest = 2 * max(numel for unit in buffer_sizes(ZOO["gpt"].make(), "bf16-mixed", ()).values() for numel, _ in unit)
    memory = replace(memory, host_bytes=memory.host_bytes + more * largest)
    with session(ZOO["gpt"], folder, where, "bf16-mixed", Recipe(accumulate=1), memory=memory, io=io) as running:
        yield running


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_bytes_are_those_of_the_counters_and_budgets_hold(where: Where, precision: str, tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, where, precision, Recipe()) as running:
        trace, grown = traced(running)
        context = running.engine.context
        budgets = {
            "tiles": context.tiles.nbytes if context._tiles else 0,
            "slots": context.ring.budget if context._ring else 0,
            "staging": context.staging.budget if context._staging else 0,
        }
    events = trace.events()
    for stage, counter in BYTES.items():
        assert sum(e.nbytes for e in events if e.stage == stage) == grown[counter], stage
    assert sum(e.stage == "update" for e in events) == grown["updates"] > 0
    assert sum(e.stage == "gather" for e in events) == grown["gathers"]
    assert all(e.end is not None and e.end >= e.begin for e in events)
    assert grown["overcommits"] == 0
    check_levels(trace.levels, budgets)
    # What is under way to and from the disk lies in memory that the budgets allow.
    state = [e for e in events if e.stage in ("nvme_read", "nvme_write") and e.name.endswith("/state")]
    weights = [e for e in events if e.stage in ("nvme_read", "nvme_write") and e.name.endswith("/weight")]
    assert most_under_way(state) <= budgets["tiles"]
    assert most_under_way(weights) <= budgets["slots" if where.aliased is None else "staging"]
    assert bool(state) == (where.optimizer == "nvme")
    assert bool(weights) == (where.params == "nvme")


@pytest.mark.parametrize(
    "where",
    [
        Where("nvme", "nvme", recompute=True, activations="nvme"),
        Where("nvme", "nvme", aliased=False, tight=True, activations="nvme", activation_bytes=5 * 8192),
        Where("none", "none", aliased=False, recompute=True, activations="cpu"),
    ],
    ids=str,
)
def test_bytes_of_activations_are_in_the_trace_too(where: Where, tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, where, "bf16-mixed", Recipe()) as running:
        trace, grown = traced(running)
    events = trace.events()
    for stage, counter in BYTES.items():
        assert sum(e.nbytes for e in events if e.stage == stage) == grown[counter], stage
    out = "nvme_write" if where.activations == "nvme" else "d2h"
    written = sum(e.nbytes for e in events if e.stage == out and e.name == "activations")
    assert 0 < written <= grown["activation_write_bytes"]
    assert all(e.end is not None for e in events)


def most_under_way(events: list[Event]) -> int:
    return max((nbytes for _, nbytes in under_way(events, {id(e): e.end or 0 for e in events})), default=0)


def check_levels(levels: list[Level], budgets: dict[str, int]) -> None:
    seen = defaultdict(int)
    for level in levels:
        assert 0 <= level.used <= level.held <= level.budget == budgets[level.track]
        seen[level.track] = max(seen[level.track], level.used)
    assert {track for track, most in seen.items() if most} == {track for track, budget in budgets.items() if budget}


def only(events: list[Event], stage: str, name: str, after: int = 0) -> Event:
    """Return the first event of a stage that begins after a time."""
    return next(e for e in events if e.stage == stage and e.name == name and e.begin >= after)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_unit_is_read_then_gathered_then_computed_then_written_back(prefetch: bool, tmp_path: Path) -> None:
    """In the second step, in which the update of the first is due."""
    with small(tmp_path, Where("nvme", "nvme", prefetch=prefetch)) as running:
        trace, _ = traced(running, steps=3)
        names = [u.label for u in running.engine.units if u.module is not running.model]
    events = trace.events()
    second = [e for e in events if e.stage == "step"][1].begin
    checked = 0
    for name in names:
        forward = only(events, "forward", name, second)
        gather = [e for e in events if e.stage == "gather" and e.name == name and e.begin < forward.begin][-1]
        update = only(events, "update", f"{name}/bfloat16", gather.begin)
        assert ended(gather) <= forward.begin
        assert gather.begin <= update.begin <= ended(update) <= ended(gather)
        read = [
            e
            for e in events
            if e.name == f"{name}/bfloat16/weight" and e.stage == "nvme_read" and e.begin < update.begin
        ]
        if read:  # else it was still in its slot
            assert ended(read[-1]) <= update.begin
            checked += 1
        state = [e for e in events if e.name == f"{name}/bfloat16/state"]
        reads = [e for e in state if e.stage == "nvme_read" and e.begin < ended(update)]
        writes = [e for e in state if e.stage == "nvme_write" and update.begin <= e.begin < ended(update)]
        assert 0 < len(writes) <= len(reads)
        for got, put in zip(reads[-len(writes) :], writes, strict=True):
            assert ended(got) <= put.begin
        back = only(events, "nvme_write", f"{name}/bfloat16/weight", update.begin)
        assert ended(update) <= back.begin < forward.begin
        assert only(events, "backward", name, ended(forward)).begin >= ended(forward)
    assert checked > 0


def ended(event: Event) -> int:
    assert event.end is not None
    return event.end


@pytest.mark.parametrize("prefetch", [True, False])
def test_the_next_unit_is_read_while_one_computes_if_that_is_wanted(prefetch: bool, tmp_path: Path) -> None:
    with small(tmp_path, Where("nvme", "nvme", prefetch=prefetch), more=1) as running:
        trace, grown = traced(running, steps=2)
    assert grown["overcommits"] == 0
    events = trace.events()
    early = late = 0
    computing = [e for e in events if e.stage == "forward" and e.name.startswith("blocks")]
    for now, following in itertools.pairwise(computing):
        if now.name > following.name:  # the end of a step
            continue
        uses = [e for e in events if e.stage in ("forward", "backward") and e.name == following.name]
        since = max((ended(e) for e in uses if ended(e) < following.begin), default=0)
        reads = [e for e in events if e.stage == "nvme_read" and e.name == f"{following.name}/bfloat16/weight"]
        for read in reads:
            if since < read.begin < following.begin:
                early += read.begin < ended(now)
                late += read.begin >= ended(now)
    assert early + late > 0
    assert late == 0 if prefetch else early == 0


def test_a_unit_is_updated_after_its_own_backward_and_before_those_of_others(tmp_path: Path) -> None:
    recipe = Recipe(accumulate=1, clip_norm=None)
    with session(ZOO["gpt"], tmp_path, Where("nvme", "nvme", early=True), "bf16-mixed", recipe) as running:
        trace, grown = traced(running, steps=3)
    events = trace.events()
    assert sum(e.stage == "update" for e in events) == grown["updates"]
    blocks = [e for e in events if e.name.startswith("blocks")]
    followed = 0
    for whole in (e for e in events if e.stage == "backward" and e.name == "<root>"):
        inside = [e for e in blocks if whole.begin < e.begin < ended(whole)]
        for update in (e for e in inside if e.stage == "update"):
            (own,) = [e for e in inside if e.stage == "backward" and f"{e.name}/bfloat16" == update.name]
            assert ended(own) <= update.begin
            followed += any(e.stage == "backward" and e.begin >= ended(update) for e in inside)
    assert followed > 0


@pytest.mark.parametrize("prefetch", [True, False])
def test_state_that_backward_updates_is_read_while_other_units_compute(prefetch: bool, tmp_path: Path) -> None:
    """Also where weights stay in place, so that nothing gathers them."""
    recipe = Recipe(accumulate=1, clip_norm=None)
    where = Where("none", "nvme", early=True, prefetch=prefetch)
    with session(ZOO["gpt"], tmp_path, where, "bf16-mixed", recipe) as running:
        trace, _ = traced(running, steps=3)
        early = [running.engine.units[index].label for index in running.engine.early.updated]
    events = trace.events()
    ahead = []
    for label in early:
        updates = [e for e in events if e.stage == "update" and e.name == f"{label}/bfloat16"]
        reads = [e for e in events if e.stage == "nvme_read" and e.name == f"{label}/bfloat16/state"]
        for before, update in itertools.pairwise(updates):
            ahead.append(any(ended(before) <= read.begin < update.begin for read in reads))
    assert len(ahead) == 2 * len(early) > 2
    assert all(ahead) if prefetch else not any(ahead)


@pytest.mark.parametrize("prefetch", [True, False])
def test_state_that_the_next_forward_updates_first_is_read_in_backward(prefetch: bool, tmp_path: Path) -> None:
    where = Where("nvme", "nvme", prefetch=prefetch)
    with session(ZOO["gpt"], tmp_path, where, "bf16-mixed", Recipe(accumulate=1)) as running:
        trace, grown = traced(running, steps=4)
    events = trace.events()
    assert sum(e.nbytes for e in events if e.stage == "nvme_read") == grown["nvme_read_bytes"]
    forwards = [e for e in events if e.stage == "step"]
    ahead = []
    for before, forward in itertools.pairwise(forwards):
        first = next(e for e in events if e.stage == "update" and e.begin >= forward.begin)
        backward = [e for e in events if e.stage == "backward" and ended(before) <= e.begin < forward.begin]
        earlier = [e for e in events if e.stage == "update" and e.name == first.name and e.begin < first.begin]
        since = max((ended(e) for e in earlier), default=0)
        reads = [e for e in events if e.stage == "nvme_read" and e.name == f"{first.name}/state" and e.begin >= since]
        ahead.append(min(e.begin for e in reads) < max(ended(e) for e in backward))
    assert len(ahead) == 3
    assert all(ahead) if prefetch else not any(ahead)


def test_a_trace_changes_nothing(tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        with session(
            ZOO["gpt"], tmp_path / str(on), Where("nvme", "nvme", tight=True), "bf16-mixed", Recipe()
        ) as running:
            if on:
                running.engine.counters.trace = Trace()
            results.append(running.train().result())
    assert_same(*results)


def test_nothing_is_left_open_after_an_exception(tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, Where("nvme", "nvme"), "bf16-mixed", Recipe()) as running:
        trace = running.engine.counters.trace = Trace()

        def broken(*_: Any) -> None:
            raise ArithmeticError

        handle = running.model.blocks[1].register_forward_hook(broken)
        with pytest.raises(ArithmeticError):
            running.step()
        running.engine.reset()
        handle.remove()
        running.train(1)
        running.engine.flush()
    assert all(e.end is not None for e in trace.events())
    assert not trace._open


def well_formed(path: Path) -> list[dict[str, Any]]:
    """Check a file against the format, and return its complete events."""
    found = json.loads(path.read_text())["traceEvents"]
    complete = [e for e in found if e["ph"] == "X"]
    named = {e["tid"] for e in found if e["ph"] == "M" and e["name"] == "thread_name"}
    assert {e["tid"] for e in complete} == named
    assert {e["ph"] for e in found} <= {"X", "M", "C"}
    for tid in named:  # on one track they nest
        ends: list[int] = []
        own = [(round(e["ts"] * 1000), round((e["ts"] + e["dur"]) * 1000)) for e in complete if e["tid"] == tid]
        for begin, end in sorted(own, key=lambda pair: (pair[0], -pair[1])):
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or end <= ends[-1]
            ends.append(end)
    for name in {e["name"] for e in found if e["ph"] == "C" and e["name"].endswith("under way")}:
        values = [e["args"]["bytes"] for e in found if e["ph"] == "C" and e["name"] == name]
        assert min(values) >= 0
        assert values[-1] == 0, name
    return complete


def test_the_file_is_what_was_recorded(tmp_path: Path) -> None:
    with session(
        ZOO["gpt"], tmp_path, Where("nvme", "nvme", aliased=False, tight=True), "bf16-mixed", Recipe()
    ) as running:
        trace, grown = traced(running)
    path = tmp_path / "sub" / "trace.json"
    trace.save(path)
    complete = well_formed(path)
    assert len(complete) == len(trace.events())
    for stage, counter in BYTES.items():
        assert stage in MOVING
        assert sum(e["args"].get("bytes", 0) for e in complete if e["cat"] == stage) == grown[counter] > 0


def test_torch_profiler_sees_the_stages(tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, Where("nvme", "nvme", tight=True), "bf16-mixed", Recipe()) as running:
        running.train(1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            running.train(2)
        assert running.engine.counters.trace is not None
        running.train(1)
        assert running.engine.counters.trace is None
    seen = {e.key for e in profile.key_averages() if e.key.startswith("zinf::")}
    stages = ("step", "forward", "gather", "wait", "update", "nvme_read", "nvme_write")
    assert seen >= {f"zinf::{stage}" for stage in stages}


def test_off_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a trace was used")

    for method in ("span", "request", "observe", "begin", "end", "level"):
        monkeypatch.setattr(Trace, method, refuse)
    with session(ZOO["gpt"], tmp_path, Where("nvme", "nvme"), "bf16-mixed", Recipe()) as running:
        running.train(2)
        assert running.engine.counters.trace is None
        assert isinstance(running.engine.pager, Pager)
