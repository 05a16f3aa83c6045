"""Partition a model: cut it into units, place every plane, and hand the parameters to the engine."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_zinf import parameters as paging
from lightning_zinf.comm.group import Collectives, Ranks, least
from lightning_zinf.config import PartitionConfig, Tier
from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.drafts import Draft, check_parameters, draft_buffers, measure
from lightning_zinf.engine.engine import Engine
from lightning_zinf.engine.residence import AliasedWeights, DeviceWeights
from lightning_zinf.engine.units import Unit, UnitPlan, find_units
from lightning_zinf.memory.heap import large_blocks_apart
from lightning_zinf.memory.machine import free_device_bytes, free_host_bytes
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.memory.placement import ModelSize, Placement, place, slot_budget, table, tile_count
from lightning_zinf.memory.slots import Slot, SlotRing
from lightning_zinf.memory.state import NvmeState, bytes_per_element, plane_dtype
from lightning_zinf.memory.tiles import TileRing
from lightning_zinf.monitor.counters import Counters

REDUCE_BYTES = 256 * 2**20
"""Most bytes of gradients under way to other ranks, unless a few units have more; small models take less."""
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
    counters = Counters()
    comm = None if ranks is None or ranks.world_size == 1 else Collectives(ranks, counters)
    drafts = draft_buffers(plans, config.precision, trained_ids, 1 if comm is None else comm.ranks.shard_size, kept)
    size = measure(drafts, config.stage)
    free = _free_everywhere(config.device, comm)
    cpu = config.device.type == "cpu" if config.aliased is None else config.aliased
    where = place(
        size, config.offload_params, config.offload_optimizer, device_free=free.device, host_free=free.host, cpu=cpu
    )
    context = EngineContext(config.device, counters, where.optimizer, config.aliased, comm, config.stage)
    builder = _Builder(config, context, where, size, free)
    try:
        builder.install(drafts)
        with large_blocks_apart():
            units = builder.build(plans, drafts)
            context.drop_scratch()
    except BaseException:
        context.close()
        raise
    assert size.whole is not None
    under_way = min(REDUCE_BYTES, max(4 * size.largest_unit, size.whole // 4))
    engine = Engine(root, units, context, prefetch=config.overlap.prefetch, reduce_bytes=under_way)
    engine.placement, engine.config = where, config
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

    def __init__(
        self, config: PartitionConfig, context: EngineContext, where: Placement, size: ModelSize, free: _Free
    ) -> None:
        self._free = free
        self._config = config
        self._context = context
        self._where = where
        self._size = size
        aliased = context.aliased
        sharded = context.comm is not None and config.stage == 3
        self._paged = where.params == "nvme" or (where.params == "host" and not aliased) or sharded

    def _state_tier(self, draft: Draft) -> Tier:
        return self._where.optimizer if draft.learns else self._where.params

    def install(self, drafts: Sequence[Draft]) -> None:
        """Make the rings and reserve the room on NVMe that the plan needs."""
        config, context, size = self._config, self._context, self._size
        memory = config.memory
        on_nvme = size.weights if self._where.params == "nvme" else 0
        on_nvme += sum(NvmeState.bytes_needed(d.shard, d.later_planes) for d in drafts if self._state_tier(d) == "nvme")
        host_asked = memory.host_bytes
        if "nvme" in (self._where.params, self._where.optimizer):
            store = NvmeStore(config.nvme_path, config.io, context.counters)
            context.install(nvme=store)
            store.reserve(on_nvme)
            width = max([8, *(bytes_per_element(d.later_planes) for d in drafts)])
            numel = min(config.io.tile_numel, max((d.shard for d in drafts), default=4096))
            largest = max((NvmeState.bytes_needed(d.shard, d.later_planes) for d in drafts), default=0)
            share = None if host_asked is None else host_asked // 3
            if share is not None:  # a small budget gets small tiles, two at least
                numel = min(numel, max(share // (2 * width) // 4096 * 4096, 4096))
            tiles = tile_count(share, numel * width, largest if self._where.optimizer == "nvme" else 0, self._free.host)
            ring = TileRing(tiles, numel, width, context.allocate_host, context.counters)
            context.install(tiles=ring)
            host_asked = None if host_asked is None else max(0, host_asked - ring.nbytes)
        if not self._paged:
            return
        if context.aliased:
            budget = slot_budget(size, host_asked, self._free.host, "memory.host_bytes")
            context.install(ring=SlotRing(budget, context.allocate_device, context.counters))
            return
        budget = slot_budget(size, memory.device_bytes, self._free.device, "memory.device_bytes")
        context.install(ring=SlotRing(budget, context.allocate_device, context.counters))
        if self._where.params == "nvme":
            staging = slot_budget(size, host_asked, self._free.host, "memory.host_bytes")
            context.install(staging=SlotRing(staging, context.allocate_host, context.counters))

    def build(self, plans: Sequence[UnitPlan], drafts: Sequence[Draft]) -> list[Unit]:
        """Build every unit, the root's last."""
        by_plan: dict[int, list[FlatBuffer]] = {id(plan): [] for plan in plans}
        for draft in self._progress(drafts):
            by_plan[id(draft.plan)].append(self._buffer(draft))
        kept = [p for p in plans if by_plan[id(p)] and p.name] + [p for p in plans if not p.name]
        return [Unit(i, p.name, p.module, by_plan[id(p)]) for i, p in enumerate(kept)]

    def _progress(self, drafts: Sequence[Draft]) -> Iterator[Draft]:
        if self._size.weights < _SHOW_PROGRESS_BYTES or not sys.stderr.isatty():
            yield from drafts
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(drafts, "Partitioning", console=Console(stderr=True), transient=True)

    def _buffer(self, draft: Draft) -> FlatBuffer:
        context = self._context
        label = "/".join([draft.plan.name or "<root>", str(draft.compute_dtype).removeprefix("torch.")])
        buffer = FlatBuffer(label, draft.names, draft.params, draft.compute_dtype, context)
        master = self._take_values(buffer)
        if draft.planes:
            buffer.state = context.new_state(buffer.shard_numel, draft.planes, self._state_tier(draft))
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
        context = self._context
        aliased = context.aliased
        nvme = context.nvme.allocate(buffer.shard_bytes) if self._where.params == "nvme" else None
        slot = None if self._paged else Slot(context.allocate_device(buffer.weight_bytes))
        home = None
        if self._paged and (self._where.params == "device" or (aliased and nvme is None)):
            home = context.allocate_device(buffer.shard_bytes).view(buffer.compute_dtype)
        if aliased:
            buffer.weights = AliasedWeights(buffer, slot, nvme, home)
        else:
            stays = slot is not None or home is not None
            keeps_copy = self._where.params == "host" or (stays and self._where.optimizer != "device")
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
        if self._paged or buffer.flips:
            buffer.unbind()


def residency(engine: Engine) -> list[tuple[str, str, int]]:
    """Return ``(what, tier, bytes)`` of everything that the engine keeps."""
    rows: list[tuple[str, str, int]] = []
    buffers = [b for u in engine.units for b in u.buffers]
    weights = sum(b.weight_bytes if b.persistent else b.shard_bytes for b in buffers)
    rows.append(("weights", engine.placement.params, weights))
    for plane in dict.fromkeys(p for b in buffers if b.state for p in b.state.planes):
        nbytes = sum(
            b.shard_numel * plane_dtype(plane).itemsize for b in buffers if b.state and plane in b.state.planes
        )
        rows.append((plane, engine.placement.optimizer, nbytes))
    rows.extend(engine.context.pages())
    return rows


def describe(engine: Engine) -> str:
    """Return the table of what lives where."""
    return table(residency(engine))


def default_nvme_path(given: str | os.PathLike[str] | None, root: str | os.PathLike[str]) -> str:
    """Return the folder for NVMe files: the option, else $ZINF_NVME_PATH, else one below the Trainer's root."""
    return str(given or os.environ.get("ZINF_NVME_PATH") or Path(root) / "zinf_nvme")
