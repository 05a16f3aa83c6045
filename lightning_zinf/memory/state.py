"""Where the planes beside the weights live: the low half of the master (or all of it), and the optimizer's state.

Note [State records]
~~~~~~~~~~~~~~~~~~~~
The update is elementwise, so it never needs a whole unit's state at once: state on NVMe is cut into tiles, and all
planes of a tile lie together, ``[residual | exp_avg | exp_avg_sq]`` for Adam. One read brings a tile, one write takes
it back, and the memory for staging is a few tiles, whatever the size of the largest unit. New planes are zeros, which
is what a preallocated file reads as, so nothing is written for them at the start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_zinf.layout import tile_ranges
from lightning_zinf.memory.nvme import Extent, NvmeStore
from lightning_zinf.memory.pieces import Piece, cut_memory
from lightning_zinf.memory.slots import Ticket, wait_all
from lightning_zinf.memory.tiles import Tile, TileRing
from lightning_zinf.monitor.counters import Counters

LOW_PLANES = ("residual", "master")
"""Planes that make masters of the weights: the low halves of bfloat16 ones, all of float16 ones."""


def plane_dtype(plane: str) -> torch.dtype:
    """Return the dtype of a plane by its name."""
    return torch.int16 if plane == "residual" else torch.float32


def bytes_per_element(planes: Iterable[str]) -> int:
    """Return the bytes that one element takes in all of these planes."""
    return sum(plane_dtype(p).itemsize for p in planes)


def _ordered(planes: Iterable[str]) -> tuple[str, ...]:
    """Return planes in the order of a record: low ones first, so that the order does not depend on who asked first."""
    return tuple(sorted(set(planes), key=lambda p: (p not in LOW_PLANES, p)))


@dataclass(frozen=True)
class Record:
    """The planes of a range of elements, ready to be updated in place.

    Attributes:
        start: First element of the range in the flat buffer.
        stop: End of the range.
        planes: One tensor of ``stop - start`` elements per plane.
    """

    start: int
    stop: int
    planes: dict[str, Tensor]


class ResidentState:
    """State that stays in memory, on the host or on the accelerator.

    Args:
        numel: Elements of the flat buffer, padding included.
        planes: The planes to keep.
        allocate: Makes a zeroed ``uint8`` tensor of that many bytes.
    """

    offloaded = False

    def __init__(self, numel: int, planes: tuple[str, ...], allocate: Callable[[int], Tensor]) -> None:
        self.numel = numel
        self._allocate = allocate
        self._planes: dict[str, Tensor] = {}
        self.add_planes(planes)

    @property
    def planes(self) -> tuple[str, ...]:
        """The planes that are kept."""
        return tuple(self._planes)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(t.nbytes for t in self._planes.values())

    def add_planes(self, planes: tuple[str, ...]) -> None:
        """Keep these planes too, zeroed; those that are kept already stay as they are."""
        for plane in planes:
            if plane not in self._planes:
                dtype = plane_dtype(plane)
                self._planes[plane] = self._allocate(self.numel * dtype.itemsize).view(dtype)

    def prefetch(self) -> None:
        """Nothing to fetch."""

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yield every record from element ``start`` on, to be updated in place."""
        if start < self.numel:
            yield Record(0, self.numel, self._planes)

    def read(self, plane: str) -> Tensor:
        """Return a plane: the thing itself, not a copy."""
        return self._planes[plane]

    def pieces(self, plane: str) -> Iterable[Piece]:
        """Return where a plane lies."""
        return cut_memory(plane, self._planes[plane])

    def under_way(self) -> list[Ticket]:
        """Return the writes that whoever reads pieces has to wait for: none."""
        return []

    def write(self, plane: str, value: Tensor) -> None:
        """Replace the content of a plane."""
        if value.data_ptr() != self._planes[plane].data_ptr():
            self._planes[plane].copy_(value)


