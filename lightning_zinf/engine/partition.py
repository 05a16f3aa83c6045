"""Partition a model: cut it into units, place every plane, and hand the parameters to the engine."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_zinf import parameters as paging
from lightning_zinf.comm.group import Collectives, Ranks, least
from lightning_zinf.config import PartitionConfig, Tier
from lightning_zinf.engine.activations import open_store
from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.drafts import Draft, check_parameters, draft_buffers, measure
from lightning_zinf.engine.engine import Engine
from lightning_zinf.engine.recompute import modules_to_recompute
from lightning_zinf.engine.residence import AliasedWeights, DeviceWeights
from lightning_zinf.engine.units import Unit, UnitPlan, find_units
from lightning_zinf.memory.heap import large_blocks_apart
from lightning_zinf.memory.machine import free_device_bytes, free_host_bytes
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.memory.placement import ModelSize, Placement, place, room, slot_budget, table, tile_count
from lightning_zinf.memory.residency import UnitSize, keep_in_memory
from lightning_zinf.memory.slots import Slot, SlotRing
from lightning_zinf.memory.state import NvmeState, bytes_per_element, plane_dtype
from lightning_zinf.memory.tiles import TileRing
from lightning_zinf.monitor.counters import Counters

REDUCE_BYTES = 256 * 2**20
"""Most bytes of gradients under way to other ranks, unless a few units have more; small models take less."""
_SMALLEST_TILE = 4096
"""Elements: so many of any plane are a multiple of what a disk reads at once."""
_SHOW_PROGRESS_BYTES = 512 * 2**20

_ENGINES: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
_ATTRIBUTE = "_zinf_engine"
"""Where a model keeps its engine, so that both go together."""
T = TypeVar("T")


def engine_of(module: nn.Module) -> Engine | None:
    """Return the engine of a partitioned model, or None."""
    engine = module.__dict__.get(_ATTRIBUTE)
    return engine if isinstance(engine, Engine) and engine.root is module else None


def engines_of(params: Iterable[nn.Parameter]) -> list[Engine]:
    """Return the engines that manage any of these parameters."""
    wanted = list(params)
    return [engine for engine in _ENGINES.values() if any(engine.unit_of(p) for p in wanted)]


def forget(root: nn.Module) -> None:
    """Dissolve a model's engine, if it has one."""
    engine = engine_of(root)
    if engine is not None:
        del root.__dict__[_ATTRIBUTE]
        engine.dissolve()


