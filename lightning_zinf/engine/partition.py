"""Partition a model: cut it into units, place every plane, and hand the parameters to the engine."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_zinf import parameters as paging
from lightning_zinf.comm.group import Collectives, Ranks, least
from lightning_zinf.config import PartitionConfig, Tier
from lightning_zinf.engine.activations import open_store
from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.drafts import COMPUTE_DTYPES, Draft, check_parameters, describe_model, draft_buffers
from lightning_zinf.engine.engine import Engine
from lightning_zinf.engine.placing import give_weights, make_rings, settle
from lightning_zinf.engine.recompute import modules_to_recompute
from lightning_zinf.engine.shared_pages import SharedPager, pagers_with_pages
from lightning_zinf.engine.spilled import SpilledGradients
from lightning_zinf.engine.units import Unit, UnitPlan, find_units
from lightning_zinf.memory.heap import large_blocks_apart
from lightning_zinf.memory.machine import free_device_bytes, free_disk_bytes, free_host_bytes, stack_bytes
from lightning_zinf.memory.placement import tile_limit
from lightning_zinf.memory.planner import Decision, Machine, Plan, PlanOptions, Rates, make_plan
from lightning_zinf.memory.planner.residency import reduce_bytes
from lightning_zinf.memory.state import plane_dtype
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.tiling.parameter import TiledParameter
from lightning_zinf.tiling.plan import plan_tiles

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
    return [engine for engine in _ENGINES.values() if any(engine.places_of(p) for p in wanted)]


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
    counters = Counters()
    comm = None if needs_no_others(ranks) or ranks is None else Collectives(ranks, counters)
    pagers = [] if ranks is None else [pager for pager in pagers_with_pages() if pager.join(ranks).compare(root)]
    free = _free_everywhere(config.device, comm, stack_bytes(config.io.threads * len(config.nvme_paths)))
    cpu = config.device.type == "cpu" if config.aliased is None else config.aliased
    tiled = _tiled(root, config, free, cpu)
    plans = find_units(root, config.memory.unit_bytes, config.units, {id(t.param) for t in tiled})
    recomputed = modules_to_recompute(root, [p.module for p in plans], config.activation_checkpointing)
    plans = [*plans[:-1], *_plans_of_tiles(tiled), plans[-1]]
    drafts = draft_buffers(plans, config.precision, trained_ids, 1 if comm is None else comm.ranks.shard_size, kept)
    model = describe_model(drafts, type(root).__name__)
    present = _taken_bytes(root, pagers, comm)
    machine, options = _machine(config, free, comm, aliased=cpu), replace(options_of(config), present=present)
    # Copies of the model on other ranks, which the plan of one does not have, have to add up their gradients.
    plan = make_plan(model, machine, options, spills=None if comm is None else False)
    _refuse_what_does_not_fit(plan, present, training=bool(trained_ids))
    _move_others(root, {id(p) for d in drafts for p in d.params} | {id(t.param) for t in tiled}, config.device)
    decision = plan.decision
    context = EngineContext(config.device, counters, config.aliased, comm, config.stage)
    context.leaving_bytes = plan.size.largest_unit  # so many gradients the plan counts on the device
    builder = _Builder(config, context, decision, drafts, tiled)
    try:
        builder.install()
        with large_blocks_apart():
            units = builder.build(plans)
            context.drop_scratch()
            for pager in pagers:
                pager.give_back()
        store = open_store(config, context, free.host)
    except BaseException:
        context.close()
        raise
    assert plan.size.whole is not None
    under_way = reduce_bytes(plan.size.largest_unit, plan.size.whole)
    engine = Engine(root, units, context, prefetch=config.overlap.prefetch, reduce_bytes=under_way, tiled=tiled)
    if recomputed or store is not None:
        engine.handle_activations(recomputed, store, config.memory.activation_min_bytes)
    engine.placement, engine.config, engine.plan = decision.where, config, plan
    engine.given_back = present
    root.__dict__[_ATTRIBUTE] = _ENGINES[id(engine)] = engine
    return engine


def needs_no_others(ranks: Ranks | None) -> bool:
    """Whether this rank trains the model alone."""
    return ranks is None or ranks.world_size == 1


def _tiled(root: nn.Module, config: PartitionConfig, free: _Free, aliased: bool) -> list[TiledParameter]:
    """Cut what is too large into tiles, which have no values yet."""
    limit = config.tiling.max_tile_bytes
    if limit == "auto":
        memory = config.memory
        budget = (memory.host_bytes, free.host) if aliased else (memory.device_bytes, free.device)
        limit = tile_limit(*budget)
    compute = COMPUTE_DTYPES[config.precision].itemsize
    plans = plan_tiles(root, limit, lambda p: compute if p.dtype == torch.float32 else p.dtype.itemsize)
    return [TiledParameter(p.name, p.param, p.grid, p.modules, config.device) for p in plans]


def _plans_of_tiles(tiled: Sequence[TiledParameter]) -> list[UnitPlan]:
    """Return a unit for each tile."""
    return [
        UnitPlan(f"{t.name}[{number}]", module, [(t.name, module.weight)])
        for t in tiled
        for number, module in enumerate(t.modules)
    ]


@dataclass(frozen=True)
class _Free:
    """Free bytes for a rank, the least of all ranks: what is decided by them has to be the same everywhere."""

    host: int
    device: int


def _free_everywhere(device: torch.device, comm: Collectives | None, threads: int) -> _Free:
    host = max(0, free_host_bytes() - threads)
    on_device = host if device.type == "cpu" else free_device_bytes(device)
    if comm is None:
        return _Free(host, on_device)
    ranks = comm.ranks
    shared = on_device // ranks.local_size if device.type == "cpu" else on_device
    return _Free(*least([host // ranks.local_size, shared], ranks.channel, "setting up the model"))


def _machine(config: PartitionConfig, free: _Free, comm: Collectives | None, *, aliased: bool) -> Machine:
    """Return what is free here, as the planner has it; ranks that share one copy of the model count."""
    ranks, local = (
        (1, 1) if comm is None else (comm.ranks.shard_size, min(comm.ranks.local_size, comm.ranks.shard_size))
    )
    local = local if ranks % local == 0 else ranks
    on_device = 0 if aliased else free.device
    paths = config.nvme_paths  # striped evenly, so the fullest limits
    disk = len(paths) * min(map(free_disk_bytes, paths)) // (1 if comm is None else comm.ranks.local_size) * local
    return Machine("this machine", on_device, free.host * local, disk, Rates(), local, ranks // local, aliased)


def _move_others(root: nn.Module, managed: set[int], device: torch.device) -> None:
    """Move the parameters to the device that no buffer has: those of dtypes that are not trained."""
    for param in root.parameters():
        if id(param) not in managed and not isinstance(param, paging.Released):
            param.data = param.data.to(device)


def _present_bytes(root: nn.Module) -> int:
    """Return the bytes of parameters that are in host memory now, and go when they are partitioned.

    What is in a mapped file is not memory that was taken.
    """
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in root.parameters()
        if not isinstance(p, paging.Released) and p.is_cpu and not p.is_shared()
    }
    return sum(storages.values())


def _taken_bytes(root: nn.Module, pagers: Sequence[SharedPager], comm: Collectives | None) -> int:
    """Return the bytes of host memory of a model and of slices of its parameters, which go when it is partitioned."""
    taken = _present_bytes(root) + sum(pager.kept_bytes for pager in pagers)
    if comm is not None:  # what is planned with it has to be the same on all ranks
        (taken,) = least([taken], comm.ranks.channel, "planning")
    return taken


def _refuse_what_does_not_fit(plan: Plan, present: int, *, training: bool) -> None:
    """Raise ValueError, with the plan's table and what to change, if memory is too small.

    Args:
        plan: The plan.
        present: Bytes of host memory that are taken now and will be free.
        training: Whether gradients will come, and with them optimizer state.
    """
    from lightning_zinf.planning.report import human, refusal

    if plan.problem is not None:
        raise ValueError(f"{plan.problem}\n{refusal(plan)}")
    here = present * plan.machine.ranks_per_node
    short = [t for t in plan.tiers if t.tier != "nvme" and t.needed > t.available + (here if t.tier == "host" else 0)]
    if training and short:
        raise ValueError(
            f"the model does not fit: a step needs {human(short[0].needed)} of {short[0].tier} memory, and "
            f"{human(short[0].available)} are free\n{refusal(plan)}"
        )


def options_of(config: PartitionConfig) -> PlanOptions:
    """Return what of a configuration decides where everything rests."""
    return PlanOptions(
        config.offload_params,
        config.offload_optimizer,
        config.stage,
        host_bytes=config.memory.host_bytes,
        device_bytes=config.memory.device_bytes,
        tile_numel=config.io.tile_numel,
        recompute=bool(config.activation_checkpointing),
        offload_activations=config.offload_activations,
    )


class _Builder:
    """Builds buffers one unit after the other, so that no more than one unit is in memory twice.

    Args:
        config: How to do it.
        context: What the buffers share.
        decision: What rests where, unit by unit in the order of the drafts.
        drafts: The buffers.
        tiled: The parameters whose tiles are in some of them.
    """

    def __init__(
        self,
        config: PartitionConfig,
        context: EngineContext,
        decision: Decision,
        drafts: Sequence[Draft],
        tiled: Sequence[TiledParameter] = (),
    ) -> None:
        self._tiles = {id(tile): (t, i) for t in tiled for i, tile in enumerate(t.tiles)}
        self._config = config
        self._context = context
        self._decision = decision
        self._drafts = drafts
        plans = list({id(d.plan): d.plan for d in drafts}.values())
        tiers = zip(decision.params, decision.optimizer, strict=True)
        self._tiers = {id(plan): both for plan, both in zip(plans, tiers, strict=True)}

    def _tiers_of(self, draft: Draft) -> tuple[Tier, Tier]:
        """Return where a buffer's weights rest, and its state."""
        params, optimizer = self._tiers[id(draft.plan)]
        return params, optimizer if draft.learns else params

    def install(self) -> None:
        """Make the rings that were decided on, and reserve the room on NVMe."""
        make_rings(self._config, self._context, self._decision, self._decision.on_nvme)

    def build(self, plans: Sequence[UnitPlan]) -> list[Unit]:
        """Build every unit, the root's last."""
        by_plan: dict[int, list[FlatBuffer]] = {id(plan): [] for plan in plans}
        for draft in self._progress(self._drafts):
            by_plan[id(draft.plan)].append(self._buffer(draft))
        kept = [p for p in plans if by_plan[id(p)] and p.name] + [p for p in plans if not p.name]
        return [Unit(i, p.name, p.module, by_plan[id(p)]) for i, p in enumerate(kept)]

    def _progress(self, drafts: Sequence[Draft]) -> Iterator[Draft]:
        if sum(d.padded * d.compute_dtype.itemsize for d in drafts) < _SHOW_PROGRESS_BYTES or not sys.stderr.isatty():
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
            buffer.state = context.new_state(buffer.shard_numel, draft.planes, state, label)
        self._settle(buffer, master)
        if context.spills and draft.learns:
            assert context.comm is None
            buffer.gradients = SpilledGradients(buffer)
        return buffer

    def _take_values(self, buffer: FlatBuffer) -> Tensor:
        """Move the parameters' values into one flat tensor of the user's dtype: from here on it is the only copy."""
        flat = self._context.scratch(buffer.layout.padded_numel, buffer.view_dtype).zero_()
        with torch.no_grad():
            for param, view in zip(buffer.params, buffer.views_of(flat), strict=True):
                if id(param) in self._tiles:
                    whole, number = self._tiles[id(param)]
                    view.copy_(whole.take(number))
                    whole.taken(number)
                    param.data = torch.empty(0, dtype=buffer.view_dtype)
                    continue
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
        give_weights(buffer)
        if buffer.view_dtype == torch.float32 and buffer.split:
            buffer.write_master(values)
        elif buffer.split:
            buffer.write_master(values.float())
        else:
            buffer.weights.flat().copy_(values)
            buffer.weights.store()
        settle(buffer)


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
    store = engine.context.activations
    if store is not None and store.nvme is not None:
        place += f" (by way of {store.budget / 2**20:.0f} MiB of host memory)"
    if not count:
        return f"activations on {place}"
    return f"{count} modules are recomputed in backward, their inputs on {place}"
