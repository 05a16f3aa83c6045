"""The closed form of residency against brute force, and what plans promise whatever the model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_zinf.config import Tier
from lightning_zinf.memory.planner import BufferSpec, Machine, ModelSpec, PlanOptions, Rates, UnitSpec, make_plan
from lightning_zinf.memory.planner.model import WEIGHT_BYTES
from lightning_zinf.memory.planner.residency import SLOWER, Resident, Sizes, fill, least_moved, moved_per_byte
from lightning_zinf.memory.planner.traffic import step_traffic

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


def brute_force(sizes: Sizes, room: int, accumulate: int) -> float:
    """The least bytes over NVMe of every way to keep planes in memory."""
    costs = []
    for b in sizes.buffers:
        weights, state = moved_per_byte(b, accumulate)
        if not b.spec.learns:
            costs.append((b.weight_bytes + b.state_bytes, weights * b.weight_bytes))
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
    small,
    st.sampled_from(PRECISIONS),
    st.integers(0, 3_000_000),
    st.sampled_from([1, 3]),
    st.sets(st.integers(0, 3)),
)
def test_closed_form_against_brute_force(
    numels: list[int], precision: str, room: int, accumulate: int, frozen: set[int]
) -> None:
    spec = model(numels, precision, frozen)
    sizes = Sizes.of(spec, 1, 3)
    buffers = fill(sizes, {"host": room}, accumulate)
    held = sum(n for b in buffers for _, tier, n in b.planes() if tier != "nvme")
    best, found = brute_force(sizes, room, accumulate), on_nvme(buffers, accumulate)
    assert held <= room
    assert least_moved(sizes, room, accumulate) <= best + 1e-6
    rates = [moved_per_byte(b, accumulate) for b in sizes.buffers]
    largest = max(max(b.weight_bytes * w, b.state_bytes * s) for b, (w, s) in zip(sizes.buffers, rates, strict=True))
    assert best - 1e-6 <= found <= best + largest


@given(
    st.integers(1, 12), st.integers(1, 20), st.sampled_from(PRECISIONS), st.floats(0, 1.2), st.sampled_from([1, 2, 4])
)
def test_equal_units_are_packed_as_well_as_can_be(
    units: int, pages: int, precision: str, share: float, accumulate: int
) -> None:
    """With planes of one size there is no waste: the closed form, rounded down to planes, is the optimum."""
    sizes = Sizes.of(model([4096 * pages] * units, precision), 1, 3)
    weight, state = sizes.buffers[0].weight_bytes, sizes.buffers[0].state_bytes
    room = int(share * units * (weight + state))
    first = min(units, room // weight)
    second = min(units, (room - first * weight) // state) if first == units else 0
    second = max(second, min(units, (room - first * weight) // state))
    rates = moved_per_byte(sizes.buffers[0], accumulate)
    expected = (units - first) * weight * rates[0] + (units - second) * state * rates[1]
    assert on_nvme(fill(sizes, {"host": room}, accumulate), accumulate) == pytest.approx(expected)


@given(small, st.integers(0, 2_000_000), st.integers(0, 2_000_000))
def test_three_tiers_hold_what_they_can(numels: list[int], device: int, host: int) -> None:
    room: dict[Tier, int] = {"device": device, "host": host}
    buffers = fill(Sizes.of(model(numels, "bf16-mixed"), 1, 3), room)
    for tier, most in room.items():
        assert sum(n for b in buffers for _, t, n in b.planes() if t == tier) <= most
    for b in buffers:
        assert SLOWER[b.state] >= SLOWER[b.weights]  # the update of a device's share runs there


@settings(deadline=None, max_examples=30)
@given(small, st.sampled_from(PRECISIONS), st.sampled_from([1, 2, 8]), st.sampled_from([1, 2, 3]))
def test_every_plane_is_somewhere_once(numels: list[int], precision: Any, world: int, stage: int) -> None:
    spec = model(numels, precision)
    machine = Machine("m", 2**40, 2**40, 2**40, Rates(), ranks_per_node=world)
    for per_unit in (False, True):
        plan = make_plan(spec, machine, PlanOptions(stage=stage, per_unit=per_unit, fill=1.0))
        assert plan.fits
        state = sum(n for _, plane, _, n in plan.residency() if plane != "weight")
        padded = sum(b.padded(world) for u in spec.units for b in u.buffers)
        width = {"32-true": 8, "bf16-mixed": 10, "16-mixed": 12}[precision]
        assert state * world == width * padded
        shares = sum(n for _, plane, _, n in plan.residency() if plane == "weight")
        assert shares * world == WEIGHT_BYTES[precision] * padded


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1000, 200_000), min_size=2, max_size=5), st.integers(0, 8_000_000))
def test_per_unit_residency_is_never_worse(numels: list[int], memory: int) -> None:
    """Placing plane by plane moves no more than one tier for all, with the same memory."""
    spec = model(numels, "bf16-mixed")
    machine = Machine("m", 0, memory, 2**40, Rates(), aliased=True)
    whole = make_plan(spec, machine, PlanOptions())
    each = make_plan(spec, machine, PlanOptions(per_unit=True, update="deferred"))
    if whole.placement is not None and whole.placement.optimizer == "nvme" and whole.placement.params == "nvme":
        assert on_nvme(each.buffers, 1) <= on_nvme(whole.buffers, 1)
