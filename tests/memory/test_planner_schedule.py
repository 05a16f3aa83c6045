"""The simulation of the schedule: order, budgets, deadlocks, and bounds that hold whatever the sizes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_zinf.memory.planner import Machine, PlanOptions, Rates, Shape, make_plan, model_of
from lightning_zinf.memory.planner.events import DeadlockError, Task, simulate
from lightning_zinf.memory.planner.plan import schedule_of
from lightning_zinf.memory.planner.schedule import Schedule, Setting, UnitLoad, predict, run
from lightning_zinf.memory.planner.traffic import Traffic


def test_a_chain_overlaps_with_itself() -> None:
    """Three reads of 2 s and three computations of 3 s: the first read is not hidden, the rest are."""
    tasks = []
    for i in range(3):
        tasks.append(Task(f"read {i}", "read", 2.0))
        tasks.append(Task(f"compute {i}", "compute", 3.0, [2 * i]))
    timeline = simulate(tasks)
    assert timeline.seconds == 2 + 3 * 3
    assert timeline.start == [0, 2, 2, 5, 4, 8]


def test_a_server_takes_turns_in_the_order_of_issue() -> None:
    tasks = [Task("w", "write", 1.0), Task("r", "read", 1.0), Task("w2", "write", 1.0)]
    assert simulate(tasks, {"read": "disk", "write": "disk"}).end == [1.0, 2.0, 3.0]
    assert simulate(tasks).end == [1.0, 1.0, 2.0]


def test_a_pool_holds_back_what_does_not_fit() -> None:
    tasks = []
    for i in range(4):
        tasks.append(Task(f"read {i}", "read", 1.0, takes={"slots": 10}))
        tasks.append(Task(f"compute {i}", "compute", 5.0, [2 * i], gives={"slots": 10}))
    timeline = simulate(tasks, pools={"slots": 20})
    assert timeline.peak == {"slots": 20}
    assert [timeline.start[2 * i] for i in range(4)] == [0, 1, 6, 11]


def test_a_deadlock_is_named() -> None:
    tasks = [
        Task("a", "read", 1.0, takes={"slots": 8}),
        Task("b", "read", 1.0, takes={"slots": 8}),
        Task("use a and b", "compute", 1.0, [0, 1], gives={"slots": 16}),
    ]
    with pytest.raises(DeadlockError, match=r"read: b waits for 8 bytes of slots \(2 left\); compute: use a and b"):
        simulate(tasks, pools={"slots": 10})
    with pytest.raises(ValueError, match="takes 8 bytes of slots, which has 7"):
        simulate(tasks, pools={"slots": 7})


def loads(units: int, when: Any, nbytes: int = 100) -> list[UnitLoad]:
    return [
        UnitLoad(
            f"u{i}",
            gather=Traffic(nvme_read=nbytes, host_to_device=nbytes, all_gather=nbytes),
            gradient=Traffic(device_to_host=nbytes, reduce_scatter=nbytes),
            update=Traffic(nvme_read=5 * nbytes, nvme_write=6 * nbytes),
            forward_seconds=1.0,
            backward_seconds=2.0,
            update_seconds=0.5,
            when=when,
            slot_bytes=nbytes,
            tile_bytes=5 * nbytes,
        )
        for i in range(units)
    ]


SLOW_DISK = Rates(nvme_read=50.0, nvme_write=50.0, host_to_device=400.0, device_to_host=400.0, gather=400.0)


@pytest.mark.parametrize("when", ["after", "deferred", "backward"])
@pytest.mark.parametrize(("slots", "tiles"), [(100, 1), (200, 500), (450, 1200), (10**6, 10**6)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_no_deadlock_and_no_budget_exceeded_under_random_delays(
    when: Any, slots: int, tiles: int, accumulate: int
) -> None:
    rng = random.Random(7)
    setting = Setting(SLOW_DISK, {"compute": "device", "update": "host"}, slots, tiles, accumulate)
    schedule = Schedule(loads(5, when), setting)
    tasks = schedule.build(3)
    for _ in range(20):
        timeline = simulate(tasks, pools=schedule.pools(), delay=lambda _task: rng.choice([0.0, 0.0, rng.random() * 9]))
        assert all(timeline.peak[p] <= n for p, n in schedule.pools().items())
        for index, task in enumerate(tasks):
            assert all(timeline.start[index] >= timeline.end[before] for before in task.after)


def test_where_the_update_runs_is_where_it_hides() -> None:
    """After backward: F + B + U; deferred into forward: B + max(F, U); in backward: F + max(B, U).

    With F = 20, B = 10 and U = 20 seconds, and up to two for the first read and the last write of a unit. In backward,
    state that may be read ahead under forward leaves max(F + B, U).
    """
    units = 10
    plain = [
        UnitLoad(
            f"u{i}",
            update=Traffic(nvme_read=10, nvme_write=10),
            forward_seconds=2.0,
            backward_seconds=1.0,
            when="after",
            tile_bytes=10,
        )
        for i in range(units)
    ]
    rates = Rates(nvme_read=10.0, nvme_write=10.0)
    setting = Setting(rates, {"nvme_read": "disk", "nvme_write": "disk"}, tiles=1000)
    deferred = [UnitLoad(**{**vars(u), "when": "deferred"}) for u in plain]
    backward = [UnitLoad(**{**vars(u), "when": "backward"}) for u in plain]
    after = predict(plain, setting).seconds
    assert after == pytest.approx(30 + 20)
    assert predict(deferred, setting).seconds == pytest.approx(10 + 20, abs=2)
    assert predict(backward, setting).seconds == pytest.approx(30, abs=1e-6)
    little = Setting(rates, setting.servers, tiles=20)
    assert predict(backward, little).seconds == pytest.approx(20 + 20, abs=2)
    assert predict(plain, setting).busy == {"compute": pytest.approx(30), "disk": pytest.approx(20), "update": 0}


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.sampled_from(["after", "deferred", "backward"]),
    st.integers(1, 4),
    st.integers(100, 900),
    st.booleans(),
)
def test_a_step_lies_between_its_bounds(units: int, when: Any, accumulate: int, slots: int, one_disk: bool) -> None:
    """No faster than its busiest server, no slower than one task at a time."""
    servers = {"nvme_read": "disk", "nvme_write": "disk"} if one_disk else {}
    setting = Setting(SLOW_DISK, servers, slots, 700, accumulate)
    found = predict(loads(units, when), setting)
    alone = predict(loads(units, when), Setting(SLOW_DISK, servers, slots, 700, accumulate, overlap=False))
    assert found.bound - 1e-9 <= found.seconds <= alone.seconds + 1e-9
    assert alone.seconds == pytest.approx(sum(alone.busy.values()))


def test_more_memory_is_never_slower() -> None:
    times = [predict(loads(6, "deferred"), Setting(SLOW_DISK, slots=s, tiles=s)).seconds for s in (100, 300, 700, 5000)]
    assert times == sorted(times, reverse=True)


def test_weights_that_are_still_there_are_not_read_again() -> None:
    _, timeline = run(loads(4, "after"), Setting(SLOW_DISK, slots=10**6, tiles=10**6))
    schedule = Schedule(loads(4, "after"), Setting(SLOW_DISK, slots=10**6, tiles=10**6))
    tasks = schedule.build(3)
    weights = [t for t in tasks if t.stage == "nvme_read" and "update" not in t.name]
    assert len(weights) == 4  # once, at the very beginning
    assert len(timeline.end) == len(tasks)


def test_plans_name_what_binds() -> None:
    model = model_of(Shape(layers=8, hidden=512, heads=8, vocab=256, seq=64), "bf16-mixed")
    disk = Machine(
        "slow disk", 0, 2**34, 2**40, Rates(flops=1e12, adam=1e11, nvme_read=1e8, nvme_write=1e8), aliased=True
    )
    plan = make_plan(model, disk, PlanOptions("nvme", "nvme"))
    assert plan.prediction is not None
    assert plan.prediction.binding == "nvme_read"
    assert plan.prediction.seconds >= plan.prediction.bound
    slow = Machine(
        "slow cpu", 0, 2**34, 2**40, Rates(flops=1e9, adam=1e11, nvme_read=1e9, nvme_write=1e9), aliased=True
    )
    compute = make_plan(model, slow, PlanOptions("nvme", "nvme", batch=4)).prediction
    assert compute is not None
    assert compute.binding == "cpu"
    assert compute.busy["cpu"] == pytest.approx(3 * model.flops * 4 / 1e9 + 26 * model.numel / 1e11, rel=1e-2)
    loads_, setting = schedule_of(plan)
    assert len(loads_) == len(model.units)
    assert setting.servers["update"] == setting.servers["compute"] == "cpu"


@pytest.mark.parametrize(("offload", "aliased"), [("none", False), ("cpu", False), ("nvme", False), ("nvme", True)])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_go_where_they_wait_and_come_back(offload: Any, aliased: bool, recompute: bool) -> None:
    shape = Shape(layers=4, hidden=64, heads=2, vocab=0, seq=16)
    model = model_of(shape, "bf16-mixed")
    rates = Rates(flops=1e9, nvme_read=1e6, nvme_write=1e6, host_to_device=1e6, device_to_host=1e6)
    machine = Machine("m", 2**30, 2**34, 2**40, rates, aliased=aliased)
    options = PlanOptions("none", "none", batch=3, accumulate=2, recompute=recompute, offload_activations=offload)
    plan = make_plan(model, machine, options)
    kept = 3 * 4 * (64 * 16 * 2 if recompute else next(u.saved_bytes for u in model.units if u.block))
    name = "inputs of recomputed units" if recompute else "activations"
    tier = {"none": "device", "cpu": "host", "nvme": "nvme"}[offload]
    assert [(i.tier, i.nbytes) for i in plan.items if i.what == name] == [(tier, kept)]
    moved = plan.traffic
    assert moved.nvme_read == moved.nvme_write == (2 * kept if offload == "nvme" else 0)
    assert moved.host_to_device == moved.device_to_host == (0 if aliased or offload == "none" else 2 * kept)
    stays = make_plan(model, machine, PlanOptions("none", "none", batch=3, accumulate=2, recompute=recompute))
    assert plan.prediction is not None
    assert stays.prediction is not None
    assert plan.prediction.seconds >= stays.prediction.seconds
    for link in ("host_to_device", "device_to_host", "nvme_read", "nvme_write"):
        assert plan.prediction.busy.get(link, 0.0) == pytest.approx(getattr(moved, link) / 1e6)
