"""Which plane of which unit rests on which tier.

Note [A closed form]
~~~~~~~~~~~~~~~~~~~~
A dense optimizer step changes every byte of state, so a byte that is not in memory is read once and written once a
step: 2 bytes moved for each byte not held. A weight is read for every gather (2 a micro-batch) and written once: 3
bytes for each byte not held, more with accumulation. So the best use of a byte of memory is known beforehand: weights
first, then state, whatever the model; what is frozen is only read. A static set is as good as any cache, since every
step uses everything once in a fixed order. (Section 3.1 of the notes on physical limits; ZeRO-Infinity caches nothing.)

Buffers are not divisible, so filling memory in that order can fall short of the best packing by less than one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_zinf.config import Tier
from lightning_zinf.memory.placement import COMFORT, ModelSize, Placement, place
from lightning_zinf.memory.planner.machine import Machine
from lightning_zinf.memory.planner.model import BufferSpec, ModelSpec
from lightning_zinf.memory.planner.options import PlanOptions

SLOWER: dict[Tier, int] = {"device": 0, "host": 1, "nvme": 2}


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

    def planes(self) -> Iterator[tuple[str, Tier, int]]:
        """Yield ``(plane, tier, bytes)`` of this rank's shard."""
        yield "weight", self.weights, self.weight_bytes
        for name, width in self.spec.planes:
            yield name, self.state, self.shard * width


@dataclass(frozen=True)
class Sizes:
    """Elements of every buffer on one rank, before anything is placed."""

    buffers: tuple[Resident, ...]
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
                buffers.append(
                    Resident(index, spec, elements, elements // world_size, "device", "device", unit.gathers)
                )
        return cls(tuple(buffers), stage)

    def summary(self, model: ModelSpec) -> ModelSize:
        """Return the totals that the rule for whole models goes by."""
        weights = sum(b.weight_bytes if self.stage == 3 else b.whole_bytes for b in self.buffers)
        gradients = sum(
            0 if not b.spec.learns else b.weight_bytes if self.stage > 1 else b.whole_bytes for b in self.buffers
        )
        whole = [0] * len(model.units)
        for b in self.buffers:
            whole[b.unit] += b.whole_bytes
        root = sum(n for n, unit in zip(whole, model.units, strict=True) if unit.name == "")
        state = sum(b.state_bytes for b in self.buffers)
        return ModelSize(weights, state, gradients, max(whole, default=0), root, sum(whole))

    def on(self, where: Placement) -> tuple[Resident, ...]:
        """Return every buffer with all weights on one tier and all state on one."""
        return tuple(_moved(b, where.params, where.optimizer) for b in self.buffers)


def whole_model(sizes: Sizes, model: ModelSpec, machine: Machine, options: PlanOptions) -> Placement:
    """Return the tiers that the engine chooses: one for all weights, one for all state."""
    host = machine.host_bytes // machine.ranks_per_node
    return place(
        sizes.summary(model),
        options.offload_params if options.stage == 3 else "none",
        options.offload_optimizer,
        device_free=host if machine.aliased else machine.device_bytes,
        host_free=host,
        cpu=machine.aliased,
    )


def moved_per_byte(buffer: Resident, accumulate: int) -> tuple[float, float]:
    """Return the bytes that a step moves for each byte of weights, and of state, that is not in memory."""
    return buffer.gathers * accumulate + buffer.spec.learns, 2.0 if buffer.spec.learns else 0.0


def fill(sizes: Sizes, room: dict[Tier, int], accumulate: int = 1) -> tuple[Resident, ...]:
    """Place every plane on its own, what moves most per byte first, on the fastest tier with room.

    Args:
        sizes: The buffers.
        room: Bytes of each faster tier that planes may take; what finds none rests on NVMe.
        accumulate: Micro-batches of a step.

    Returns:
        The buffers with their tiers. State never rests on a faster tier than its weights: the update of an
        accelerator's share runs there.
    """
    left = dict(room)
    tiers: dict[tuple[int, bool], Tier] = {}
    wanted = []
    for index, buffer in enumerate(sizes.buffers):
        weights, state = moved_per_byte(buffer, accumulate)
        if not buffer.spec.learns:  # the low halves of what is frozen rest with it
            both = buffer.weight_bytes + buffer.state_bytes
            wanted.append((weights * buffer.weight_bytes / both, both, index, False))
            continue
        wanted.append((weights, buffer.weight_bytes, index, False))
        if buffer.state_bytes:
            wanted.append((state, buffer.state_bytes, index, True))
    for _, nbytes, index, is_state in sorted(wanted, key=lambda w: (-w[0], w[3], w[2])):
        floor = SLOWER[tiers[index, False]] if is_state and (index, False) in tiers else 0
        options: tuple[Tier, ...] = ("device", "host")
        found: Tier = next((t for t in options if SLOWER[t] >= floor and nbytes <= left.get(t, 0)), "nvme")
        if found != "nvme":
            left[found] -= nbytes
        tiers[index, is_state] = found
    return tuple(_moved(b, tiers[i, False], tiers.get((i, True), tiers[i, False])) for i, b in enumerate(sizes.buffers))


def least_moved(sizes: Sizes, room: int, accumulate: int = 1) -> float:
    """Return a lower bound of the bytes that a step moves to and from NVMe if ``room`` bytes of planes stay in memory.

    The bound is what divisible planes would reach: memory is filled in order of the bytes moved for each byte.
    """
    pieces = []
    for buffer in sizes.buffers:
        weights, state = moved_per_byte(buffer, accumulate)
        pieces += [(weights, buffer.weight_bytes), (state, buffer.state_bytes)]
    moved = 0.0
    for rate, nbytes in sorted(pieces, reverse=True):
        held = min(nbytes, room)
        room -= held
        moved += rate * (nbytes - held)
    return moved


def comfortable(nbytes: int) -> int:
    """Return the share of free memory that "auto" fills."""
    return int(COMFORT * nbytes)


def _moved(buffer: Resident, weights: Tier, state: Tier) -> Resident:
    if not buffer.spec.learns and buffer.spec.planes:
        state = weights  # as the engine keeps the low halves of what is frozen
    return Resident(buffer.unit, buffer.spec, buffer.elements, buffer.shard, weights, state, buffer.gathers)
