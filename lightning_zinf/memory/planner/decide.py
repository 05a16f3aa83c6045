"""What the engine does with a model on a machine: the tier of every unit, and the memory that pages pass through.

Note [One decision]
~~~~~~~~~~~~~~~~~~~
The engine builds what ``decide`` returns and decides nothing by itself, and ``zinf plan`` prints the same decision. It
goes in three steps. The model as a whole gets a tier for its weights and one for its state (``placement.py``). If that
is NVMe for any of them, staging and slots get their budgets. What is left of the room then keeps planes of some units
in memory (``memory/residency.py``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_zinf.config import Tier
from lightning_zinf.memory.placement import ModelSize, Placement, place, room, slot_budget, tile_count
from lightning_zinf.memory.planner.kept import reserved
from lightning_zinf.memory.planner.model import ModelSpec
from lightning_zinf.memory.planner.options import PlanOptions
from lightning_zinf.memory.planner.residency import (
    Resident,
    Sizes,
    largest_gradients,
    staging_of_gradients,
    under_way,
)
from lightning_zinf.memory.residency import UnitSize, keep_in_memory

RINGS = 0.5
"""Share of a budget that planes pass through, unless speeds say otherwise (``speeds.py``)."""
_SMALLEST_TILE = 4096
"""Elements: so many of any plane are a multiple of what a disk reads at once."""


@dataclass(frozen=True)
class Tiles:
    """Staging for state on its way between NVMe and the update.

    Attributes:
        count: Number of tiles.
        numel: Elements of a tile.
        width: Bytes of all planes of an element.
    """

    count: int = 0
    numel: int = 0
    width: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tiles."""
        return self.count * self.numel * self.width


@dataclass(frozen=True)
class Decision:
    """Where everything rests on one rank, and what pages pass through.

    Attributes:
        where: Tiers of the model as a whole; units may rest in memory where it says nvme.
        params: Tier of each unit's weights.
        optimizer: Tier of each unit's state.
        buffers: Every flat buffer with its tiers.
        slots: Bytes of slots for gathered weights, on the device; 0 if weights stay in place.
        staging: Bytes of slots in host memory between NVMe and an accelerator.
        tiles: Staging for state, in host memory.
        rings: Most of a budget for planes and what they pass through that the latter took, as a share.
        spill: Bytes of staging for gradients that rest on NVMe between backward and update; 0 if they stay in memory.
    """

    where: Placement
    params: tuple[Tier, ...]
    optimizer: tuple[Tier, ...]
    buffers: tuple[Resident, ...]
    slots: int = 0
    staging: int = 0
    tiles: Tiles = Tiles()
    rings: float = RINGS
    spill: int = 0

    @property
    def on_nvme(self) -> int:
        """Bytes that rest on NVMe, without sums of gradients over several backwards."""
        return self.spilled + sum(nbytes for b in self.buffers for _, tier, nbytes in b.planes() if tier == "nvme")

    @property
    def spilled(self) -> int:
        """Bytes of the gradients of one backward that rest on NVMe."""
        return sum(b.whole_bytes for b in self.buffers if b.spec.learns) if self.spill else 0

    @property
    def moves(self) -> bool:
        """Whether the model as a whole has anything on NVMe."""
        return "nvme" in (self.where.params, self.where.optimizer)


def decide(
    model: ModelSpec,
    sizes: Sizes,
    options: PlanOptions,
    *,
    free_host: int,
    free_device: int,
    aliased: bool,
    rings: float = RINGS,
    spills: bool | None = None,
) -> Decision:
    """Decide where everything rests.

    Args:
        model: The model.
        sizes: Its buffers on one rank.
        options: The user's choices.
        free_host: Free bytes of host memory for one rank.
        free_device: Free bytes of its accelerator; the same if that is the CPU.
        aliased: Whether the accelerator is the CPU.
        rings: Share of ``memory.host_bytes`` that pages may pass through where the rest is for planes; no less than
            they need.
        spills: Whether gradients rest on NVMe between backward and update, if that has been decided.

    Raises:
        ValueError: If the budgets cannot hold what is needed at once, or the options contradict each other.
    """
    made = functools.partial(_Decider, model, sizes, options, free_host, free_device, aliased, rings)
    decision = made(spills).decide()
    if decision.spill and spills is None and model.profiled:  # sums of gradients are not in memory then
        decision = made(True).decide()
    return decision


