"""Where the elements of a plane lie, for somebody who reads them while they stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_zinf.memory.nvme import Extent

PIECE_NUMEL = 1 << 20
"""Elements of a piece in memory, at most."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a plane, in memory or on NVMe.

    Attributes:
        plane: Name of the plane.
        start: First element in this rank's shard.
        numel: How many.
        dtype: Their dtype.
        memory: Where they are in memory, of any device; or None.
        extent: Where they are on NVMe; or None.
        offset: First byte in the extent.
    """

    plane: str
    start: int
    numel: int
    dtype: torch.dtype
    memory: Tensor | None = None
    extent: Extent | None = None
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * self.dtype.itemsize


def cut_memory(plane: str, whole: Tensor) -> Iterable[Piece]:
    """Return the pieces of a plane that is in memory."""
    for start in range(0, whole.numel(), PIECE_NUMEL):
        part = whole[start : start + PIECE_NUMEL]
        yield Piece(plane, start, part.numel(), whole.dtype, memory=part)


def cut_extent(plane: str, extent: Extent, numel: int, dtype: torch.dtype) -> Iterable[Piece]:
    """Return the pieces of a plane that has an extent of its own."""
    for start in range(0, numel, PIECE_NUMEL):
        count = min(PIECE_NUMEL, numel - start)
        yield Piece(plane, start, count, dtype, extent=extent, offset=start * dtype.itemsize)
