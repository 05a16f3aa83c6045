"""Pure arithmetic of flat buffers: where each parameter lies, how the buffer is padded and cut.

Note [Flat buffers]
~~~~~~~~~~~~~~~~~~~
A unit's parameters of one kind lie in one contiguous buffer. Every parameter starts at a multiple of 256 bytes of the
compute dtype (vector kernels and compiled graphs want aligned inputs), and the whole is padded so that every rank's
shard is a multiple of 4096 bytes in the narrowest plane (direct I/O wants aligned lengths). Offsets are counted in
elements and are the same in every plane (weight, residual, exp_avg, exp_avg_sq), so one table of segments serves all.

Nothing here touches torch.distributed or a file: the checkpoint tools use the same arithmetic offline.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PARAMETER_ALIGNMENT = 256
"""Bytes: each parameter of a flat buffer starts at a multiple of this."""
SHARD_ALIGNMENT = 4096
"""Bytes: each rank's shard of each plane is a multiple of this."""


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Part:
    """Some of a parameter's elements: ``count`` runs of ``length`` of them, whose starts are ``stride`` apart.

    So a block of a matrix is a part, and whole rows are one run. Elements of the parameter are counted row-major;
    elements of the part in the same order.

    Attributes:
        first: The first element.
        length: Elements of a run.
        stride: From the start of a run to that of the next one, at least ``length``.
        count: Number of runs.
    """

    first: int
    length: int
    stride: int
    count: int

    @classmethod
    def whole(cls, numel: int) -> Part:
        """Return all of a parameter of ``numel`` elements."""
        return cls(0, numel, max(numel, 1), 1)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.length * self.count

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield ``(first element in the parameter, numel)`` for the part's own elements ``[start, stop)``."""
        while start < stop:
            row, inside = divmod(start, self.length)
            numel = min(self.length - inside, stop - start)
            yield self.first + row * self.stride + inside, numel
            start += numel

    def locate(self, element: int) -> tuple[int, int] | None:
        """Return the place in the part of an element of the parameter, and how many follow in its run; None if none."""
        row, inside = divmod(element - self.first, self.stride)
        if not 0 <= row < self.count or inside >= self.length:
            return None
        return row * self.length + inside, self.length - inside


@dataclass(frozen=True)
class FlatLayout:
    """Where each parameter of a flat buffer lies.

    Attributes:
        shapes: Shape of each parameter, in order.
        offsets: First element of each parameter in the flat buffer.
        numels: Number of elements of each parameter.
        padded_numel: Elements of the whole buffer, padding included.
        world_size: Number of equal shards that the buffer is cut into.
    """

    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    numels: tuple[int, ...]
    padded_numel: int
    world_size: int = 1

    @classmethod
    def build(cls, shapes: Sequence[Sequence[int]], itemsize: int, world_size: int = 1) -> FlatLayout:
        """Lay parameters out one after the other.

        Args:
            shapes: Shape of each parameter.
            itemsize: Bytes of one element in the narrowest plane of the buffer.
            world_size: Number of ranks that share the buffer.

        Raises:
            ValueError: If ``itemsize`` or ``world_size`` is not a positive number.
        """
        if itemsize <= 0 or world_size <= 0:
            raise ValueError(f"itemsize and world_size must be positive, got {itemsize} and {world_size}")
        step = PARAMETER_ALIGNMENT // math.gcd(PARAMETER_ALIGNMENT, itemsize)
        offsets: list[int] = []
        numels: list[int] = []
        end = 0
        for shape in shapes:
            start = round_up(end, step)
            offsets.append(start)
            numels.append(math.prod(shape))
            end = start + numels[-1]
        shard = SHARD_ALIGNMENT // math.gcd(SHARD_ALIGNMENT, itemsize)
        padded = max(round_up(end, shard * world_size), shard * world_size)
        return cls(tuple(tuple(s) for s in shapes), tuple(offsets), tuple(numels), padded, world_size)

    @property
    def numel(self) -> int:
        """Elements of the parameters alone, without padding."""
        return sum(self.numels)

    @property
    def shard_numel(self) -> int:
        """Elements of one rank's shard, padding included."""
        return self.padded_numel // self.world_size

    def shard_range(self, rank: int) -> tuple[int, int]:
        """Return the half-open range of elements that ``rank`` owns."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {rank}")
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def overlaps(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """Cut the range ``[start, stop)`` along the parameters.

        Returns:
            One ``(index, parameter_start, flat_start, numel)`` per parameter that the range touches: ``numel`` elements
            from element ``parameter_start`` of parameter ``index`` lie at ``flat_start`` of the buffer.
        """
        cuts: list[tuple[int, int, int, int]] = []
        for index, (offset, numel) in enumerate(zip(self.offsets, self.numels, strict=True)):
            low, high = max(start, offset), min(stop, offset + numel)
            if low < high:
                cuts.append((index, low - offset, low, high - low))
        return cuts


def tile_ranges(numel: int, tile_numel: int) -> list[tuple[int, int]]:
    """Cut ``numel`` elements into consecutive half-open ranges of ``tile_numel``, the last one shorter."""
    if tile_numel <= 0:
        raise ValueError(f"tile_numel must be positive, got {tile_numel}")
    return [(start, min(start + tile_numel, numel)) for start in range(0, numel, tile_numel)]
