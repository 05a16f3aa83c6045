"""What goes where, and how much memory pages get."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_zinf.memory import machine
from lightning_zinf.memory.placement import COMFORT, ModelSize, Placement, place, room, slot_budget, tile_count

GIB = 2**30
MODEL = ModelSize(weights=2 * GIB, state=6 * GIB, gradients=2 * GIB, largest_unit=GIB // 4, root_unit=GIB // 8)
AMPLE = 1000 * GIB


def auto(size: ModelSize, device_free: int, host_free: int, *, cpu: bool) -> Placement:
    return place(size, "auto", "auto", device_room=device_free, host_room=host_free, cpu=cpu)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (10 * GIB, Placement("device", "device")),
        (10 * GIB - 1, Placement("device", "nvme")),
        (4 * GIB, Placement("device", "nvme")),
        (4 * GIB - 1, Placement("nvme", "nvme")),
        (0, Placement("nvme", "nvme")),
    ],
)
def test_on_a_cpu_what_does_not_fit_goes_to_disk(free: int, expected: Placement) -> None:
    assert auto(MODEL, free, free, cpu=True) == expected


@pytest.mark.parametrize(
    ("device_free", "host_free", "expected"),
    [
        (10 * GIB, 0, Placement("device", "device")),
        (10 * GIB - 1, 8 * GIB, Placement("device", "host")),
        (10 * GIB - 1, 8 * GIB - 1, Placement("device", "nvme")),
        (4 * GIB - 1, 10 * GIB, Placement("host", "host")),
        (4 * GIB - 1, 10 * GIB - 1, Placement("host", "nvme")),
        (4 * GIB - 1, 8 * GIB - 1, Placement("host", "nvme")),
        (4 * GIB - 1, 4 * GIB, Placement("host", "nvme")),
        (4 * GIB - 1, 4 * GIB - 1, Placement("nvme", "nvme")),
    ],
)
def test_on_an_accelerator_host_memory_comes_before_disk(device_free: int, host_free: int, expected: Placement) -> None:
    assert auto(MODEL, device_free, host_free, cpu=False) == expected


@pytest.mark.parametrize(("option", "tier"), [("none", "device"), ("cpu", "host"), ("nvme", "nvme")])
def test_what_the_user_says_is_done(option: str, tier: str) -> None:
    for free in (0, AMPLE):
        given_both = place(MODEL, option, option, device_room=free, host_room=free, cpu=True)  # type: ignore[arg-type]
        assert given_both == Placement(tier, tier)  # type: ignore[arg-type]


def test_weights_make_room_for_state_that_the_user_keeps_beside_them() -> None:
    placed = [
        place(MODEL, "auto", option, device_room=4 * GIB, host_room=AMPLE, cpu=False).params  # type: ignore[arg-type]
        for option in ("nvme", "cpu")
    ]
    assert placed == ["device", "device"]
    assert place(MODEL, "auto", "none", device_room=10 * GIB, host_room=AMPLE, cpu=False).params == "device"
    with pytest.raises(ValueError, match=r"the weights would rest in host memory \(.*they take 2.00 GiB, and 4.00 GiB"):
        place(MODEL, "auto", "none", device_room=4 * GIB, host_room=AMPLE, cpu=False)


def test_a_budget_is_what_may_be_taken_and_else_a_share_of_what_is_free() -> None:
    assert room(100, None) == int(COMFORT * 100)
    assert room(100, 90) == 90
    assert room(100, 110) == 100


@given(
    sizes=st.tuples(*[st.integers(0, 100)] * 3),
    device_free=st.integers(0, 400),
    host_free=st.integers(0, 400),
    cpu=st.booleans(),
)
def test_automatic_placement_never_takes_more_than_there_is(
    sizes: tuple[int, int, int], device_free: int, host_free: int, cpu: bool
) -> None:
    weights, state, gradients = sizes
    host_free = device_free if cpu else host_free
    placed = auto(ModelSize(weights, state, gradients, 0, 0), device_free, host_free, cpu=cpu)
    on_device = weights * (placed.params == "device") + state * (placed.optimizer == "device")
    on_host = weights * (placed.params == "host") + state * (placed.optimizer == "host")
    assert on_device <= device_free
    assert on_host <= host_free
    assert not (cpu and "host" in (placed.params, placed.optimizer))


def test_a_budget_that_is_asked_for_is_given() -> None:
    least = MODEL.largest_unit + MODEL.root_unit
    for asked in (least, least + 1, AMPLE):
        assert slot_budget(MODEL, asked, 0, "memory.host_bytes") == asked


def test_a_budget_too_small_is_refused_with_the_numbers() -> None:
    asked = MODEL.largest_unit + MODEL.root_unit - 1
    with pytest.raises(ValueError, match=r"needs 0\.38 GiB .* only 0\.37 GiB are allowed by memory\.host_bytes: allow"):
        slot_budget(MODEL, asked - GIB // 200, AMPLE, "memory.host_bytes")
    with pytest.raises(ValueError, match=r"memory\.host_bytes"):
        slot_budget(MODEL, asked, AMPLE, "memory.host_bytes")


def test_too_little_free_memory_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"needs 0\.38 GiB .* only 0\.25 GiB are free"):
        slot_budget(MODEL, None, GIB // 4, "memory.host_bytes")


def test_a_root_that_is_the_largest_unit_counts_once() -> None:
    size = replace(MODEL, root_unit=MODEL.largest_unit)
    assert slot_budget(size, MODEL.largest_unit, 0, "memory.host_bytes") == MODEL.largest_unit


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (AMPLE, 4 * MODEL.largest_unit + MODEL.root_unit),
        (4 * GIB, GIB),
        (GIB // 2, MODEL.largest_unit + MODEL.root_unit),
    ],
)
def test_by_default_a_few_units_within_a_quarter_of_what_is_free(free: int, expected: int) -> None:
    assert slot_budget(MODEL, None, free, "memory.host_bytes") == expected


def test_by_default_no_more_than_the_model_has() -> None:
    size = replace(MODEL, weights=MODEL.largest_unit * 2)
    assert slot_budget(size, None, AMPLE, "memory.host_bytes") == size.weights


@pytest.mark.parametrize(
    ("asked", "largest_state", "free", "expected"),
    [
        (None, 0, AMPLE, 4),
        (None, 100, AMPLE, 20),
        (None, 101, AMPLE, 21),
        (None, 100, 8 * 60, 6),
        (None, 100, 0, 2),
        (70, 100, AMPLE, 7),
        (5, 100, AMPLE, 2),
        (AMPLE, 100, 0, 20),
    ],
)
def test_tiles_hold_two_units_or_what_the_budget_allows_and_two_at_least(
    asked: int | None, largest_state: int, free: int, expected: int
) -> None:
    assert tile_count(asked, 10, largest_state, free) == expected


# ------------------------------------------------------------------ how much is free


def test_what_is_free_is_what_the_tightest_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_meminfo", lambda: 100)
    monkeypatch.setattr(machine, "_cgroup", lambda: [70])
    monkeypatch.setattr(machine, "_rlimit", lambda: [80])
    assert machine.free_host_bytes() == 70
    assert machine.free_device_bytes(torch.device("cpu")) == 70
    monkeypatch.setattr(machine, "_rlimit", lambda: [-5])
    assert machine.free_host_bytes() == 0


@pytest.mark.parametrize(
    ("limit", "expected"), [("5000\n", [4000]), ("max\n", []), (str(2**63 - 4096), []), ("nonsense", [])]
)
def test_a_control_group_leaves_its_limit_less_what_is_used(
    limit: str, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "limit").write_text(limit)
    (tmp_path / "used").write_text("1000\n")
    files = (str(tmp_path / "limit"), str(tmp_path / "used"))
    monkeypatch.setattr(machine, "_CGROUPS", ((str(tmp_path / "none"), str(tmp_path / "none")), files))
    assert machine._cgroup() == expected


def test_a_limit_on_the_data_segment_is_seen() -> None:
    resource = pytest.importorskip("resource")
    assert resource.RLIMIT_DATA
    code = """
import resource
from lightning_zinf.memory.machine import free_host_bytes
used = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmData:"))
resource.setrlimit(resource.RLIMIT_DATA, (used + 50 * 2**20, resource.RLIM_INFINITY))
before = free_host_bytes()
kept = bytearray(20 * 2**20)
print(before, before - free_host_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    free, less = map(int, done.stdout.split())
    assert 40 * 2**20 < free <= 50 * 2**20
    assert 19 * 2**20 <= less <= 22 * 2**20
