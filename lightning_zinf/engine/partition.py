"""Partition a model: cut it into units, place every plane, and hand the parameters to the engine."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_zinf import parameters as paging
from lightning_zinf.config import IOConfig, MemoryConfig, Offload, OverlapConfig
from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.engine import Engine
from lightning_zinf.engine.residence import AliasedWeights, DeviceWeights
from lightning_zinf.engine.units import Unit, UnitPlan, find_units
from lightning_zinf.memory.heap import large_blocks_apart
from lightning_zinf.memory.machine import free_device_bytes, free_host_bytes
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.memory.placement import ModelSize, Placement, place, slot_budget, table, tile_count
from lightning_zinf.memory.slots import Slot, SlotRing
from lightning_zinf.memory.state import NvmeState, Plane
from lightning_zinf.memory.tiles import TileRing
from lightning_zinf.monitor.counters import Counters

Precision = Literal["32-true", "bf16-mixed"]
_FULL_PRECISION_MODULES = (nn.modules.batchnorm._BatchNorm,)
"""Their kernels want float32 parameters beside their float32 running statistics, as FSDP keeps them too."""
_SHOW_PROGRESS_BYTES = 512 * 2**20

_ENGINES: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
_ATTRIBUTE = "_zinf_engine"
"""Where a model keeps its engine, so that both go together."""
T = TypeVar("T")


@dataclass(frozen=True)
class PartitionConfig:
    """What decides how a model is partitioned; an engine is reused while this stays the same.

    Attributes:
        device: Where compute runs.
        precision: Lightning's name of the precision.
        offload_params: Where weights rest.
        offload_optimizer: Where optimizer state rests.
        nvme_path: Folder for what goes to NVMe.
        units: Class names of modules to take as units.
        memory: Budgets.
        overlap: What runs ahead.
        io: How files are read and written.
        aliased: Whether host and device are one memory; None means: on a CPU.
    """

    device: torch.device
    precision: Precision = "32-true"
    offload_params: Offload = "auto"
    offload_optimizer: Offload = "auto"
    nvme_path: str = "zinf_nvme"
    units: tuple[str, ...] = ()
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    io: IOConfig = field(default_factory=IOConfig)
    aliased: bool | None = None


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


def partition(root: nn.Module, config: PartitionConfig, trained: Iterable[nn.Parameter] = ()) -> Engine:
    """Hand a model's parameters to an engine.

    Args:
        root: The model. Its parameters keep their identity; their values move to where the plan has them.
        config: How to do it.
        trained: The parameters that an optimizer will update.

    Raises:
        ValueError: If the model has parameters that cannot be partitioned, or the budgets are too small.
        OSError: If the NVMe folder cannot be used or is too small.
    """
    plans = find_units(root, config.memory.unit_bytes, config.units)
    trained_ids = {id(p) for p in trained}
    check_parameters(root, trained_ids)
    counters = Counters()
    drafts = _draft(plans, config, trained_ids)
    size = _measure(drafts)
    cpu = config.device.type == "cpu" if config.aliased is None else config.aliased
    where = place(
        size,
        config.offload_params,
        config.offload_optimizer,
        device_free=free_device_bytes(config.device),
        host_free=free_host_bytes(),
        cpu=cpu,
    )
    context = EngineContext(config.device, counters, where.optimizer, config.aliased)
    builder = _Builder(config, context, where, size)
    try:
        builder.install(drafts)
        with large_blocks_apart():
            units = builder.build(plans, drafts)
            context.drop_scratch()
    except BaseException:
        context.close()
        raise
    engine = Engine(root, units, context, prefetch=config.overlap.prefetch)
    engine.placement, engine.config = where, config
    root.__dict__[_ATTRIBUTE] = _ENGINES[id(engine)] = engine
    return engine


def check_parameters(root: nn.Module, trained: Collection[int]) -> None:
    """Refuse parameters that cannot be partitioned.

    Raises:
        ValueError: With the parameter's name and what to do.
    """
    for name, param in root.named_parameters():
        if isinstance(param, nn.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is lazy and has no shape yet: run one forward before training")
        if isinstance(param, paging.Released):  # built under paged_construction
            continue
        kind = type(param.data)
        if kind not in (Tensor, nn.Parameter):
            raise ValueError(
                f"parameter {name!r} is a {kind.__module__}.{kind.__qualname__}: the zinf strategy partitions plain "
                "tensors only (DTensor parameters of tensor parallelism and quantized subclasses are not supported)"
            )
        if id(param) in trained and param.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"parameter {name!r} has dtype {param.dtype}, which the zinf strategy does not train: use float32 or "
                "bfloat16"
            )


@dataclass
class _Draft:
    """A flat buffer that is to be built."""

    plan: UnitPlan
    names: list[str]
    params: list[nn.Parameter]
    compute_dtype: torch.dtype
    trained: bool

    @property
    def split(self) -> bool:
        return self.compute_dtype == torch.bfloat16

    @property
    def padded(self) -> int:
        from lightning_zinf.layout import FlatLayout

        return FlatLayout.build([p.shape for p in self.params], self.compute_dtype.itemsize).padded_numel

    @property
    def planes(self) -> tuple[Plane, ...]:
        low: tuple[Plane, ...] = ("residual",) if self.split else ()
        return low + (("exp_avg", "exp_avg_sq") if self.trained else ())


def _draft(plans: Sequence[UnitPlan], config: PartitionConfig, trained: Collection[int]) -> list[_Draft]:
    """Sort each unit's parameters into buffers by dtype and by whether an optimizer updates them."""
    full = {
        id(p)
        for plan in plans
        for m in plan.module.modules()
        if isinstance(m, _FULL_PRECISION_MODULES)
        for p in m.parameters(recurse=False)
    }
    drafts: list[_Draft] = []
    for plan in plans:
        groups: dict[tuple[torch.dtype, torch.dtype, bool], _Draft] = {}
        for name, param in plan.params:
            if param.dtype not in (torch.float32, torch.bfloat16):
                continue  # stays where it is, on the device
            compute = param.dtype
            if config.precision == "bf16-mixed" and id(param) not in full:
                compute = torch.bfloat16
            key = (compute, param.dtype, id(param) in trained)
            draft = groups.setdefault(key, _Draft(plan, [], [], compute, key[2]))
            draft.names.append(name)
            draft.params.append(param)
        drafts.extend(groups.values())
    return drafts


