"""Room on NVMe that is taken and given back many times a step."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from lightning_zinf.layout import SHARD_ALIGNMENT, round_up
from lightning_zinf.memory.nvme import Extent, NvmeStore


@dataclass(frozen=True, order=True)
class Room:
    """A piece of a chunk.

    Attributes:
        chunk: Number of the chunk.
        offset: First byte in it, a multiple of 4096.
        nbytes: Size, a multiple of 4096.
    """

    chunk: int
    offset: int
    nbytes: int


class ExtentHeap:
    """Hands out pieces of preallocated extents, the first that fits, and joins neighbours that come back.

    When none fits, another extent is reserved: at least ``chunk_bytes``, and half of what there is, so that there are
    few of them however much is needed. Nothing shrinks before :meth:`NvmeStore.close`.

    Args:
        store: Where the extents are.
        chunk_bytes: Size of the first extent.
    """

    def __init__(self, store: NvmeStore, chunk_bytes: int = 64 * 2**20) -> None:
        self._store = store
        self._chunk_bytes = round_up(chunk_bytes, SHARD_ALIGNMENT)
        self._free: list[Room] = []  # by chunk and offset, no two of them adjacent
        self.chunks: list[Extent] = []
        self.reserved_bytes = 0
        self.used_bytes = 0

    def allocate(self, nbytes: int) -> Room:
        """Return room for ``nbytes``, rounded up to a multiple of 4096.

        Raises:
            OSError: If another extent is needed and the disk has no room for it.
        """
        nbytes = round_up(max(nbytes, 1), SHARD_ALIGNMENT)
        found = next((i for i, room in enumerate(self._free) if room.nbytes >= nbytes), None)
        if found is None:
            self._grow(nbytes)
            found = len(self._free) - 1
        room = self._free[found]
        if room.nbytes == nbytes:
            del self._free[found]
        else:
            self._free[found] = Room(room.chunk, room.offset + nbytes, room.nbytes - nbytes)
        self.used_bytes += nbytes
        return Room(room.chunk, room.offset, nbytes)

    def release(self, room: Room) -> None:
        """Take room back. Nothing may be under way there."""
        self.used_bytes -= room.nbytes
        at = bisect_left(self._free, room)
        if at < len(self._free) and _adjacent(room, self._free[at]):
            room = Room(room.chunk, room.offset, room.nbytes + self._free.pop(at).nbytes)
        if at and _adjacent(self._free[at - 1], room):
            before = self._free.pop(at - 1)
            room = Room(room.chunk, before.offset, before.nbytes + room.nbytes)
        insort(self._free, room)

    def extent(self, room: Room) -> Extent:
        """Return the extent that ``room.offset`` counts in."""
        return self.chunks[room.chunk]

    def _grow(self, nbytes: int) -> None:
        size = max(nbytes, self._chunk_bytes, round_up(self.reserved_bytes // 2, SHARD_ALIGNMENT))
        try:
            extent = self._store.allocate(size, "activations")
        except OSError as error:
            if hasattr(error, "add_note"):
                error.add_note(
                    f"The room was for activations (offload_activations='nvme'), which take "
                    f"{self.used_bytes / 2**30:.2f} GiB already: activation_checkpointing=True, a smaller batch or "
                    "offload_activations='none' need less."
                )
            raise
        self.reserved_bytes += size
        self.chunks.append(extent)
        insort(self._free, Room(len(self.chunks) - 1, 0, size))


def _adjacent(first: Room, second: Room) -> bool:
    return first.chunk == second.chunk and first.offset + first.nbytes == second.offset
