"""Which units rest in memory where the model as a whole does not: the planes that a budget has room for.

Note [Residency]
~~~~~~~~~~~~~~~~
What goes to host memory and to NVMe is decided for the model as a whole (``placement.py``). Memory that is left over,
the accelerator's and the host's, then keeps the planes of some units. A byte of a weight saves three transfers a step
(read for forward and for backward, written once), a byte of state saves two, so weights come first. The units that stay
are spread evenly over the model: those between them then have the time of more compute to come and go, and a step has
no stretch that waits for the disk and another where the disk is idle. A static choice beats a cache, whose units would
push each other out in every step.
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
    device_room: int = 0,
) -> Residency:
    """Move planes to faster tiers, as far as there is room and the user has not said where they are to be.

    Args:
        units: The units.
        where: Where the model goes as a whole.
        offload_params: The user's choice for weights.
        offload_optimizer: The user's choice for optimizer state.
        room: Bytes of host memory that are left.
        cpu: Whether the accelerator is the CPU, so that device and host are one memory.
        device_room: Bytes of the accelerator's own memory that are left.
    """
    root = [u.root for u in units]
    params: list[Tier] = [where.params] * len(units)
    optimizer: list[Tier] = [where.optimizer] * len(units)
    if not cpu and offload_params == "auto" and where.params != "device":
        device_room = _take(params, [u.weights for u in units], root, "device", device_room)
    if not cpu and offload_optimizer == "auto" and where.optimizer != "device":
        # A step needs weights and state in one place, and gradients then stay there too.
        sizes = [u.state + u.weights if t == "device" else None for u, t in zip(units, params, strict=True)]
        _take(optimizer, sizes, root, "device", device_room)
    memory: Tier = "device" if cpu else "host"
    if where.params == "nvme" and offload_params == "auto":
        sizes = [u.weights if t == "nvme" else None for u, t in zip(units, params, strict=True)]
        room = _take(params, sizes, root, memory, room)
    if where.optimizer == "nvme" and offload_optimizer == "auto":
        sizes = [u.state if t == "nvme" else None for u, t in zip(units, optimizer, strict=True)]
        _take(optimizer, sizes, root, memory, room)
    return Residency(tuple(params), tuple(optimizer))


def _take(tiers: list[Tier], sizes: Sequence[int | None], root: Sequence[bool], memory: Tier, room: int) -> int:
    """Put units that have a size into ``memory`` while there is room; return what is left of it."""
    for index in _spread(root):
        size = sizes[index]
        if size is not None and size <= room:
            tiers[index] = memory
            room -= size
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
