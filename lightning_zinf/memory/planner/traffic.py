"""Bytes that one optimizer step of one rank moves over every link.

The same numbers as the engine's counters (``monitor/counters.py``), with padding, in a step that neither begins nor
ends a run. Of what gathers read, part is still in its slot from the gather before: the engine counts that as reused, so
``nvme_read`` and ``host_to_device`` here are the sum of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from lightning_zinf.config import OffloadActivations
from lightning_zinf.memory.planner.residency import Resident


@dataclass(frozen=True)
class Traffic:
    """Bytes over each link.

    Attributes:
        nvme_read: Read from NVMe, or reused.
        nvme_write: Written to NVMe.
        host_to_device: Copied to an accelerator with memory of its own, or reused.
        device_to_host: Copied from it.
        all_gather: Whole buffers gathered from all ranks, or reused.
        reduce_scatter: Whole buffers of gradients reduced over all ranks.
    """

    nvme_read: float = 0
    nvme_write: float = 0
    host_to_device: float = 0
    device_to_host: float = 0
    all_gather: float = 0
    reduce_scatter: float = 0

    def __add__(self, other: Traffic) -> Traffic:
        """Add link by link."""
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def told(self) -> dict[str, float]:
        """Return it as plain data."""
        return asdict(self)


def gather_traffic(buffer: Resident, *, aliased: bool, world_size: int, stage: int) -> Traffic:
    """Return what one gather of a buffer moves, if nothing of it is still in its slot."""
    if stage < 3:
        return Traffic()
    paged = buffer.weights != "device"
    return Traffic(
        nvme_read=buffer.weight_bytes if buffer.weights == "nvme" else 0,
        host_to_device=buffer.weight_bytes if paged and not aliased else 0,
        all_gather=buffer.whole_bytes if world_size > 1 else 0,
    )


def gradient_traffic(buffer: Resident, *, aliased: bool, world_size: int) -> Traffic:
    """Return what the gradients of a backward move: one rank's go down as they are, several ranks' as float32."""
    if not buffer.spec.learns:
        return Traffic()
    down = 0
    if not aliased and (buffer.state != "device" or buffer.weights != "device"):
        down = buffer.spec.numel * buffer.spec.weight_bytes if world_size == 1 else 4 * buffer.shard
    return Traffic(device_to_host=down, reduce_scatter=buffer.whole_bytes if world_size > 1 else 0)


def update_traffic(buffer: Resident, *, aliased: bool, world_size: int, stage: int) -> Traffic:
    """Return what an update of a buffer moves beside the gather that it rides on."""
    if not buffer.spec.learns:
        return Traffic()
    on_nvme = buffer.state_bytes if buffer.state == "nvme" else 0
    goes_up = not aliased and buffer.weights == "device" and buffer.state != "device"
    return Traffic(
        nvme_read=on_nvme,
        nvme_write=on_nvme + (buffer.weight_bytes if buffer.weights == "nvme" else 0),
        host_to_device=buffer.weight_bytes if goes_up else 0,
        all_gather=buffer.whole_bytes if world_size > 1 and stage < 3 else 0,
    )


def spill_traffic(buffer: Resident, backwards: int, *, norm: bool) -> Traffic:
    """Return what the gradients of a buffer move that rest on NVMe between backward and update.

    Args:
        buffer: The buffer.
        backwards: Backwards of a step after which they go there.
        norm: Whether they are read for a norm once more.
    """
    if not buffer.spec.learns or not backwards:
        return Traffic()
    once, total = buffer.whole_bytes, 4 * buffer.elements  # each goes there, and all but the last into a sum
    moved = backwards * once + (backwards - 1) * total
    return Traffic(nvme_read=moved + (once + total if norm and backwards > 1 else 0), nvme_write=moved)


def step_traffic(
    buffers: Sequence[Resident], *, aliased: bool, world_size: int, stage: int, accumulate: int = 1
) -> Traffic:
    """Return what an optimizer step moves.

    Args:
        buffers: All buffers with their tiers.
        aliased: Whether device and host are one memory.
        world_size: Ranks that share the model.
        stage: What is partitioned.
        accumulate: Micro-batches of a step.
    """
    total = Traffic()
    backwards = accumulate if stage > 1 else 1
    for buffer in buffers:
        gather = gather_traffic(buffer, aliased=aliased, world_size=world_size, stage=stage)
        gradient = gradient_traffic(buffer, aliased=aliased, world_size=world_size)
        if stage == 1 and accumulate > 1 and world_size > 1 and buffer.spec.learns:
            gradient = replace(gradient, reduce_scatter=4 * buffer.elements)
        total += times(gather, buffer.gathers * accumulate)
        total += times(gradient, accumulate if world_size == 1 else backwards)
        total += update_traffic(buffer, aliased=aliased, world_size=world_size, stage=stage)
    return total


def activation_traffic(nbytes: float, offload: OffloadActivations, *, aliased: bool) -> Traffic:
    """Return what activations of so many bytes move between forward and backward."""
    apart, on_disk = (nbytes if wanted else 0 for wanted in (offload != "none" and not aliased, offload == "nvme"))
    return Traffic(nvme_read=on_disk, nvme_write=on_disk, host_to_device=apart, device_to_host=apart)


def times(traffic: Traffic, count: float) -> Traffic:
    """Return ``count`` times as much."""
    return Traffic(*(getattr(traffic, f.name) * count for f in fields(traffic)))
