"""State on NVMe is what state in memory is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_zinf.config import IOConfig
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.memory.state import NvmeState, ResidentState, State, plane_dtype
from lightning_zinf.memory.tiles import TileRing
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.ops import host_empty

MOMENTS: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
ALL: tuple[str, ...] = ("residual", *MOMENTS)
TILE = 4096


@contextmanager
def ring_and_store(count: int = 2) -> Iterator[tuple[TileRing, NvmeStore, Counters]]:
    counters = Counters()
    with tempfile.TemporaryDirectory() as folder:
        store = NvmeStore(Path(folder), IOConfig(threads=2, backend="threads"), counters)
        ring = TileRing(count, TILE, 10, host_empty, counters)
        try:
            yield ring, store, counters
        finally:
            ring.drain()
            store.close()


def scale(state: State, factor: int) -> None:
    """Change every plane in place, by record, as an update does."""
    for record in state.records():
        for number, plane in enumerate(ALL):
            if plane in record.planes:
                assert len(record.planes[plane]) == record.stop - record.start
                where = torch.arange(record.start, record.stop) % 97
                record.planes[plane].mul_(factor).add_((where + number).to(record.planes[plane].dtype))


def assert_equal(ours: State, theirs: State) -> None:
    assert set(ours.planes) == set(theirs.planes)
    assert ours.nbytes == theirs.nbytes
    for plane in ours.planes:
        found = ours.read(plane)
        assert found.dtype == plane_dtype(plane)
        assert torch.equal(found, theirs.read(plane)), plane


OPERATIONS = st.one_of(
    st.tuples(st.just("scale"), st.integers(1, 3)),
    st.tuples(st.just("write"), st.integers(0, 100)),
    st.tuples(st.just("prefetch"), st.just(0)),
    st.tuples(st.just("add"), st.integers(1, 7)),
    st.tuples(st.just("compare"), st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(
    numels=st.lists(st.integers(1, 4).map(lambda n: n * 3072), min_size=1, max_size=3),
    planes=st.sampled_from([("residual",), MOMENTS, ALL]),
    count=st.integers(2, 5),
    steps=st.lists(st.tuples(st.integers(0, 2), OPERATIONS), max_size=20),
)
def test_state_on_disk_equals_state_in_memory(
    numels: list[int], planes: tuple[str, ...], count: int, steps: list[tuple[int, tuple[str, int]]]
) -> None:
    with ring_and_store(count) as (ring, store, counters):
        pairs = [(NvmeState(n, planes, store, ring, counters), ResidentState(n, planes, host_empty)) for n in numels]
        for which, (what, number) in steps:
            pair = pairs[which % len(pairs)]
            for state in pair:
                if what == "scale":
                    scale(state, number)
                elif what == "write":
                    plane = pair[0].planes[number % len(pair[0].planes)]
                    values = (torch.arange(state.numel) + number).to(plane_dtype(plane))
                    state.write(plane, values)
                elif what == "prefetch":
                    state.prefetch()
                elif what == "add":
                    state.add_planes(tuple(p for bit, p in enumerate(ALL) if number >> bit & 1))
            if what == "compare":
                assert_equal(*pair)
        for pair in pairs:
            assert_equal(*pair)


@pytest.mark.parametrize("on_disk", [True, False])
def test_more_planes_start_as_zeros_and_keep_the_others(on_disk: bool) -> None:
    with ring_and_store() as (ring, store, counters):
        numel = 3 * TILE - 1024
        state: State = (
            NvmeState(numel, ("residual",), store, ring, counters)
            if on_disk
            else ResidentState(numel, ("residual",), host_empty)
        )
        values = torch.randint(-(2**15), 2**15, (numel,), dtype=torch.int16)
        state.write("residual", values)
        state.prefetch()  # what was read ahead has the old form
        state.add_planes(MOMENTS)
        assert set(state.planes) == set(ALL)
        assert torch.equal(state.read("residual"), values)
        assert all(state.read(plane).eq(0).all() for plane in MOMENTS)
        scale(state, 1)
        state.add_planes(ALL)
        assert state.read("exp_avg").sum() > 0


def test_more_planes_take_the_room_that_others_have_left() -> None:
    with ring_and_store() as (ring, store, counters):
        store.reserve(10 * 2 * TILE)
        states = [NvmeState(TILE, ("residual",), store, ring, counters) for _ in range(10)]
        for number, state in enumerate(states):
            state.write("residual", torch.full((TILE,), number + 1, dtype=torch.int16))
        for state in states:
            state.add_planes(ALL)
        assert store.allocated_bytes == sum(state.nbytes for state in states) == 10 * 10 * TILE
        # Every five that have left are room for one: of the last five, one needs no new room.
        assert sum(file.size for volume in store.volumes for file in volume.files) == (10 * 2 + 9 * 10) * TILE
        for number, state in enumerate(states):
            assert state.read("residual").eq(number + 1).all()
            assert all(state.read(plane).eq(0).all() for plane in MOMENTS)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_read_right_after_an_update_sees_it(ahead: bool) -> None:
    with ring_and_store(4) as (ring, store, counters):
        state, other = (NvmeState(5 * TILE, MOMENTS, store, ring, counters) for _ in range(2))
        for step in range(1, 6):
            for record in state.records():
                record.planes["exp_avg"].fill_(step)
            if ahead:
                state.prefetch()
                other.prefetch()
            assert state.read("exp_avg").eq(step).all()
            assert state.read("exp_avg_sq").eq(0).all()


def test_an_update_right_after_a_write_sees_it() -> None:
    with ring_and_store() as (ring, store, counters):
        state = NvmeState(3 * TILE, MOMENTS, store, ring, counters)
        state.prefetch()
        state.write("exp_avg", torch.arange(3.0 * TILE))
        for record in state.records():
            assert torch.equal(record.planes["exp_avg"], torch.arange(float(record.start), float(record.stop)))


def test_every_byte_moves_once_in_an_update() -> None:
    with ring_and_store() as (ring, store, counters):
        state = NvmeState(3 * TILE - 1024, ALL, store, ring, counters)
        scale(state, 1)
        ring.drain()
        assert counters.nvme_read_bytes == counters.nvme_write_bytes == state.nbytes == (3 * TILE - 1024) * 10
        assert state.num_tiles == 3


def test_nothing_is_written_to_start_with() -> None:
    with ring_and_store() as (ring, store, counters):
        state = NvmeState(3 * TILE, ALL, store, ring, counters)
        assert counters.nvme_write_bytes == 0
        assert all(state.read(plane).eq(0).all() for plane in ALL)


def test_resident_state_is_read_and_changed_in_place() -> None:
    state = ResidentState(TILE, MOMENTS, host_empty)
    (record,) = state.records()
    assert (record.start, record.stop) == (0, TILE)
    record.planes["exp_avg"].fill_(3)
    assert state.read("exp_avg").data_ptr() == record.planes["exp_avg"].data_ptr()
    state.write("exp_avg", state.read("exp_avg"))
    assert state.read("exp_avg").eq(3).all()
