"""Peak memory of every tier on one rank, item by item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lightning_zinf.config import Tier
from lightning_zinf.memory.placement import ModelSize
from lightning_zinf.memory.planner.decide import Decision
from lightning_zinf.memory.planner.kept import activations
from lightning_zinf.memory.planner.machine import Machine
from lightning_zinf.memory.planner.model import ModelSpec
from lightning_zinf.memory.planner.options import PlanOptions
from lightning_zinf.memory.planner.residency import largest_gradients, under_way


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


def items(
    model: ModelSpec,
    decision: Decision,
    size: ModelSize,
    machine: Machine,
    options: PlanOptions,
) -> list[Item]:
    """Return everything that takes memory on one rank at the worst moment of a step."""
    found: dict[tuple[str, Tier], int] = {}

    def add(what: str, tier: Tier, nbytes: float, /) -> None:
        if nbytes:
            key = (what, "host" if machine.aliased and tier == "device" else tier)
            found[key] = found.get(key, 0) + int(nbytes)

    for buffer in decision.buffers:
        for plane, tier, nbytes in buffer.planes():
            if plane == "weight" and options.stage < 3:
                nbytes = buffer.whole_bytes
            add("weights" if plane == "weight" else plane, tier, nbytes)
        copied = buffer.weights == "device" and buffer.state != "device"
        if copied and not machine.aliased and buffer.spec.learns:
            add("copy of the weights for the update", "host", buffer.weight_bytes)
    _gradients(add, decision, size, machine, options)
    add("slots for gathered weights", "device", decision.slots)
    add("staging for weights", "host", decision.staging)
    add("staging for state", "host", decision.tiles.nbytes)
    for what, tier, nbytes_kept in activations(model, options):
        add(what, tier, nbytes_kept)
    return [Item(what, tier, nbytes) for (what, tier), nbytes in found.items()]


class _Add(Protocol):
    def __call__(self, what: str, tier: Tier, nbytes: float, /) -> None: ...


def _gradients(add: _Add, decision: Decision, size: ModelSize, machine: Machine, options: PlanOptions) -> None:
    """Count gradients between backward and update.

    All of them: where updates run in backward they are fewer, but not in the first step, which only watches. What if
    they always ran in backward is answered for ``update="backward"``: two units' worth then. Where they do not fit they
    rest on NVMe (``Decision.spill``), and memory has those of a unit.
    """
    world_size = machine.world_size
    if decision.spill:
        learning = [b for b in decision.buffers if b.spec.learns]
        summed = options.accumulate > 1 and not options.clip
        add("gradients of a unit", "device", largest_gradients(learning, sums=summed))
        add("staging for gradients", "host", decision.spill)
        sums = 4 * sum(b.elements for b in learning) if options.accumulate > 1 else 0
        add("gradients", "nvme", decision.spilled + sums)
        return
    kept: dict[Tier, dict[int, int]] = {}
    for buffer in decision.buffers:
        if not buffer.spec.learns:
            continue
        on_device = buffer.state == "device" and buffer.weights == "device"
        if world_size == 1:
            nbytes = buffer.elements * buffer.spec.weight_bytes
            nbytes += 4 * buffer.elements if options.accumulate > 1 and buffer.spec.weight_bytes < 4 else 0
        else:
            nbytes = 4 * buffer.shard
        units = kept.setdefault("device" if on_device or machine.aliased else "host", {})
        units[buffer.unit] = units.get(buffer.unit, 0) + nbytes
    for tier, units in kept.items():
        most = 2 * max(units.values()) if options.update == "backward" else sum(units.values())
        add("gradients", tier, min(most, sum(units.values())))
    if options.stage == 1 and world_size > 1:
        add("gradients of this rank", "device", sum(b.whole_bytes for b in decision.buffers if b.spec.learns))
    add("gradients under way", "device", under_way(decision.buffers, size, world_size, aliased=machine.aliased))