class _Decider:
    def __init__(
        self,
        model: ModelSpec,
        sizes: Sizes,
        options: PlanOptions,
        free_host: int,
        free_device: int,
        aliased: bool,
        rings: float,
        spills: bool | None,
    ) -> None:
        self.rings = rings
        self.spills = spills
        self.model = model
        self.sizes = sizes
        self.options = options
        self.free_host = free_host
        self.free_device = free_device
        self.aliased = aliased
        self.size: ModelSize = sizes.summary(model)
        self.params_option = options.offload_params if options.stage == 3 else "none"
        self.auto = "auto" in (self.params_option, options.offload_optimizer)
        self.taken = reserved(model, options, aliased=aliased)
        if model.profiled:
            self.taken["host"] += self._beside()
        self.room = self._left(free_host, options.host_bytes, "host")

    def decide(self) -> Decision:
        options, size = self.options, self.size
        device_asked = options.host_bytes if self.aliased else options.device_bytes
        where = place(
            size,
            self.params_option,
            options.offload_optimizer,
            device_room=self._left(self.free_device, device_asked, "host" if self.aliased else "device"),
            host_room=self.room,
            cpu=self.aliased,
        )
        moves = "nvme" in (where.params, where.optimizer)
        asked = self._for_rings(moves)
        tiles = Tiles()
        if moves:
            tiles = self._tiles(where, asked)
            asked = None if asked is None else max(0, asked - tiles.nbytes)
            taken = size.gradients + tiles.nbytes + (0 if where.optimizer == "nvme" else size.state)
            if self.model.profiled and self.aliased:  # else the share that "auto" leaves has room for them
                taken += self._slots(where, asked)[0]
            if self.params_option == "auto" and self._in_host_memory(where.params) and taken + size.weights > self.room:
                where = Placement("nvme", where.optimizer)  # as a whole; units that fit stay
        slots, staging = self._slots(where, asked)
        gradients, spill = self._gradients(where, slots + tiles.nbytes)
        left = self.room - gradients - tiles.nbytes - staging - (slots if self.aliased else 0)
        on_device = self._left(self.free_device, options.device_bytes, "device") - slots
        on_device -= max(
            under_way(self.sizes.buffers, size, self.sizes.world_size, aliased=self.aliased), size.largest_unit
        )
        params, optimizer = self._units(where, left, on_device)
        buffers = self.sizes.on(params, optimizer)
        return Decision(where, params, optimizer, buffers, slots, staging, tiles, self.rings, spill)

    def _left(self, free: int, asked: int | None, tier: Tier) -> int:
        """Return the bytes that planes may take: what "auto" may, if measured activations leave that much."""
        return min(room(free, asked), max(0, free - self.taken[tier]))

    def _beside(self) -> int:
        """Return what takes host memory beside planes, gradients as they come, and rings (see ``peaks.py``).

        A plan that is made before a run leaves it to the share of memory that "auto" does not take.
        """
        sizes, nbytes = self.sizes, 0
        if self.aliased:
            nbytes += under_way(sizes.buffers, self.size, sizes.world_size, aliased=True)
        sums = self.options.accumulate > 1 and sizes.world_size == 1 and not self.spills
        if sums:  # of several backwards, in float32
            nbytes += sum(4 * b.elements for b in sizes.buffers if b.spec.learns and b.spec.weight_bytes < 4)
        return nbytes

    def _gradients(self, where: Placement, rings: int) -> tuple[int, int]:
        """Return the bytes of gradients in memory, and of their staging if they do not fit and go to NVMe."""
        size, learning = self.size, [b for b in self.sizes.buffers if b.spec.learns]
        spill = staging_of_gradients(learning)
        spills = self.spills
        if spills is None:
            planes = size.weights if self._in_host_memory(where.params) else 0
            able = self.sizes.world_size == 1 and self.aliased and where.optimizer == "nvme"
            fit = size.gradients + planes + rings <= self.free_host + self.options.present
            spills = able and not fit and spill + largest_gradients(learning) < size.gradients
        if not spills:
            return size.gradients, 0
        summed = self.options.accumulate > 1 and not self.options.clip
        return spill + largest_gradients(learning, sums=summed), spill

    def _in_host_memory(self, tier: Tier) -> bool:
        return tier == "host" or (tier == "device" and self.aliased)

    def _for_rings(self, moves: bool) -> int | None:
        """Return the part of the user's budget that pages may pass through; the rest is for planes that stay."""
        asked, size = self.options.host_bytes, self.size
        if asked is None or not moves or not self.auto:
            return asked
        slots = size.largest_unit + size.root_unit
        least = slots + 2 * _SMALLEST_TILE * self._width()
        return min(asked, max(int(self.rings * asked), least, -(-3 * slots // 2)))

    def _width(self) -> int:
        """Return the bytes of state of an element, where they are the most."""
        return max([8, *(b.spec.state_bytes for b in self.sizes.buffers)])

    def _tiles(self, where: Placement, asked: int | None) -> Tiles:
        buffers, width = self.sizes.buffers, self._width()
        numel = min(self.options.tile_numel, max((b.shard for b in buffers), default=4096))
        share = None if asked is None else asked // 3
        if share is not None:  # a small budget gets small tiles, two at least
            numel = min(numel, max(share // (2 * width) // _SMALLEST_TILE * _SMALLEST_TILE, _SMALLEST_TILE))
        largest = max((b.state_bytes for b in buffers), default=0) if where.optimizer == "nvme" else 0
        return Tiles(tile_count(share, numel * width, largest, self._spare()), numel, width)

    def _slots(self, where: Placement, asked: int | None) -> tuple[int, int]:
        """Return the bytes of slots and of staging for weights."""
        sharded = self.sizes.world_size > 1 and self.options.stage == 3
        if not (where.params == "nvme" or (where.params == "host" and not self.aliased) or sharded):
            return 0, 0
        if self.aliased:
            return self._budget(asked, self._spare(), "memory.host_bytes"), 0
        slots = self._budget(self.options.device_bytes, self.free_device, "memory.device_bytes")
        staging = self._budget(asked, self._spare(), "memory.host_bytes") if where.params == "nvme" else 0
        return slots, staging

    def _spare(self) -> int:
        """Return the free host memory that rings are sized by: what gradients leave, but not less than pages need."""
        least = self.size.largest_unit + self.size.root_unit
        return max(self.free_host - self.size.gradients, self.free_host // 2, min(self.free_host, least))

    def _budget(self, asked: int | None, free: int, option: str) -> int:
        wanted = slot_budget(self.size, asked, free, option)
        return min(wanted, slot_budget(self.size, None, max(free, wanted), option)) if self.auto else wanted

    def _units(self, where: Placement, left: int, on_device: int) -> tuple[tuple[Tier, ...], tuple[Tier, ...]]:
        """Return the tiers of each unit's weights and state, given the bytes left in host memory and on the device."""
        weights, state = [0] * len(self.model.units), [0] * len(self.model.units)
        for b in self.sizes.buffers:
            weights[b.unit] += b.weight_bytes if self.options.stage == 3 else b.whole_bytes
            state[b.unit] += b.state_bytes if b.spec.learns else 0
        units = [UnitSize(w, s, root=not u.name) for w, s, u in zip(weights, state, self.model.units, strict=True)]
        left -= sum(weights) if self._in_host_memory(where.params) else 0
        left -= sum(state) if self._in_host_memory(where.optimizer) else 0
        on_device -= sum(weights) if where.params == "device" else 0
        found = keep_in_memory(
            units,
            where,
            self.params_option,
            self.options.offload_optimizer,
            left,
            cpu=self.aliased,
            device_room=on_device,
        )
        return found.params, found.optimizer
