"""Which tier holds what: the rule for ``"auto"`` and the page budgets."""

from __future__ import annotations

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


def room(free: int, budget: int | None) -> int:
    """Return the bytes that "auto" may take of ``free`` bytes: the user's budget, else a share that leaves some."""
    return int(COMFORT * free) if budget is None else min(budget, free)


def place(
    size: ModelSize, offload_params: Offload, offload_optimizer: Offload, *, device_room: int, host_room: int, cpu: bool
) -> Placement:
    """Resolve the offload options for the model as a whole.

    Args:
        size: The model's sizes.
        offload_params: The user's choice for weights.
        offload_optimizer: The user's choice for optimizer state.
        device_room: Bytes on the accelerator that may be taken.
        host_room: Bytes of host memory that may be taken.
        cpu: Whether the accelerator is the CPU, so that device and host are one memory.

    Raises:
        ValueError: If state is to stay on an accelerator that the weights do not stay on.
    """
    names: dict[str, Tier] = {"none": "device", "cpu": "host", "nvme": "nvme"}
    params: Tier
    optimizer: Tier
    everything = offload_params in ("auto", "none") and size.total <= device_room
    if offload_params != "auto":
        params = names[offload_params]
    else:
        stays = offload_optimizer == "none" or (offload_optimizer == "auto" and everything)
        if size.weights + size.gradients + (size.state if stays else 0) <= device_room:
            params = "device"
        else:
            params = "host" if not cpu and size.weights + size.gradients <= host_room else "nvme"
    if offload_optimizer != "auto":
        optimizer = names[offload_optimizer]
    elif everything:
        optimizer = "device"
    else:
        beside = size.gradients + (size.weights if params == "host" else 0)
        optimizer = "host" if not cpu and size.state + beside <= host_room else "nvme"
    if optimizer == "device" and params != "device" and not cpu:
        raise ValueError(
            f"offload_optimizer='none' keeps optimizer state on the accelerator, but the weights would rest in "
            f"{'host memory' if params == 'host' else 'files on NVMe'} (offload_params={offload_params!r}; they take "
            f"{_gib(size.weights)}, and {_gib(device_room)} may be taken): a step needs both in one place, so set "
            "offload_params='none', or offload_optimizer='cpu'"
        )
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
            f"{_gib(limit)} {where}: allow more, or cut the model into smaller units (units=..., memory.unit_bytes) or "
            "its layers into tiles (tiling.max_tile_bytes)"
        )
    return budget


def tile_limit(asked: int | None, free: int) -> int:
    """Return the most bytes that a tile of a weight may have so that the slots' budget holds enough of them.

    Args:
        asked: The budget in bytes that the user gave, of which half may go to planes that stay, and a third of the
            rest to staging for state; None for none.
        free: Free bytes of the memory that slots are in.
    """
    budget = free // 4 if asked is None else asked // 3
    return max(1, budget // (UNITS_AHEAD + 1))


def tile_count(asked: int | None, tile_bytes: int, largest_state: int, free: int) -> int:
    """Return how many tiles of staging to have: two units' state, as far as the budget or the free memory allows."""
    wanted = max(4, -(-2 * largest_state // tile_bytes))
    return max(2, min(wanted, (free // 8 if asked is None else asked) // tile_bytes))


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 // 10 else f"{nbytes / 2**20:.2f} MiB"
