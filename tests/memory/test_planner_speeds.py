"""What measured speeds decide, and how they are read off a trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_zinf.engine.speeds import STEPS, WARM_UP, SpeedProbe, length, speeds_of
from lightning_zinf.memory.planner import BufferSpec, Machine, ModelSpec, Plan, PlanOptions, Rates, UnitSpec, make_plan
from lightning_zinf.memory.planner import plan as plan_module
from lightning_zinf.memory.planner.speeds import SHARES, WORTH, Speeds, best_rings, may_choose, with_speeds
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.monitor.trace import Event, Trace

TILE = 2**18


def plan(units: int = 12, room: float = 0.5, **options: Any) -> Plan:
    """Plan a model of which a budget has room for a part of the planes."""
    spec = tuple(UnitSpec(f"u{i}", (BufferSpec.of([2**20], "bf16-mixed"),), block=True) for i in range(units))
    given = PlanOptions(host_bytes=int(room * 14 * units * 2**20), tile_numel=TILE, **options)
    made = make_plan(ModelSpec("test", spec), Machine("m", 0, 2**33, 2**40, Rates(), aliased=True), given)
    assert made.problem is None
    return made


@settings(max_examples=20, deadline=None)
@given(
    compute=st.floats(1e-3, 10.0),
    update=st.floats(1e-4, 1.0),
    disk=st.floats(1e7, 1e10),
    room=st.floats(0.3, 0.9),
    accumulate=st.integers(1, 3),
)
def test_the_best_share_is_taken_if_it_saves_enough(
    compute: float, update: float, disk: float, room: float, accumulate: int
) -> None:
    """Against all shares; and whatever is chosen keeps planes and rings within the budget."""
    first = plan(8, room, accumulate=accumulate)
    now = with_speeds(first, Speeds(compute, update, disk, disk, disk))
    assert now.decision == first.decision
    assert now.prediction is not None
    found = best_rings(now)
    assert found.prediction is not None
    shares = [make_plan(now.model, now.machine, now.options, rings=share) for share in SHARES]
    fastest = min(p.prediction.seconds for p in shares if p.prediction is not None and p.problem is None)
    if fastest < WORTH * now.prediction.seconds:
        assert found.prediction.seconds == fastest
    else:
        assert found is now
    in_memory = sum(n for _, _, tier, n in found.residency() if tier != "nvme")
    rings = found.decision.slots + found.decision.tiles.nbytes
    budget = found.options.host_bytes
    assert budget is not None
    assert in_memory + rings + found.size.gradients <= budget


def test_a_slow_disk_has_planes_take_the_place_of_rings() -> None:
    """Where the disk is slow more planes stay; where compute is, everything is as it was."""
    first = plan(room=0.8)
    slow = best_rings(with_speeds(first, Speeds(0.6, 0.06, 3e7, 3e7, 3e7)))
    assert slow.decision.rings < first.decision.rings
    assert slow.decision.on_nvme < first.decision.on_nvme
    fast = with_speeds(first, Speeds(0.6, 0.06, 3e9, 3e9, 3e9))
    assert best_rings(fast) is fast


@pytest.mark.parametrize(
    "options",
    [{"host_bytes": None}, {"offload_params": "nvme", "offload_optimizer": "nvme"}, {"host_bytes": 2**32}],
    ids=["no budget", "the user's choice", "all fits"],
)
def test_there_is_nothing_to_choose(options: dict[str, Any]) -> None:
    first = plan()
    other = make_plan(first.model, first.machine, replace(first.options, **options))
    assert may_choose(first)
    assert not may_choose(other)
    known = with_speeds(other, Speeds(0.6, 0.06, 3e7, 3e7, 3e7))
    assert best_rings(known) is known


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_when_updates_run_is_no_matter_of_speed(
    recompute: bool, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the disk, leaving one of three units to the next forward is within 5 % of the best share."""
    spec = tuple(UnitSpec(f"u{i}", (BufferSpec.of([2**18], "bf16-mixed"),), block=True) for i in range(12))
    nvme = PlanOptions(offload_params="nvme", offload_optimizer="nvme", recompute=recompute, accumulate=accumulate)
    first = make_plan(ModelSpec("test", spec), Machine("m", 0, 2**30, 2**40, Rates(), aliased=True), nvme)
    for disk in (1e7, 3e7, 1e8, 2e8, 4e8, 8e8, 2e9):
        times = {}
        for share in (1, 2, 3, 4, 6, 12):
            monkeypatch.setattr(plan_module, "LEFT_TO_FORWARD", share)
            prediction = with_speeds(first, Speeds(0.2, 0.02, disk, disk, disk)).prediction
            assert prediction is not None
            times[share] = prediction.seconds
        assert times[3] <= 1.05 * min(times.values())


