"""Which units stay in memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_zinf.memory.placement import Placement
from lightning_zinf.memory.residency import Residency, UnitSize, keep_in_memory

ALL_NVME = Placement("nvme", "nvme")
SIZES = st.lists(st.builds(UnitSize, st.integers(1, 50), st.integers(1, 250)), min_size=1, max_size=12)


def keep(units: list[UnitSize], room: int) -> Residency:
    return keep_in_memory(units, ALL_NVME, "auto", "auto", room, cpu=True)


def taken(units: list[UnitSize], found: Residency) -> tuple[int, int]:
    weights = sum(u.weights for u, tier in zip(units, found.params, strict=True) if tier == "device")
    return weights, sum(u.state for u, tier in zip(units, found.optimizer, strict=True) if tier == "device")


@given(SIZES, st.integers(-10, 4000))
def test_never_more_than_there_is_room_for_and_weights_first(units: list[UnitSize], room: int) -> None:
    found = keep(units, room)
    weights, state = taken(units, found)
    assert weights + state <= max(room, 0)
    left = room - weights
    for unit, tier in zip(units, found.params, strict=True):
        assert tier == "device" or unit.weights > left
    for unit, tier in zip(units, found.optimizer, strict=True):
        assert tier == "device" or unit.state > left - state


@given(st.integers(1, 40), st.integers(0, 40))
def test_what_stays_is_spread_evenly(count: int, stays: int) -> None:
    stays = min(stays, count)
    found = keep_in_memory([UnitSize(1, 5)] * count, ALL_NVME, "auto", "nvme", stays, cpu=True).params
    assert found.count("device") == stays
    for start in range(count):  # a stretch of n units has its share, within what halving can do
        for stop in range(start + 1, count + 1):
            share = stays * (stop - start) / count
            assert abs(found[start:stop].count("device") - share) <= 1 + (count - 1).bit_length() / 2 + 1


def test_the_root_comes_first() -> None:
    units = [UnitSize(4, 20), UnitSize(4, 20), UnitSize(4, 20, root=True)]
    assert keep(units, 4) == Residency(("nvme", "nvme", "device"), ("nvme", "nvme", "nvme"))
    assert keep(units, 12 + 20) == Residency(("device",) * 3, ("nvme", "nvme", "device"))


@pytest.mark.parametrize(("cpu", "memory"), [(True, "device"), (False, "host")])
def test_what_the_user_says_is_done(cpu: bool, memory: str) -> None:
    units = [UnitSize(1, 5)] * 3
    for params, optimizer in (("auto", "nvme"), ("nvme", "auto"), ("nvme", "nvme")):
        found = keep_in_memory(units, ALL_NVME, params, optimizer, 1000, cpu=cpu)  # type: ignore[arg-type]
        assert found.params == ((memory if params == "auto" else "nvme"),) * 3
        assert found.optimizer == ((memory if optimizer == "auto" else "nvme"),) * 3
    mixed = keep_in_memory(units, Placement("host", "nvme"), "auto", "auto", 5, cpu=cpu)
    assert mixed.params == ("host",) * 3
    assert sorted(mixed.optimizer) == sorted((memory, "nvme", "nvme"))


@given(SIZES, st.integers(0, 2000), st.integers(0, 2000), st.sampled_from(["device", "host", "nvme"]))
def test_an_accelerator_keeps_what_it_has_room_for(units: list[UnitSize], host: int, device: int, params: str) -> None:
    where = Placement(params, "nvme")  # type: ignore[arg-type]
    found = keep_in_memory(units, where, "auto", "auto", host, cpu=False, device_room=device)
    on_device = on_host = 0
    for unit, weights, state in zip(units, found.params, found.optimizer, strict=True):
        on_device += unit.weights * (weights == "device" != params)
        on_device += (unit.state + unit.weights) * (state == "device")
        on_host += unit.weights * (weights == "host" != params) + unit.state * (state == "host")
        assert state != "device" or weights == "device"
    assert on_device <= device
    assert on_host <= host
