"""Staging for optimizer state on its way between NVMe and the update.

Note [Tiles]
~~~~~~~~~~~~
A tile is free, or being read ahead, or in use by the update, or being written back. Tiles are read ahead in the order
in which the update will want them, one state after the other. If that order turns out different and every tile is taken
by reads of somebody else, the one that was wanted last is dropped: it is clean, so nothing is lost but a read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_zinf.memory.slots import Ticket
from lightning_zinf.monitor.counters import Counters

if TYPE_CHECKING:
    from lightning_zinf.memory.state import NvmeState


_TILE_ALIGNMENT = 2048
"""Elements: so many of any plane are a multiple of 4096 bytes, which direct I/O asks for."""


class Tile:
    """One piece of staging memory."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.ticket: Ticket | None = None
        self.key: tuple[int, int] | None = None

    def wait(self) -> None:
        """Wait for what is under way in this tile."""
        ticket, self.ticket = self.ticket, None
        if ticket is not None:
            ticket.wait()


class TileRing:
    """A fixed number of tiles.

    Args:
        count: Number of tiles; at least 2, so that one can be read while another is updated.
        tile_numel: Elements a tile has room for.
        width: Bytes of all planes of one element.
        allocate: Makes a ``uint8`` tensor of that many bytes, aligned for direct I/O.
        counters: Where stalls are counted.
    """

    def __init__(
        self, count: int, tile_numel: int, width: int, allocate: Callable[[int], Tensor], counters: Counters
    ) -> None:
        assert count >= 2, count
        self._counters = counters
        self._allocate = allocate
        self._free: list[Tile] = []
        self._ahead: dict[tuple[int, int], Tile] = {}
        self._queue: list[tuple[NvmeState, int]] = []
        self._writing: list[Tile] = []
        self._make(count, tile_numel, width)

    def _make(self, count: int, tile_numel: int, width: int) -> None:
        self.tile_numel = tile_numel
        self.nbytes = count * tile_numel * width
        self._count = count
        self._tile_bytes = tile_numel * width
        self._free = [Tile(self._allocate(self._tile_bytes)) for _ in range(count)]

    def resize(self, count: int, tile_numel: int, width: int) -> None:
        """Have other tiles; state that was cut for the old ones has to be cut anew before it is used.

        Args:
            count: Number of tiles.
            tile_numel: Elements a tile has room for.
            width: Bytes of all planes of one element.
        """
        if (count, tile_numel, tile_numel * width) == (self._count, self.tile_numel, self._tile_bytes):
            return
        self.drain()
        assert len(self._free) == self._count, "a tile is in use"
        self._free.clear()  # before others are allocated
        self._make(count, tile_numel, width)

    def numel_of(self, width: int) -> int:
        """Return how many elements of ``width`` bytes a tile is cut for.

        Raises:
            ValueError: If not even the fewest that a disk is asked for fit.
        """
        if width * self.tile_numel <= self._tile_bytes:
            return self.tile_numel
        numel = self._tile_bytes // width // _TILE_ALIGNMENT * _TILE_ALIGNMENT
        if not numel:
            raise ValueError(
                f"the optimizer keeps {width} bytes a parameter, but staging for state was made with "
                f"{self._tile_bytes} bytes a tile, and at least {_TILE_ALIGNMENT * width} are needed: allow more with "
                "memory.host_bytes, or larger tiles with io.tile_numel"
            )
        return numel

    def want(self, state: NvmeState) -> None:
        """Read the tiles of ``state`` ahead, after those of the states that were wanted before."""
        if all(wanted is not state for wanted, _ in self._queue) and (id(state), 0) not in self._ahead:
            self._queue.append((state, 0))
        self._pump()

    def take(self, state: NvmeState, index: int) -> Tile:
        """Return a tile with the content of ``index`` on its way; tiles are taken in order."""
        tile = self._ahead.pop((id(state), index), None)
        if tile is None:
            tile = self._get_free(block=True)
            if tile is None:  # all are ahead of their time
                self.drop(self._ahead.popitem()[1])
                tile = self._free.pop()
                self._sample()
            self._start(state, index, tile)
            self._queue = [entry for entry in self._queue if entry[0] is not state]
            self._queue.insert(0, (state, index + 1))
        self._pump()
        return tile

    def _pump(self) -> None:
        """Start reads in the order in which they were wanted, while tiles are free."""
        while self._queue:
            state, index = self._queue[0]
            if index >= state.num_tiles:
                self._queue.pop(0)
                continue
            if (id(state), index) in self._ahead:
                self._queue[0] = (state, index + 1)
                continue
            tile = self._get_free(block=False)
            if tile is None:
                return
            self._start(state, index, tile)
            self._ahead[(id(state), index)] = tile
            self._queue[0] = (state, index + 1)

    def write_back(self, tile: Tile, ticket: Ticket) -> None:
        """Give a tile back whose content is being written by ``ticket``."""
        tile.ticket = ticket
        self._writing.append(tile)

    def writes_of(self, state: NvmeState) -> list[Ticket]:
        """Return the writes of a state's tiles that may be under way."""
        return [t.ticket for t in self._writing if t.ticket is not None and t.key is not None and t.key[0] == id(state)]

    def drop(self, tile: Tile) -> None:
        """Give a tile back whose content is not wanted."""
        ticket, tile.ticket = tile.ticket, None
        if ticket is not None:
            _settle(ticket)
        self._free.append(tile)
        self._sample()

    def drain(self) -> None:
        """Wait for every write, and forget what was read ahead."""
        self._queue.clear()
        while self._ahead:
            self.drop(self._ahead.popitem()[1])
        while self._writing:
            self._finish_write(self._writing[0])

    def _start(self, state: NvmeState, index: int, tile: Tile) -> None:
        tile.key = (id(state), index)
        try:
            for other in [t for t in self._writing if t.key == tile.key]:  # never read past a write under way
                self._finish_write(other)
            state.start_read(index, tile)
        except BaseException:
            self._free.append(tile)
            raise

    def _get_free(self, *, block: bool) -> Tile | None:
        for tile in [t for t in self._writing if t.ticket is None or t.ticket.done()]:
            self._finish_write(tile)
        if not self._free and self._writing and block:
            with self._counters.timed("stall_write_seconds"):
                self._finish_write(self._writing[0])
        if not self._free:
            return None
        tile = self._free.pop()
        self._sample()
        return tile

    def _sample(self) -> None:
        if (trace := self._counters.trace) is not None:
            trace.level("tiles", (self._count - len(self._free)) * self._tile_bytes, self.nbytes, self.nbytes)

    def _finish_write(self, tile: Tile) -> None:
        self._writing.remove(tile)
        self._free.append(tile)
        self._sample()
        tile.wait()


def _settle(ticket: Ticket) -> None:
    """Wait for a request whose outcome no longer matters."""
    with contextlib.suppress(OSError):
        ticket.wait()
