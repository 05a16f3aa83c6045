"""Which tier holds what: the rule for ``"auto"``, the page budgets, and the table that is printed at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_zinf.config import Offload, Tier

COMFORT = 0.6
"""Share of the free memory that state may take before "auto" moves it to the next tier."""
UNITS_AHEAD = 4
"""Units' worth of slots in the default budget: one computing, one arriving, two kept for the turn to backward."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model in bytes.

    Attributes:
        weights: Weight planes of all units, of which this rank keeps that much.
        state: What the optimizer keeps: low halves of masters, moments.
        gradients: Gradients of all units.
        largest_unit: Weight planes of the largest unit.
        root_unit: Weight planes of the root's unit, which is there throughout a step.
        whole: Weight planes of all units as they are gathered; ``weights`` if it is not given.
    """

    weights: int
    state: int
    gradients: int
    largest_unit: int
    root_unit: int
    whole: int | None = None

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.state + self.gradients


@dataclass(frozen=True)
class Placement:
    """Where things live.

    Attributes:
        params: Tier of the weights.
        optimizer: Tier of optimizer state.
    """

    params: Tier
    optimizer: Tier


def place(
    size: ModelSize, offload_params: Offload, offload_optimizer: Offload, *, device_free: int, host_free: int, cpu: bool
) -> Placement:
    """Resolve the offload options.

    Args:
        size: The model's sizes.
        offload_params: The user's choice for weights.
        offload_optimizer: The user's choice for optimizer state.
        device_free: Free bytes on the accelerator.
        host_free: Free bytes of host memory.
        cpu: Whether the accelerator is the CPU, so that device and host are one memory.
    """
    names: dict[str, Tier] = {"none": "device", "cpu": "host", "nvme": "nvme"}
    room, host_room = COMFORT * device_free, COMFORT * host_free
    if offload_optimizer != "auto":
        optimizer = names[offload_optimizer]
    elif size.total <= room:
        optimizer = "device"
    else:
        fits_host = size.state + size.gradients + (size.weights if cpu else 0) <= host_room
        optimizer = "host" if fits_host and not cpu else "nvme"
    if offload_params != "auto":
        params = names[offload_params]
    else:
        beside = size.gradients if optimizer != "device" else size.gradients + size.state
        if size.weights + beside <= room:
            params = "device"
        else:
            fits_host = size.weights + (size.state + size.gradients if optimizer == "host" else 0) <= host_room
            params = "host" if fits_host and not cpu else "nvme"
    return Placement(params, optimizer)


def slot_budget(size: ModelSize, asked: int | None, free: int, option: str) -> int:
    """Return the byte budget of the slots.

    Raises:
        ValueError: If the budget cannot hold the largest unit beside the root's, with the numbers.
    """
    least = size.largest_unit + (size.root_unit if size.largest_unit != size.root_unit else 0)
    if asked is None:
        wanted = UNITS_AHEAD * size.largest_unit + size.root_unit
        budget = max(least, min(wanted, free // 4, max(size.whole or size.weights, least)))
        limit, where = free, "are free"
    else:
        budget, limit, where = asked, asked, f"are allowed by {option}"
    if least > limit:
        raise ValueError(
            f"the largest unit of the model needs {_gib(least)} of memory for its gathered weights, but only "
            f"{_gib(limit)} {where}: allow more, or cut the model into smaller units (units=..., memory.unit_bytes)"
        )
    return budget


def tile_count(asked: int | None, tile_bytes: int, largest_state: int, free: int) -> int:
    """Return how many tiles of staging to have: two units' state, as far as the budget or the free memory allows."""
    wanted = max(4, -(-2 * largest_state // tile_bytes))
    return max(2, min(wanted, (free // 8 if asked is None else asked) // tile_bytes))


def table(rows: Sequence[tuple[str, str, int]]) -> str:
    """Format ``(what, tier, bytes)`` rows."""
    width = max(len(r[0]) for r in rows)
    return "\n".join(f"  {what:<{width}}  {tier:<6}  {_gib(nbytes):>11}" for what, tier, nbytes in rows)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 // 10 else f"{nbytes / 2**20:.2f} MiB"