def partition(
    root: nn.Module,
    config: PartitionConfig,
    trained: Iterable[nn.Parameter] = (),
    ranks: Ranks | None = None,
    kept: Mapping[int, tuple[str, ...]] | None = None,
) -> Engine:
    """Hand a model's parameters to an engine.

    With several ranks, all of them call this, and the model gets rank 0's values.

    Args:
        root: The model. Its parameters keep their identity; their values move to where the plan has them.
        config: How to do it.
        trained: The parameters that an optimizer will update.
        ranks: The ranks that train the model together; None for one alone.
        kept: Names of the planes that a parameter's optimizer keeps, by its ``id``; Adam's where it says nothing.

    Raises:
        ValueError: If the model has parameters that cannot be partitioned, or the budgets are too small.
        OSError: If the NVMe folder cannot be used or is too small.
    """
    trained_ids = {id(p) for p in trained}
    check_parameters(root, trained_ids)
    plans = find_units(root, config.memory.unit_bytes, config.units)
    recomputed = modules_to_recompute(root, [p.module for p in plans], config.activation_checkpointing)
    counters = Counters()
    comm = None if ranks is None or ranks.world_size == 1 else Collectives(ranks, counters)
    drafts = draft_buffers(plans, config.precision, trained_ids, 1 if comm is None else comm.ranks.shard_size, kept)
    size = measure(drafts, config.stage)
    free = _free_everywhere(config.device, comm)
    cpu = config.device.type == "cpu" if config.aliased is None else config.aliased
    asked = config.memory.host_bytes, config.memory.host_bytes if cpu else config.memory.device_bytes
    rooms = _Free(room(free.host, asked[0]), room(free.device, asked[1]))
    where = place(
        size, config.offload_params, config.offload_optimizer, device_room=rooms.device, host_room=rooms.host, cpu=cpu
    )
    context = EngineContext(config.device, counters, config.aliased, comm, config.stage)
    builder = _Builder(config, context, where, free)
    try:
        builder.install(drafts, size, rooms.host)
        with large_blocks_apart():
            units = builder.build(plans, drafts)
            context.drop_scratch()
        store = open_store(config, context, free.host)
    except BaseException:
        context.close()
        raise
    assert size.whole is not None
    under_way = min(REDUCE_BYTES, max(4 * size.largest_unit, size.whole // 4))
    engine = Engine(root, units, context, prefetch=config.overlap.prefetch, reduce_bytes=under_way)
    if recomputed or store is not None:
        engine.handle_activations(recomputed, store, config.memory.activation_min_bytes)
    engine.placement, engine.config = builder.where, config
    root.__dict__[_ATTRIBUTE] = _ENGINES[id(engine)] = engine
    return engine


@dataclass(frozen=True)
class _Free:
    """Free bytes for a rank, the least of all ranks: what is decided by them has to be the same everywhere."""

    host: int
    device: int


def _free_everywhere(device: torch.device, comm: Collectives | None) -> _Free:
    host, on_device = free_host_bytes(), free_device_bytes(device)
    if comm is None:
        return _Free(host, on_device)
    ranks = comm.ranks
    shared = on_device // ranks.local_size if device.type == "cpu" else on_device
    return _Free(*least([host // ranks.local_size, shared], ranks.channel, "setting up the model"))


class _Builder:
    """Builds buffers one unit after the other, so that no more than one unit is in memory twice."""

    def __init__(self, config: PartitionConfig, context: EngineContext, where: Placement, free: _Free) -> None:
        self._free = free
        self._config = config
        self._context = context
        self.where = where
        self._weights = 0
        self._tiers: dict[int, tuple[Tier, Tier]] = {}

    def _paged(self, tier: Tier) -> bool:
        """Whether weights that rest there are gathered into slots."""
        aliased, sharded = self._context.aliased, self._context.comm is not None and self._config.stage == 3
        return tier == "nvme" or (tier == "host" and not aliased) or sharded

    def _in_host_memory(self, tier: Tier) -> bool:
        return tier == "host" or (tier == "device" and self._context.aliased)

    def _tiers_of(self, draft: Draft) -> tuple[Tier, Tier]:
        """Return where a buffer's weights rest, and its state."""
        params, optimizer = self._tiers[id(draft.plan)]
        return params, optimizer if draft.learns else params

    def install(self, drafts: Sequence[Draft], size: ModelSize, room: int) -> None:
        """Make the rings that the plan needs, settle what rests where, and reserve the room on NVMe.

        Args:
            drafts: The buffers.
            size: Their sizes.
            room: Bytes of host memory that may be taken.
        """
        config, context, where = self._config, self._context, self.where
        self._weights = size.weights
        asked = config.memory.host_bytes
        moves = "nvme" in (where.params, where.optimizer)
        auto = "auto" in (config.offload_params, config.offload_optimizer)
        if asked is not None and moves and auto:  # what rings do not take is for planes that stay in memory
            slots = size.largest_unit + size.root_unit
            least = slots + 2 * _SMALLEST_TILE * self._width(drafts)
            asked = min(asked, max(asked // 2, least, -(-3 * slots // 2)))
        store: NvmeStore | None = None
        if moves:
            store = NvmeStore(config.nvme_path, config.io, context.counters)
            context.install(nvme=store)
            asked = self._install_tiles(drafts, asked)
            taken = size.gradients + context.tiles.nbytes + (0 if where.optimizer == "nvme" else size.state)
            if config.offload_params == "auto" and self._in_host_memory(where.params) and taken + size.weights > room:
                self.where = where = Placement("nvme", where.optimizer)  # as a whole; units that fit stay
        if self._paged(where.params):
            self._install_slots(size, asked, auto=auto)
        self._settle_tiers(drafts, room - size.gradients - sum(n for _, tier, n in context.pages() if tier == "host"))
        if store is not None:
            placed = [(d, *self._tiers_of(d)) for d in drafts]
            on_nvme = sum(d.shard * d.compute_dtype.itemsize for d, params, _ in placed if params == "nvme")
            on_nvme += sum(NvmeState.bytes_needed(d.shard, d.later_planes) for d, _, state in placed if state == "nvme")
            store.reserve(on_nvme)

    @staticmethod
    def _width(drafts: Sequence[Draft]) -> int:
        """Return the bytes of state of an element, where they are the most."""
        return max([8, *(bytes_per_element(d.later_planes) for d in drafts)])

    def _install_tiles(self, drafts: Sequence[Draft], asked: int | None) -> int | None:
        """Make the staging for state; return what is left of the budget that was asked for."""
        config, context = self._config, self._context
        width = self._width(drafts)
        numel = min(config.io.tile_numel, max((d.shard for d in drafts), default=4096))
        largest = max((NvmeState.bytes_needed(d.shard, d.later_planes) for d in drafts), default=0)
        share = None if asked is None else asked // 3
        if share is not None:  # a small budget gets small tiles, two at least
            numel = min(numel, max(share // (2 * width) // _SMALLEST_TILE * _SMALLEST_TILE, _SMALLEST_TILE))
        tiles = tile_count(share, numel * width, largest if self.where.optimizer == "nvme" else 0, self._free.host)
        ring = TileRing(tiles, numel, width, context.allocate_host, context.counters)
        context.install(tiles=ring)
        return None if asked is None else max(0, asked - ring.nbytes)

    def _install_slots(self, size: ModelSize, asked: int | None, *, auto: bool) -> None:
        """Make the slots for gathered weights."""
        config, context = self._config, self._context

        def budget(asked: int | None, free: int, option: str) -> int:
            wanted = slot_budget(size, asked, free, option)
            return min(wanted, slot_budget(size, None, max(free, wanted), option)) if auto else wanted

        if context.aliased:
            slots = budget(asked, self._free.host, "memory.host_bytes")
            context.install(ring=SlotRing(slots, context.allocate_device, context.counters))
            return
        slots = budget(config.memory.device_bytes, self._free.device, "memory.device_bytes")
        context.install(ring=SlotRing(slots, context.allocate_device, context.counters))
        if self.where.params == "nvme":
            staging = budget(asked, self._free.host, "memory.host_bytes")
            context.install(staging=SlotRing(staging, context.allocate_host, context.counters))

    def _settle_tiers(self, drafts: Sequence[Draft], room: int) -> None:
        """Decide for each unit what rests where."""
        config, where = self._config, self.where
        plans = list({id(d.plan): d.plan for d in drafts}.values())
        sizes = []
        for plan in plans:
            own = [d for d in drafts if d.plan is plan]
            weights = sum(d.padded * d.compute_dtype.itemsize // (d.shards if config.stage == 3 else 1) for d in own)
            state = sum(NvmeState.bytes_needed(d.shard, d.later_planes) for d in own if d.learns)
            sizes.append(UnitSize(weights, state, root=not plan.name))
        if self._in_host_memory(where.params):
            room -= sum(u.weights for u in sizes)
        if self._in_host_memory(where.optimizer):
            room -= sum(u.state for u in sizes)
        tiers = keep_in_memory(
            sizes, where, config.offload_params, config.offload_optimizer, room, cpu=self._context.aliased
        )
        self._tiers = {
            id(plan): both for plan, both in zip(plans, zip(tiers.params, tiers.optimizer, strict=True), strict=True)
        }

    def build(self, plans: Sequence[UnitPlan], drafts: Sequence[Draft]) -> list[Unit]:
        """Build every unit, the root's last."""
        by_plan: dict[int, list[FlatBuffer]] = {id(plan): [] for plan in plans}
        for draft in self._progress(drafts):
            by_plan[id(draft.plan)].append(self._buffer(draft))
        kept = [p for p in plans if by_plan[id(p)] and p.name] + [p for p in plans if not p.name]
        return [Unit(i, p.name, p.module, by_plan[id(p)]) for i, p in enumerate(kept)]

    def _progress(self, drafts: Sequence[Draft]) -> Iterator[Draft]:
        if self._weights < _SHOW_PROGRESS_BYTES or not sys.stderr.isatty():
            yield from drafts
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(drafts, "Partitioning", console=Console(stderr=True), transient=True)

    def _buffer(self, draft: Draft) -> FlatBuffer:
        context = self._context
        label = "/".join([draft.plan.name or "<root>", str(draft.compute_dtype).removeprefix("torch.")])
        params, state = self._tiers_of(draft)
        buffer = FlatBuffer(label, draft.names, draft.params, draft.compute_dtype, context, params, state)
        master = self._take_values(buffer)
        if draft.planes:
            buffer.state = context.new_state(buffer.shard_numel, draft.planes, state)
        self._settle(buffer, master)
        return buffer

    def _take_values(self, buffer: FlatBuffer) -> Tensor:
        """Move the parameters' values into one flat tensor of the user's dtype: from here on it is the only copy."""
        flat = self._context.scratch(buffer.layout.padded_numel, buffer.view_dtype).zero_()
        with torch.no_grad():
            for param, view in zip(buffer.params, buffer.views_of(flat), strict=True):
                view.copy_(param.data)
                page = paging.owner_of(param)
                if page is not None:
                    page[0].context.retire(page[0])
                param.data = torch.empty(0, dtype=buffer.view_dtype)
        if self._context.comm is not None:
            self._context.comm.broadcast(flat)
        buffer.adopt()
        return flat

    def _settle(self, buffer: FlatBuffer, values: Tensor) -> None:
        """Put the weights where they rest, and bind or release the parameters."""
        context, tier = self._context, buffer.params_tier
        aliased, paged = context.aliased, self._paged(buffer.params_tier)
        nvme = context.nvme.allocate(buffer.shard_bytes) if tier == "nvme" else None
        slot = None if paged else Slot(context.allocate_device(buffer.weight_bytes))
        home = None
        if paged and (tier == "device" or (aliased and nvme is None)):
            home = context.allocate_device(buffer.shard_bytes).view(buffer.compute_dtype)
        if aliased:
            buffer.weights = AliasedWeights(buffer, slot, nvme, home)
        else:
            stays = slot is not None or home is not None
            keeps_copy = tier == "host" or (stays and not buffer.on_device)
            plane = context.allocate_host(buffer.shard_bytes).view(buffer.compute_dtype) if keeps_copy else None
            buffer.weights = DeviceWeights(buffer, slot, plane, nvme, home)
        buffer.weights.claim()
        if buffer.view_dtype == torch.float32 and buffer.split:
            buffer.write_master(values)
        elif buffer.split:
            buffer.write_master(values.float())
        else:
            buffer.weights.flat().copy_(values)
            buffer.weights.store()
        buffer.bind()
        if paged or buffer.flips:
            buffer.unbind()


def residency(engine: Engine) -> list[tuple[str, str, int]]:
    """Return ``(what, tier, bytes)`` of everything that the engine keeps."""
    sums: dict[tuple[str, str], int] = {}
    buffers = [b for u in engine.units for b in u.buffers]
    for buffer in buffers:
        key = ("weights", str(buffer.params_tier))
        sums[key] = sums.get(key, 0) + (buffer.weight_bytes if buffer.persistent else buffer.shard_bytes)
    for plane in dict.fromkeys(p for b in buffers if b.state for p in b.state.planes):
        for buffer in buffers:
            if buffer.state is not None and plane in buffer.state.planes:
                key = (plane, str(buffer.state_tier))
                sums[key] = sums.get(key, 0) + buffer.shard_numel * plane_dtype(plane).itemsize
    return [(what, tier, nbytes) for (what, tier), nbytes in sums.items()] + engine.context.pages()


def tiers(engine: Engine, what: Literal["weights", "optimizer state"]) -> str:
    """Return the tiers of the weights or of optimizer state, in words."""
    buffers = [b for u in engine.units for b in u.buffers if what == "weights" or b.trained or b.state is not None]
    found = {b.params_tier if what == "weights" else b.state_tier for b in buffers}
    places = {"device", "host", "nvme"} & found or {
        engine.placement.params if what == "weights" else engine.placement.optimizer
    }
    return " and ".join(sorted(places))


def describe_activations(engine: Engine) -> str:
    """Say what happens to activations between forward and backward."""
    count = 0 if engine.activations is None else len(engine.activations.recomputed)
    place = {"none": "the device", "cpu": "host memory", "nvme": "nvme"}[engine.config.offload_activations]
    if not count:
        return f"activations on {place}"
    return f"{count} modules are recomputed in backward, their inputs on {place}"


def describe(engine: Engine) -> str:
    """Return the table of what lives where."""
    return table(residency(engine))


def default_nvme_path(given: str | os.PathLike[str] | None, root: str | os.PathLike[str]) -> str:
    """Return the folder for NVMe files: the option, else $ZINF_NVME_PATH, else one below the Trainer's root."""
    return str(given or os.environ.get("ZINF_NVME_PATH") or Path(root) / "zinf_nvme")
