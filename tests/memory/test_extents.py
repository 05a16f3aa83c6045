"""Room on NVMe that comes and goes: pieces never overlap, and what comes back is joined."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_zinf.config import IOConfig
from lightning_zinf.layout import SHARD_ALIGNMENT, round_up
from lightning_zinf.memory.extents import ExtentHeap, Room
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.monitor.counters import Counters

CHUNK = 8 * SHARD_ALIGNMENT


class Chunks:
    """Stands for a store: sizes are all that the heap asks for."""

    def allocate(self, nbytes: int, what: str) -> int:
        return nbytes


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12 * SHARD_ALIGNMENT)), max_size=60))
def test_pieces_never_overlap_and_all_of_it_comes_back(actions: list[tuple[bool, int]]) -> None:
    heap, held = ExtentHeap(Chunks(), CHUNK), []  # type: ignore[arg-type]
    for take, number in actions:
        if take or not held:
            room = heap.allocate(number)
            assert room.nbytes == round_up(max(number, 1), SHARD_ALIGNMENT)
            assert room.offset % SHARD_ALIGNMENT == 0
            assert room.offset + room.nbytes <= int(heap.extent(room))  # type: ignore[call-overload]
            for other in held:
                apart = room.offset >= other.offset + other.nbytes or other.offset >= room.offset + room.nbytes
                assert room.chunk != other.chunk or apart
            held.append(room)
        else:
            heap.release(held.pop(number % len(held)))
        assert heap.used_bytes == sum(r.nbytes for r in held)
    for room in held:
        heap.release(room)
    sizes: list[int] = heap.chunks  # type: ignore[assignment]
    assert heap._free == [Room(i, 0, size) for i, size in enumerate(sizes)]
    assert heap.reserved_bytes == sum(sizes)


def test_a_second_round_reserves_nothing(tmp_path: Path) -> None:
    store = NvmeStore(tmp_path, IOConfig(threads=1, backend="threads"), Counters())
    heap = ExtentHeap(store, CHUNK)
    for _ in range(3):
        rooms = [heap.allocate(n * SHARD_ALIGNMENT) for n in (3, 5, 9, 1)]
        for room in rooms:
            heap.release(room)
        assert store.allocated_bytes == heap.reserved_bytes == (8 + 9 + 9) * SHARD_ALIGNMENT  # half of 17 is 9
    store.close()


def test_a_full_disk_is_said_to_be_full_of_activations() -> None:
    class Full:
        def allocate(self, nbytes: int, what: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "here")

    heap = ExtentHeap(Full())  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No space") as caught:
        heap.allocate(5)
    notes = getattr(caught.value, "__notes__", ["activation_checkpointing=True"])
    assert any("activation_checkpointing=True" in note for note in notes)
    assert heap.used_bytes == heap.reserved_bytes == 0
