"""The flat buffers of one rank, and the least that has to move if only part of their planes stay in memory.

Note [A closed form]
~~~~~~~~~~~~~~~~~~~~
A dense optimizer step changes every byte of state, so a byte that is not in memory is read once and written once a
step: 2 bytes moved for each byte not held. A weight is read for every gather (2 a micro-batch) and written once: 3
bytes for each byte not held, more with accumulation; what is frozen is only read. So the best use of a byte of memory
is known beforehand: weights first, then state, whatever the model. A static set is as good as any cache, since every
step uses everything once in a fixed order. (Section 3.1 of the notes on physical limits; ZeRO-Infinity caches nothing.)

Buffers are not divisible, so a choice of whole ones can fall short of this bound by less than the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_zinf.config import Tier
from lightning_zinf.memory.placement import ModelSize
from lightning_zinf.memory.planner.model import BufferSpec, ModelSpec

REDUCE_BYTES = 256 * 2**20
"""Most bytes of gradients under way to other ranks, unless a few units have more; small models take less."""


@dataclass(frozen=True)
class Resident:
    """A flat buffer of a unit, and where it rests on a rank.

    Attributes:
        unit: Number of the unit.
        spec: The buffer.
        elements: Elements of the whole buffer, padding included.
        shard: Elements of this rank's shard, padding included.
        weights: Tier of the weight plane.
        state: Tier of the other planes.
        gathers: Gathers of a micro-batch.
    """

    unit: int
    spec: BufferSpec
    elements: int
    shard: int
    weights: Tier
    state: Tier
    gathers: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of this rank's shard of the weight plane."""
        return self.shard * self.spec.weight_bytes

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole weight plane."""
        return self.elements * self.spec.weight_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of this rank's shard of the other planes."""
        return self.shard * self.spec.state_bytes

    @property
    def offloaded(self) -> bool:
        """Whether updates wait for the weights to be used, or for the end of backward at the earliest."""
        return self.weights != "device" or self.state == "nvme"

    def planes(self) -> Iterator[tuple[str, Tier, int]]:
        """Yield ``(plane, tier, bytes)`` of this rank's shard."""
        yield "weight", self.weights, self.weight_bytes
        for name, width in self.spec.planes:
            yield name, self.state, self.shard * width


@dataclass(frozen=True)
class Sizes:
    """Elements of every buffer on one rank, before anything is placed."""

    buffers: tuple[Resident, ...]
    world_size: int
    stage: int

    @classmethod
    def of(cls, model: ModelSpec, world_size: int, stage: int) -> Sizes:
        """Cut a model over ranks."""
        seen: dict[BufferSpec, int] = {}  # equal blocks are many
        buffers = []
        for index, unit in enumerate(model.units):
            for spec in unit.buffers:
                if spec not in seen:
                    seen[spec] = spec.padded(world_size)
                elements = seen[spec]
                shard = elements // world_size
                buffers.append(Resident(index, spec, elements, shard, "device", "device", unit.gathers))
        return cls(tuple(buffers), world_size, stage)

    def summary(self, model: ModelSpec) -> ModelSize:
        """Return the totals that the rule for whole models goes by."""
        weights = sum(b.weight_bytes if self.stage == 3 else b.whole_bytes for b in self.buffers)
        gradients = sum(self._gradients(b) for b in self.buffers if b.spec.learns)
        whole = [0] * len(model.units)
        for b in self.buffers:
            whole[b.unit] += b.whole_bytes
        root = sum(n for n, unit in zip(whole, model.units, strict=True) if unit.name == "")
        state = sum(b.state_bytes for b in self.buffers)
        return ModelSize(weights, state, gradients, max(whole, default=0), root, sum(whole))

    def _gradients(self, buffer: Resident) -> int:
        """Return the bytes of a buffer's gradients before an update: float32 shards where there are several ranks."""
        shards = buffer.weight_bytes if self.world_size == 1 else 4 * buffer.shard
        return shards + (buffer.whole_bytes if self.stage == 1 and self.world_size > 1 else 0)

    def on(self, params: Sequence[Tier], optimizer: Sequence[Tier]) -> tuple[Resident, ...]:
        """Return every buffer with the tiers of its unit; the low halves of what is frozen rest with it."""
        return tuple(
            replace(b, weights=params[b.unit], state=optimizer[b.unit] if b.spec.learns else params[b.unit])
            for b in self.buffers
        )


def moved_per_byte(buffer: Resident, accumulate: int) -> tuple[float, float]:
    """Return the bytes that a step moves for each byte of weights, and of state, that is not in memory."""
    return buffer.gathers * accumulate + buffer.spec.learns, 2.0 if buffer.spec.learns else 0.0


def least_moved(buffers: Sequence[Resident], room: int, accumulate: int = 1) -> float:
    """Return a lower bound of the bytes that a step moves to and from NVMe if ``room`` bytes of planes stay in memory.

    The bound is what divisible planes would reach: memory is filled in order of the bytes moved for each byte.
    """
    pieces = []
    for buffer in buffers:
        weights, state = moved_per_byte(buffer, accumulate)
        pieces += [(weights, buffer.weight_bytes), (state, buffer.state_bytes)]
    moved = 0.0
    for rate, nbytes in sorted(pieces, reverse=True):
        held = min(nbytes, room)
        room -= held
        moved += rate * (nbytes - held)
    return moved


def held_in_memory(buffers: Sequence[Resident]) -> int:
    """Return the bytes of planes that do not rest on NVMe."""
    return sum(nbytes for b in buffers for _, tier, nbytes in b.planes() if tier != "nvme")


def reduce_bytes(largest_unit: int, whole: int) -> int:
    """Return the budget for gradients under way to other ranks, of weights of that many bytes."""
    return min(REDUCE_BYTES, max(4 * largest_unit, whole // 4))


def under_way(buffers: Sequence[Resident], size: ModelSize, world_size: int, *, aliased: bool) -> int:
    """Return the bytes of gradients that are on the device between autograd and where they are kept.

    With several ranks: a unit's as autograd leaves them, and what is sent and what arrives of as many as may be under
    way. With one: a unit's on the way to host memory, if they go there.
    """
    by_unit: dict[int, int] = {}
    for buffer in buffers:
        if buffer.spec.learns:
            by_unit[buffer.unit] = by_unit.get(buffer.unit, 0) + buffer.whole_bytes
    learning, biggest = sum(by_unit.values()), max(by_unit.values(), default=0)
    if world_size > 1:
        assert size.whole is not None
        return biggest + min(2 * learning, max(2 * biggest, reduce_bytes(size.largest_unit, size.whole)))
    return biggest if not aliased and any(b.state != "device" for b in buffers) else 0


def largest_gradients(buffers: Sequence[Resident], *, sums: bool = False) -> int:
    """Return the bytes of the gradients of the unit that has the most, as autograd leaves them.

    Args:
        buffers: All buffers.
        sums: Add the float32 sums of a unit that is updated in the last backward of several.
    """
    by_unit: dict[int, int] = {}
    for buffer in buffers:
        if buffer.spec.learns:
            nbytes = buffer.whole_bytes + (4 * buffer.elements if sums else 0)
            by_unit[buffer.unit] = by_unit.get(buffer.unit, 0) + nbytes
    return max(by_unit.values(), default=0)


def staging_of_gradients(buffers: Sequence[Resident]) -> int:
    """Return the bytes for one buffer's gradients and their float32 sum, on the way to NVMe or back."""
    return max((b.whole_bytes + 4 * b.elements for b in buffers if b.spec.learns), default=0)