def _measure(drafts: Sequence[_Draft]) -> ModelSize:
    units: dict[int, int] = {}
    weights = state = gradients = 0
    for draft in drafts:
        nbytes = draft.padded * draft.compute_dtype.itemsize
        weights += nbytes
        gradients += nbytes if draft.trained else 0
        state += NvmeState.bytes_needed(draft.padded, draft.planes)
        units[id(draft.plan)] = units.get(id(draft.plan), 0) + nbytes
    root = next((n for d in drafts if d.plan.name == "" and (n := units[id(d.plan)])), 0)
    return ModelSize(weights, state, gradients, max(units.values(), default=0), root)


class _Builder:
    """Builds buffers one unit after the other, so that no more than one unit is in memory twice."""

    def __init__(self, config: PartitionConfig, context: EngineContext, where: Placement, size: ModelSize) -> None:
        self._config = config
        self._context = context
        self._where = where
        self._size = size
        aliased = context.aliased
        self._paged = where.params == "nvme" or (where.params == "host" and not aliased)

    def _state_tier(self, draft: _Draft) -> str:
        return self._where.optimizer if draft.trained else self._where.params

    def install(self, drafts: Sequence[_Draft]) -> None:
        """Make the rings and reserve the room on NVMe that the plan needs."""
        config, context, size = self._config, self._context, self._size
        memory = config.memory
        on_nvme = size.weights if self._where.params == "nvme" else 0
        on_nvme += sum(NvmeState.bytes_needed(d.padded, d.planes) for d in drafts if self._state_tier(d) == "nvme")
        host_asked = memory.host_bytes
        if "nvme" in (self._where.params, self._where.optimizer):
            store = NvmeStore(config.nvme_path, config.io, context.counters)
            context.install(nvme=store)
            store.reserve(on_nvme)
            width = 10 if any(d.split for d in drafts) else 8
            numel = min(config.io.tile_numel, max((d.padded for d in drafts), default=4096))
            largest = max((NvmeState.bytes_needed(d.padded, d.planes) for d in drafts), default=0)
            share = None if host_asked is None else host_asked // 3
            tiles = tile_count(
                share, numel * width, largest if self._where.optimizer == "nvme" else 0, free_host_bytes()
            )
            ring = TileRing(tiles, numel, width, context.allocate_host, context.counters)
            context.install(tiles=ring)
            host_asked = None if host_asked is None else host_asked - ring.nbytes
        if not self._paged:
            return
        if context.aliased:
            budget = slot_budget(size, host_asked, free_host_bytes(), "memory.host_bytes")
            context.install(ring=SlotRing(budget, context.allocate_device, context.counters))
            return
        budget = slot_budget(size, memory.device_bytes, free_device_bytes(config.device), "memory.device_bytes")
        context.install(ring=SlotRing(budget, context.allocate_device, context.counters))
        if self._where.params == "nvme":
            staging = slot_budget(size, host_asked, free_host_bytes(), "memory.host_bytes")
            context.install(staging=SlotRing(staging, context.allocate_host, context.counters))

    def build(self, plans: Sequence[UnitPlan], drafts: Sequence[_Draft]) -> list[Unit]:
        """Build every unit, the root's last."""
        by_plan: dict[int, list[FlatBuffer]] = {id(plan): [] for plan in plans}
        for draft in self._progress(drafts):
            by_plan[id(draft.plan)].append(self._buffer(draft))
        kept = [p for p in plans if by_plan[id(p)] and p.name] + [p for p in plans if not p.name]
        return [Unit(i, p.name, p.module, by_plan[id(p)]) for i, p in enumerate(kept)]

    def _progress(self, drafts: Sequence[_Draft]) -> Iterator[_Draft]:
        if self._size.weights < _SHOW_PROGRESS_BYTES or not sys.stderr.isatty():
            yield from drafts
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(drafts, "Partitioning", console=Console(stderr=True), transient=True)

    def _buffer(self, draft: _Draft) -> FlatBuffer:
        context = self._context
        label = "/".join([draft.plan.name or "<root>", str(draft.compute_dtype).removeprefix("torch.")])
        buffer = FlatBuffer(label, draft.names, draft.params, draft.compute_dtype, context)
        master = self._take_values(buffer)
        if draft.planes:
            tier = self._where.optimizer if draft.trained else self._where.params
            buffer.state = context.new_state(buffer.layout.padded_numel, draft.planes, tier)
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
        buffer.adopt()
        return flat

    def _settle(self, buffer: FlatBuffer, values: Tensor) -> None:
        """Put the weights where they rest, and bind or release the parameters."""
        context = self._context
        aliased = context.aliased
        nvme = context.nvme.allocate(buffer.weight_bytes) if self._where.params == "nvme" else None
        if aliased:
            slot = None if self._paged else Slot(context.allocate_device(buffer.weight_bytes))
            buffer.weights = AliasedWeights(buffer, slot, nvme)
        else:
            slot = None if self._paged else Slot(context.allocate_device(buffer.weight_bytes))
            keeps_copy = self._where.params == "host" or (slot is not None and self._where.optimizer != "device")
            plane = context.allocate_host(buffer.weight_bytes).view(buffer.compute_dtype) if keeps_copy else None
            buffer.weights = DeviceWeights(buffer, slot, plane, nvme)
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
    weights = sum(b.weight_bytes for b in buffers)
    rows.append(("weights", engine.placement.params, weights))
    for plane, itemsize in (("residual", 2), ("exp_avg", 4), ("exp_avg_sq", 4)):
        nbytes = sum(b.layout.padded_numel * itemsize for b in buffers if b.state and plane in b.state.planes)
        if nbytes:
            rows.append((plane, engine.placement.optimizer, nbytes))
    rows.extend(engine.context.pages())
    return rows


def describe(engine: Engine) -> str:
    """Return the table of what lives where."""
    return table(residency(engine))


def default_nvme_path(given: str | os.PathLike[str] | None, root: str | os.PathLike[str]) -> str:
    """Return the folder for NVMe files: the option, else $ZINF_NVME_PATH, else one below the Trainer's root."""
    return str(given or os.environ.get("ZINF_NVME_PATH") or Path(root) / "zinf_nvme")