class NvmeState:
    """State on NVMe, cut into tiles; see Note [State records].

    Args:
        numel: Elements of the flat buffer, padding included.
        planes: The planes to keep.
        store: Where the records lie.
        ring: Staging for tiles.
        counters: Where stalls are counted.
        name: Whose state, for traces.
    """

    offloaded = True

    def __init__(
        self,
        numel: int,
        planes: tuple[str, ...],
        store: NvmeStore,
        ring: TileRing,
        counters: Counters,
        name: str = "state",
    ) -> None:
        self.numel = numel
        self._store = store
        self._ring = ring
        self._counters = counters
        self._name = name
        self._set_planes(planes)

    @staticmethod
    def bytes_needed(numel: int, planes: tuple[str, ...]) -> int:
        """Return the bytes that ``planes`` of ``numel`` elements take."""
        return numel * bytes_per_element(planes)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return self.bytes_needed(self.numel, self.planes)

    @property
    def num_tiles(self) -> int:
        """Number of tiles that the state is cut into."""
        return len(self._ranges)

    def _set_planes(self, planes: tuple[str, ...], *, again: bool = False) -> None:
        planes = _ordered(planes)
        width = bytes_per_element(planes)
        ranges = tile_ranges(self.numel, self._ring.numel_of(width))
        allocate = functools.partial(self._store.allocate, again=True) if again else self._store.allocate
        extent: Extent = allocate(self.numel * width, self._name)
        self.planes, self._width, self._ranges, self._extent = planes, width, ranges, extent

    def add_planes(self, planes: tuple[str, ...]) -> None:
        """Keep these planes too, zeroed; the content of the others is carried over.

        Where they were is given back, so nobody may still read the pieces that were there.
        """
        new = tuple(p for p in planes if p not in self.planes)
        if not new:
            return
        kept, before = {p: self.read(p) for p in self.planes}, self._extent
        self._set_planes(self.planes + new, again=True)
        for plane, value in kept.items():
            self.write(plane, value)
        if self._extent.again:
            for plane in new:
                self.write(plane, torch.zeros(self.numel, dtype=plane_dtype(plane)))
        self._store.release(before)

    def cut_anew(self) -> None:
        """Have records as long as the staging ring's tiles are now; takes memory for all planes meanwhile."""
        ranges = tile_ranges(self.numel, self._ring.numel_of(self._width))
        if ranges == self._ranges:
            return
        kept = {plane: self.read(plane) for plane in self.planes}
        self._ranges = ranges
        for plane, value in kept.items():
            self.write(plane, value)

    def prefetch(self) -> None:
        """Start to read as many tiles as the staging ring has room for."""
        self._ring.want(self)

    def start_read(self, index: int, tile: Tile) -> None:
        """Start to read tile ``index`` into ``tile``."""
        start, stop = self._ranges[index]
        staging = tile.memory[: (stop - start) * self._width]
        tile.ticket = self._store.read(self._extent, staging, start * self._width)

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yield every record from element ``start`` on in staging, to be updated in place.

        Each is written back when the next is asked for.
        """
        first = start
        self._ring.want(self)
        for index, (start, stop) in enumerate(self._ranges):
            if stop <= first:
                continue
            tile = self._ring.take(self, index)
            try:
                with self._counters.timed("stall_read_seconds"):
                    tile.wait()
                yield Record(start, stop, self._planes_of(tile, stop - start))
            except BaseException:
                self._ring.drop(tile)
                raise
            staging = tile.memory[: (stop - start) * self._width]
            self._ring.write_back(tile, self._store.write(self._extent, staging, start * self._width))

    def _planes_of(self, tile: Tile, numel: int) -> dict[str, Tensor]:
        planes: dict[str, Tensor] = {}
        offset = 0
        for plane in self.planes:
            dtype = plane_dtype(plane)
            planes[plane] = tile.memory[offset : offset + numel * dtype.itemsize].view(dtype)
            offset += numel * dtype.itemsize
        return planes

    @contextmanager
    def _pieces(self, plane: str, whole: Tensor) -> Iterator[list[tuple[Tensor, int]]]:
        before = bytes_per_element(self.planes[: self.planes.index(plane)])
        self._ring.drain()
        yield [(whole[start:stop], start * self._width + (stop - start) * before) for start, stop in self._ranges]

    def read(self, plane: str) -> Tensor:
        """Read a whole plane into new memory."""
        whole = torch.empty(self.numel, dtype=plane_dtype(plane))
        with self._pieces(plane, whole) as pieces:
            tickets = [self._store.read(self._extent, piece, offset) for piece, offset in pieces]
        with self._counters.timed("stall_read_seconds"):
            wait_all(tickets)
        return whole

    def pieces(self, plane: str) -> Iterable[Piece]:
        """Return where a plane lies, tile by tile."""
        before, dtype = bytes_per_element(self.planes[: self.planes.index(plane)]), plane_dtype(plane)
        for start, stop in self._ranges:
            offset = start * self._width + (stop - start) * before
            yield Piece(plane, start, stop - start, dtype, extent=self._extent, offset=offset)

    def under_way(self) -> list[Ticket]:
        """Return the writes that whoever reads pieces has to wait for."""
        return self._ring.writes_of(self)

    def write(self, plane: str, value: Tensor) -> None:
        """Replace the content of a whole plane."""
        with self._pieces(plane, value.cpu().contiguous()) as pieces:
            tickets = [self._store.write(self._extent, piece, offset) for piece, offset in pieces]
        with self._counters.timed("stall_write_seconds"):
            wait_all(tickets)


State = ResidentState | NvmeState
