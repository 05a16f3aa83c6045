"""Tiles are read in the order in which they are wanted, and never past a write under way."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_zinf.memory.state import NvmeState
from lightning_zinf.memory.tiles import TileRing
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.ops import host_empty

TILE = 16
PLANES = ("exp_avg", "exp_avg_sq")


class Request:
    """A request that takes place when it is waited for, or by chance before."""

    def __init__(self, store: SlowStore, kind: str, start: int, tensor: Tensor) -> None:
        self.store, self.kind, self.start, self.tensor, self.over = store, kind, start, tensor.view(torch.uint8), False

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()

    def wait(self, timeout: float | None = None) -> int:
        if not self.over:
            self.over = True
            self.store.under_way.remove(self)
            disk = self.store.disk[self.start : self.stop]
            target, source = (self.tensor, disk) if self.kind == "read" else (disk, self.tensor)
            target.copy_(source)
        return self.tensor.numel()

    def done(self) -> bool:
        if not self.over and self.store.chance.random() < self.store.speed:
            self.wait()
        return self.over


class Piece:
    """An extent of the store."""

    def __init__(self, offset: int) -> None:
        self.offset = offset


class SlowStore:
    """A disk that takes its time, and refuses requests whose outcome would depend on the order they finish in."""

    def __init__(self, seed: int = 0, speed: float = 0.0) -> None:
        self.disk = torch.zeros(1 << 14, dtype=torch.uint8)
        self.chance, self.speed = random.Random(seed), speed
        self.under_way: list[Request] = []
        self.order: list[tuple[str, int]] = []
        self._end = 0

    def allocate(self, nbytes: int, name: str = "") -> Piece:
        self._end += nbytes
        return Piece(self._end - nbytes)

    def read(self, extent: Piece, tensor: Tensor, offset: int = 0) -> Request:
        return self._begin("read", extent.offset + offset, tensor)

    def write(self, extent: Piece, tensor: Tensor, offset: int = 0) -> Request:
        return self._begin("write", extent.offset + offset, tensor)

    def _begin(self, kind: str, start: int, tensor: Tensor) -> Request:
        request = Request(self, kind, start, tensor)
        memory = tensor.data_ptr()
        for other in self.under_way:
            on_disk = start < other.stop and other.start < request.stop
            assert not on_disk or kind == other.kind == "read", f"{kind} past a {other.kind} under way"
            there = other.tensor.data_ptr()
            shared = memory < there + other.tensor.numel() and there < memory + request.tensor.numel()
            assert not shared, "the memory of a request under way is used for another"
        self.under_way.append(request)
        self.order.append((kind, start))
        return request

    def reads(self) -> list[int]:
        return [start for kind, start in self.order if kind == "read"]


def make(count: int, *tiles: int, speed: float = 0.0, seed: int = 0) -> tuple[SlowStore, TileRing, list[NvmeState]]:
    store, counters = SlowStore(seed, speed), Counters()
    ring = TileRing(count, TILE, 8, host_empty, counters)
    states = [NvmeState(n * TILE, PLANES, store, ring, counters) for n in tiles]  # type: ignore[arg-type]
    return store, ring, states


def add_one(state: NvmeState) -> None:
    for record in state.records():
        record.planes["exp_avg"] += 1
        record.planes["exp_avg_sq"] += record.start


def starts(state: NvmeState) -> list[int]:
    return [state._extent.offset + start * 8 for start, _ in state._ranges]


def test_tiles_are_read_ahead_in_the_order_in_which_they_are_wanted() -> None:
    store, _, (a, b) = make(4, 2, 3)
    a.prefetch()
    b.prefetch()
    a.prefetch()  # wanted already
    assert store.reads() == starts(a) + starts(b)[:2]
    add_one(a)
    add_one(b)
    assert store.reads() == starts(a) + starts(b)


def test_reading_ahead_takes_no_more_than_the_tiles_there_are() -> None:
    store, ring, (a,) = make(2, 5)
    a.prefetch()
    assert len(store.reads()) == 2
    assert ring.nbytes == 2 * TILE * 8


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_an_update_reads_what_the_one_before_wrote(tiles: int) -> None:
    _, ring, (a,) = make(2, tiles)
    for _ in range(3):
        add_one(a)
        a.prefetch()
    ring.drain()
    assert a.read("exp_avg").eq(3).all()
    assert torch.equal(a.read("exp_avg_sq"), 3.0 * (torch.arange(tiles * TILE) // TILE * TILE))


def test_another_order_than_wanted_drops_the_farthest_and_loses_nothing() -> None:
    store, _, (a, b) = make(3, 3, 2)
    a.prefetch()  # takes every tile
    add_one(b)
    assert store.reads()[:4] == [*starts(a), starts(b)[0]]
    add_one(a)
    assert set(store.reads()) == {*starts(a), *starts(b)}
    assert store.reads().count(starts(a)[0]) == 1, "the tile that was wanted next was dropped"
    assert a.read("exp_avg").eq(1).all()
    assert b.read("exp_avg").eq(1).all()


def test_drain_waits_for_writes_and_forgets_reads() -> None:
    store, ring, (a, b) = make(4, 2, 2)
    add_one(a)
    b.prefetch()
    ring.drain()
    assert store.under_way == []
    assert len(ring._free) == 4
    before = len(store.reads())
    add_one(b)
    assert len(store.reads()) == before + 2


def test_an_exception_in_the_update_gives_the_tile_back_unwritten() -> None:
    store, ring, (a,) = make(2, 3)

    def fail(records: Iterator[object]) -> None:
        next(records)
        raise KeyboardInterrupt

    records = a.records()
    with pytest.raises(KeyboardInterrupt):
        fail(records)
    records.close()  # type: ignore[attr-defined]
    ring.drain()
    assert all(kind == "read" for kind, _ in store.order)
    assert len(ring._free) == 2
    add_one(a)
    assert a.read("exp_avg").eq(1).all()


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_failed_request_gives_its_tile_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, ring, (a,) = make(2, 3)
    with monkeypatch.context() as patch:
        original = getattr(SlowStore, kind)

        def request(self: SlowStore, extent: Piece, tensor: Tensor, offset: int = 0) -> Request:
            ticket: Request = original(self, extent, tensor, offset)
            monkeypatch.setattr(ticket, "wait", lambda timeout=None: refuse(ticket))
            return ticket

        def refuse(ticket: Request) -> int:
            if ticket in store.under_way:
                store.under_way.remove(ticket)
            raise OSError(5, "Input/output error")

        patch.setattr(SlowStore, kind, request)
        with pytest.raises(OSError, match="Input/output"):
            add_one(a)
        while True:
            try:
                ring.drain()
                break
            except OSError:
                pass
    assert len(ring._free) == 2
    add_one(a)


@settings(deadline=None)
@given(
    count=st.integers(2, 6),
    tiles=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    steps=st.lists(st.tuples(st.sampled_from(["update", "prefetch", "read", "drain"]), st.integers(0, 3)), max_size=40),
    speed=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 9),
)
def test_any_order_of_use_is_right(
    count: int, tiles: list[int], steps: list[tuple[str, int]], speed: float, seed: int
) -> None:
    _, ring, states = make(count, *tiles, speed=speed, seed=seed)
    updates = [0] * len(states)
    for what, number in steps:
        number %= len(states)
        if what == "update":
            add_one(states[number])
            updates[number] += 1
        elif what == "prefetch":
            states[number].prefetch()
        elif what == "read":
            assert states[number].read("exp_avg").eq(updates[number]).all()
        else:
            ring.drain()
    for state, expected in zip(states, updates, strict=True):
        assert state.read("exp_avg").eq(expected).all()
    assert len(ring._free) == count
