"""Peak memory of every tier on one rank, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lightning_zinf.config import Tier
from lightning_zinf.memory.placement import ModelSize, slot_budget, tile_count
from lightning_zinf.memory.planner.machine import Machine
from lightning_zinf.memory.planner.model import ModelSpec
from lightning_zinf.memory.planner.options import PlanOptions, When
from lightning_zinf.memory.planner.residency import Resident

REDUCE_BYTES = 256 * 2**20
"""Most bytes of gradients under way to other ranks, unless a few units have more; small models take less."""


@dataclass(frozen=True)
class Item:
    """Something that takes memory for a whole step, or at its worst moment.

    Attributes:
        what: Name for the reader.
        tier: Where.
        nbytes: Bytes of one rank.
    """

    what: str
    tier: Tier
    nbytes: int


@dataclass(frozen=True)
class Rings:
    """Budgets of the memory that pages pass through, as the engine makes them.

    Attributes:
        slots: Gathered weights, on the device; 0 if weights stay in place.
        staging: Shards of weights between NVMe and an accelerator, in host memory.
        tiles: Staging for state, in host memory.
    """

    slots: int = 0
    staging: int = 0
    tiles: int = 0


def reduce_bytes(largest_unit: int, whole: int) -> int:
    """Return the budget for gradients under way to other ranks, of weights of that many bytes."""
    return min(REDUCE_BYTES, max(4 * largest_unit, whole // 4))


def rings(
    buffers: Sequence[Resident], size: ModelSize, machine: Machine, options: PlanOptions, world_size: int
) -> Rings:
    """Return the budgets that the engine gives to pages.

    Raises:
        ValueError: If a budget of the user's cannot hold what is needed at once, with the numbers.
    """
    host_free = machine.host_bytes // machine.ranks_per_node
    device_free = host_free if machine.aliased else machine.device_bytes
    asked = options.host_bytes
    tiles = 0
    weights = {b.weights for b in buffers}
    if any(b.state == "nvme" and b.state_bytes for b in buffers) or "nvme" in weights:
        width = max([8, *(b.spec.state_bytes for b in buffers)])
        numel = min(options.tile_numel, max((b.shard for b in buffers), default=4096))
        share = None if asked is None else asked // 3
        if share is not None:
            numel = min(numel, max(share // (2 * width) // 4096 * 4096, 4096))
        on_nvme = any(b.state == "nvme" for b in buffers if b.spec.learns)
        largest = max((b.state_bytes for b in buffers), default=0) if on_nvme else 0
        tiles = tile_count(share, numel * width, largest, host_free) * numel * width
        asked = None if asked is None else max(0, asked - tiles)
    paged = "nvme" in weights or ("host" in weights and not machine.aliased) or (world_size > 1 and options.stage == 3)
    if not paged:
        return Rings(tiles=tiles)
    if machine.aliased:
        return Rings(slot_budget(size, asked, host_free, "memory.host_bytes"), 0, tiles)
    slots = slot_budget(size, options.device_bytes, device_free, "memory.device_bytes")
    staging = slot_budget(size, asked, host_free, "memory.host_bytes") if "nvme" in weights else 0
    return Rings(slots, staging, tiles)


def items(
    model: ModelSpec,
    buffers: Sequence[Resident],
    size: ModelSize,
    budgets: Rings,
    machine: Machine,
    options: PlanOptions,
    world_size: int,
    update: When,
) -> list[Item]:
    """Return everything that takes memory on one rank at the worst moment of a step."""
    found: dict[tuple[str, Tier], int] = {}

    def add(what: str, tier: Tier, nbytes: float, /) -> None:
        if nbytes:
            key = (what, "host" if machine.aliased and tier == "device" else tier)
            found[key] = found.get(key, 0) + int(nbytes)

    for buffer in buffers:
        for plane, tier, nbytes in buffer.planes():
            if plane == "weight" and options.stage < 3:
                nbytes = buffer.whole_bytes
            add("weights" if plane == "weight" else plane, tier, nbytes)
        copied = buffer.weights == "device" and buffer.state != "device"
        if copied and not machine.aliased and buffer.spec.learns:
            add("copy of the weights for the update", "host", buffer.weight_bytes)
    _gradients(add, buffers, size, machine, options, world_size, update)
    add("slots for gathered weights", "device", budgets.slots)
    add("staging for weights", "host", budgets.staging)
    add("staging for state", "host", budgets.tiles)
    _activations(add, model, options)
    return [Item(what, tier, nbytes) for (what, tier), nbytes in found.items()]


class _Add(Protocol):
    def __call__(self, what: str, tier: Tier, nbytes: float, /) -> None: ...


def _gradients(
    add: _Add,
    buffers: Sequence[Resident],
    size: ModelSize,
    machine: Machine,
    options: PlanOptions,
    world_size: int,
    update: When,
) -> None:
    """Count gradients between backward and update: all of them, unless updates run in backward."""
    summed = options.accumulate > 1
    largest: dict[Tier, float] = {}
    total: dict[Tier, float] = {}
    for buffer in buffers:
        if not buffer.spec.learns:
            continue
        on_device = buffer.state == "device" and buffer.weights == "device"
        tier: Tier = "device" if on_device or machine.aliased else "host"
        if world_size == 1:
            nbytes = float(buffer.elements * buffer.spec.weight_bytes)
            nbytes += 4 * buffer.elements if summed and buffer.spec.weight_bytes < 4 else 0
        else:
            nbytes = 4.0 * buffer.shard
        total[tier] = total.get(tier, 0) + nbytes
        largest[tier] = max(largest.get(tier, 0), nbytes)
    for tier, nbytes in total.items():
        add("gradients", tier, min(nbytes, 2 * largest[tier]) if update == "backward" and not summed else nbytes)
    by_unit: dict[int, int] = {}
    for buffer in buffers:
        by_unit[buffer.unit] = by_unit.get(buffer.unit, 0) + (buffer.whole_bytes if buffer.spec.learns else 0)
    learning, biggest = sum(by_unit.values()), max(by_unit.values(), default=0)
    if world_size > 1:
        if options.stage == 1:
            add("gradients of this rank", "device", learning)
        assert size.whole is not None
        # A unit's gradients as autograd leaves them, and what is sent and what arrives of as many as may be under way.
        budget = max(2 * biggest, reduce_bytes(size.largest_unit, size.whole))
        add("gradients under way", "device", biggest + min(2 * learning, budget))
    elif not machine.aliased and any(b.state != "device" for b in buffers):
        add("gradients under way", "device", biggest)


def _activations(add: _Add, model: ModelSpec, options: PlanOptions) -> None:
    batch = options.batch
    if not options.recompute:
        add("activations", "device", batch * sum(u.saved_bytes for u in model.units))
        return
    blocks = [u for u in model.units if u.input_bytes]
    add("activations", "device", batch * max((u.saved_bytes for u in blocks), default=0))
    add("activations", "device", batch * sum(u.saved_bytes for u in model.units if not u.input_bytes))
    add("inputs of recomputed units", options.checkpoints, batch * sum(u.input_bytes for u in blocks))
