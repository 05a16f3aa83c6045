"""Which units rest in memory where the model as a whole does not: the planes that a budget has room for.

Note [Residency]
~~~~~~~~~~~~~~~~
What goes to NVMe is decided for the model as a whole (``placement.py``). Memory that is left over then keeps the planes
of some units. A byte of a weight saves three transfers a step (read for forward and for backward, written once), a
byte of state saves two, so weights come first. The units that stay are spread evenly over the model: those between them
then have the time of more compute to come and go, and a step has no stretch that waits for the disk and another where
the disk is idle. A static choice beats a cache, whose units would push each other out in every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_zinf.config import Offload, Tier
from lightning_zinf.memory.placement import Placement


@dataclass(frozen=True)
class UnitSize:
    """Sizes of one unit in bytes, of which this rank keeps that much.

    Attributes:
        weights: Its weight planes.
        state: What the optimizer keeps.
        root: Whether it is there throughout a step, so that to have it rest elsewhere would save nothing.
    """

    weights: int
    state: int
    root: bool = False


@dataclass(frozen=True)
class Residency:
    """Tiers of each unit.

    Attributes:
        params: Tier of its weights.
        optimizer: Tier of its optimizer state.
    """

    params: tuple[Tier, ...]
    optimizer: tuple[Tier, ...]


def keep_in_memory(
    units: Sequence[UnitSize],
    where: Placement,
    offload_params: Offload,
    offload_optimizer: Offload,
    room: int,
    *,
    cpu: bool,
) -> Residency:
    """Move planes from NVMe to memory, as far as there is room and the user has not said where they are to be.

    Args:
        units: The units.
        where: Where the model goes as a whole.
        offload_params: The user's choice for weights.
        offload_optimizer: The user's choice for optimizer state.
        room: Bytes of host memory that are left.
        cpu: Whether the accelerator is the CPU, so that device and host are one memory.
    """
    memory: Tier = "device" if cpu else "host"
    params: list[Tier] = [where.params] * len(units)
    optimizer: list[Tier] = [where.optimizer] * len(units)
    if where.params == "nvme" and offload_params == "auto":
        room = _take(params, [u.weights for u in units], [u.root for u in units], memory, room)
    if where.optimizer == "nvme" and offload_optimizer == "auto":
        _take(optimizer, [u.state for u in units], [u.root for u in units], memory, room)
    return Residency(tuple(params), tuple(optimizer))


def _take(tiers: list[Tier], sizes: Sequence[int], root: Sequence[bool], memory: Tier, room: int) -> int:
    """Put units into memory while there is room; return what is left of it."""
    for index in _spread(root):
        if sizes[index] <= room:
            tiers[index] = memory
            room -= sizes[index]
    return room


def _spread(root: Sequence[bool]) -> Iterator[int]:
    """Yield the roots, then all others so that at any time those that came are spread evenly."""
    yield from (i for i, is_root in enumerate(root) if is_root)
    rest = [i for i, is_root in enumerate(root) if not is_root]
    bits = max(1, (len(rest) - 1).bit_length())
    for number in range(1 << bits):
        position = int(f"{number:0{bits}b}"[::-1], 2)  # van der Corput's sequence
        if position < len(rest):
            yield rest[position]