def test_measured_seconds_are_those_of_the_prediction() -> None:
    found = with_speeds(plan(accumulate=2), Speeds(0.8, 0.1, 1e9, 1e9, 1e9))
    assert found.prediction is not None
    moved = found.traffic.nvme_read + found.traffic.nvme_write
    assert found.prediction.busy["cpu"] == pytest.approx(0.9)
    assert 0 < found.prediction.busy["nvme"] <= 1.000001 * moved / 1e9  # what slots still have is not read again


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10))))
def test_length_of_spans(pairs: list[tuple[int, int]]) -> None:
    spans = [(begin, begin + long) for begin, long in pairs]
    assert length(spans) == len({moment for begin, end in spans for moment in range(begin, end)})


def test_speeds_of_a_trace() -> None:
    """A second of two steps: reads and writes that overlap, an update that waits, and compute in what is left."""
    second = 10**9
    events = [
        Event("nvme_read", "a", 400, 0, second // 4),
        Event("nvme_read", "b", 400, second // 8, second // 2),  # half a second of reads in all
        Event("nvme_write", "a", 300, second // 4, second // 2),
        Event("update", "a", 0, second // 4, second // 2),
        Event("wait", "read", 0, second // 4, 3 * second // 8),  # within the update
        Event("wait", "read", 0, 3 * second // 4, second),
        Event("nvme_read", "late", 999, second // 2, None),  # under way still
    ]
    found = speeds_of(events, 0, second, steps=2)
    assert found.nvme_read == pytest.approx(1600)
    assert found.nvme_write == pytest.approx(1200)
    assert found.nvme_mixed == pytest.approx(2200)
    assert found.update_seconds == pytest.approx(1 / 16)
    assert found.compute_seconds == pytest.approx(1 / 4)
    assert speeds_of([], 0, second, 1) == Speeds(1.0, 0.0)
    # An evaluation that runs the second half of the update: only that it is no compute differs.
    evaluations = [(3 * second // 8, 5 * second // 8)]
    assert speeds_of(events, 0, second, 2, evaluations) == replace(found, compute_seconds=pytest.approx(3 / 16))


def test_the_probe_records_some_steps_and_leaves() -> None:
    counters = Counters()
    probe = SpeedProbe(counters)
    for _ in range(WARM_UP):
        assert probe.between_steps() is None
        assert counters.trace is None
    for _ in range(STEPS):
        assert probe.between_steps() is None
        assert counters.trace is not None
        assert not probe.due
    assert probe.between_steps() is not None
    assert probe.due
    assert counters.trace is None


@pytest.mark.parametrize("steps", range(WARM_UP + STEPS))
def test_a_probe_that_is_stopped_leaves_nothing(steps: int) -> None:
    counters = Counters()
    probe = SpeedProbe(counters)
    for _ in range(steps):
        probe.between_steps()
    probe.stop()
    assert counters.trace is None


@pytest.mark.parametrize("before", range(WARM_UP + STEPS))
def test_the_trace_of_somebody_else_is_left_alone(before: int) -> None:
    counters, mine = Counters(), Trace()
    probe = SpeedProbe(counters)
    for number in range(WARM_UP + STEPS + 1):
        if number == before:
            counters.trace = mine
        assert probe.between_steps() is None
    assert probe.due
    assert counters.trace is mine
