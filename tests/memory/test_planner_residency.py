"""The closed form of residency against brute force, and what plans promise whatever the model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_zinf.engine import early
from lightning_zinf.memory.placement import COMFORT, Placement
from lightning_zinf.memory.planner import BufferSpec, Machine, ModelSpec, PlanOptions, Rates, Sizes, UnitSpec, make_plan
from lightning_zinf.memory.planner import plan as plan_module
from lightning_zinf.memory.planner.model import WEIGHT_BYTES
from lightning_zinf.memory.planner.residency import Resident, least_moved, moved_per_byte
from lightning_zinf.memory.planner.traffic import step_traffic
from lightning_zinf.memory.residency import UnitSize, keep_in_memory

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]


def model(numels: list[int], precision: Any, frozen: set[int] = frozenset()) -> ModelSpec:  # type: ignore[assignment]
    units = [
        UnitSpec(f"u{i}", (BufferSpec.of([n], precision, learns=i not in frozen),), gathers=1 if i in frozen else 2)
        for i, n in enumerate(numels)
    ]
    return ModelSpec("test", tuple(units))


def on_nvme(buffers: tuple[Resident, ...], accumulate: int) -> float:
    moved = step_traffic(buffers, aliased=True, world_size=1, stage=3, accumulate=accumulate)
    return moved.nvme_read + moved.nvme_write


def chosen(sizes: Sizes, room: int) -> tuple[Resident, ...]:
    """What the engine keeps in ``room`` bytes, everything else being on NVMe."""
    units = [UnitSize(b.weight_bytes, b.state_bytes if b.spec.learns else 0) for b in sizes.buffers]
    found = keep_in_memory(units, Placement("nvme", "nvme"), "auto", "auto", room, cpu=True)
    return sizes.on(found.params, found.optimizer)


def brute_force(sizes: Sizes, room: int, accumulate: int) -> float:
    """The least bytes over NVMe of every way to keep planes in memory."""
    costs = []
    for b in sizes.buffers:
        weights, state = moved_per_byte(b, accumulate)
        if not b.spec.learns:  # its low halves rest with it
            costs.append((b.weight_bytes, weights * b.weight_bytes))
            continue
        costs.append((b.weight_bytes, weights * b.weight_bytes))
        costs.append((b.state_bytes, state * b.state_bytes))
    return min(
        sum(cost for (_, cost), held in zip(costs, keep, strict=True) if not held)
        for keep in itertools.product((False, True), repeat=len(costs))
        if sum(n for (n, _), held in zip(costs, keep, strict=True) if held) <= room
    )


small = st.lists(st.integers(1, 60000), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(
    small, st.sampled_from(PRECISIONS), st.integers(0, 3_000_000), st.sampled_from([1, 3]), st.sets(st.integers(0, 3))
)
def test_bound_and_choice_against_brute_force(
    numels: list[int], precision: str, room: int, accumulate: int, frozen: set[int]
) -> None:
    """The closed form is below the best choice of all, and what the engine chooses less than one buffer above it."""
    spec = model(numels, precision, frozen)
    sizes = Sizes.of(spec, 1, 3)
    buffers = chosen(sizes, room)
    best, found = brute_force(sizes, room, accumulate), on_nvme(buffers, accumulate)
    rates = [moved_per_byte(b, accumulate) for b in sizes.buffers]
    assert least_moved(sizes.buffers, room, accumulate) <= best + 1e-6
    assert best - 1e-6 <= found
    if frozen:
        return  # what is frozen is read less often, which the engine's order of weights before state does not go by
    largest = max(max(b.weight_bytes * w, b.state_bytes * s) for b, (w, s) in zip(sizes.buffers, rates, strict=True))
    assert found <= best + largest


@given(
    st.integers(1, 12), st.integers(1, 20), st.sampled_from(PRECISIONS), st.floats(0, 1.2), st.sampled_from([1, 2, 4])
)
def test_equal_units_are_packed_as_well_as_can_be(
    units: int, pages: int, precision: str, share: float, accumulate: int
) -> None:
    """With planes of one size there is no waste: the closed form, rounded down to planes."""
    sizes = Sizes.of(model([4096 * pages] * units, precision), 1, 3)
    weight, state = sizes.buffers[0].weight_bytes, sizes.buffers[0].state_bytes
    room = int(share * units * (weight + state))
    first = min(units, room // weight)
    second = min(units, (room - first * weight) // state)
    rates = moved_per_byte(sizes.buffers[0], accumulate)
    expected = (units - first) * weight * rates[0] + (units - second) * state * rates[1]
    assert on_nvme(chosen(sizes, room), accumulate) == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(small, st.sampled_from(PRECISIONS), st.sampled_from([1, 2, 8]), st.sampled_from([1, 2, 3]))
def test_every_plane_is_somewhere_once(numels: list[int], precision: Any, world: int, stage: int) -> None:
    spec = model(numels, precision)
    machine = Machine("m", 2**40, 2**40, 2**40, Rates(), ranks_per_node=world)
    plan = make_plan(spec, machine, PlanOptions(stage=stage))
    assert plan.fits
    state = sum(n for _, plane, _, n in plan.residency() if plane != "weight")
    padded = sum(b.padded(world) for u in spec.units for b in u.buffers)
    width = {"32-true": 8, "bf16-mixed": 10, "16-mixed": 12}[precision]
    assert state * world == width * padded
    shares = sum(n for _, plane, _, n in plan.residency() if plane == "weight")
    assert shares * world == WEIGHT_BYTES[precision] * padded


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1000, 200_000), min_size=2, max_size=5),
    st.integers(0, 8_000_000),
    st.sampled_from([None, 200_000, 1_000_000]),
    st.booleans(),
)
def test_what_auto_takes_is_within_the_memory(
    numels: list[int], memory: int, budget: int | None, aliased: bool
) -> None:
    """A plan that is not refused keeps its planes within the room, and no more on disk than it has to."""
    spec = model(numels, "bf16-mixed")
    machine = Machine("m", memory, memory, 2**40, Rates(), aliased=aliased)
    plan = make_plan(spec, machine, PlanOptions(host_bytes=budget))
    if plan.problem is not None:
        assert "memory" in plan.problem
        assert not plan.fits
        return
    gradients = sum(b.weight_bytes for b in plan.decision.buffers)
    on_host = [n for _, _, tier, n in plan.residency() if tier == "host" or (aliased and tier == "device")]
    room = int(COMFORT * memory) if budget is None else min(budget, memory)
    assert not on_host or sum(on_host) + gradients <= room
    assert plan.nvme_least <= on_nvme(plan.decision.buffers, 1)


def test_planner_and_engine_leave_the_same_units_to_forward() -> None:
    assert plan_module.LEFT_TO_FORWARD == early.LEFT_TO_FORWARD


def test_when_updates_run() -> None:
    spec = model([5000] * 4, "bf16-mixed")
    alone = Machine("m", 0, 2**30, 2**40, Rates(), aliased=True)

    def when(options: PlanOptions, machine: Machine = alone, of: ModelSpec = spec) -> list[str]:
        plan = make_plan(of, machine, options)
        return [plan_module.update_of(plan, i) for i in range(4)]

    assert when(PlanOptions()) == ["after"] * 4
    assert when(PlanOptions("nvme", "nvme")) == ["deferred", "backward", "backward", "deferred"]
    assert when(PlanOptions("nvme", "nvme", clip=True)) == ["deferred"] * 4
    assert when(PlanOptions("nvme", "nvme", update="after")) == ["after"] * 4
    assert when(PlanOptions("nvme", "nvme"), of=model([5000] * 4, "16-mixed")) == ["deferred"] * 4
    two = Machine("m", 0, 2**30, 2**40, Rates(), 2, aliased=True)
    assert when(PlanOptions(), two) == ["deferred", "backward", "backward", "deferred"]
    assert when(PlanOptions(clip=True), two) == ["deferred"] * 4
    assert when(PlanOptions("none", "nvme", stage=2), two) == ["deferred", "backward", "backward", "deferred"]
    assert when(PlanOptions("none", "nvme", stage=1), two) == ["deferred"] * 4
