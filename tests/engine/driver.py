"""Drives the engine without Lightning, as the strategy does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from models import Case
from oracle import Recipe, Result, autocast, put_state
from torch import Tensor, nn

from lightning_zinf.comm.group import Ranks
from lightning_zinf.config import IOConfig, MemoryConfig, Offload, OffloadActivations, OverlapConfig, TilingConfig
from lightning_zinf.engine.engine import Engine
from lightning_zinf.engine.partition import PartitionConfig, partition
from lightning_zinf.engine.units import find_units
from lightning_zinf.layout import FlatLayout
from lightning_zinf.optim.binding import OptimizerBinding
from lightning_zinf.optimizers import planes_of, rules_of
from lightning_zinf.tiling.plan import plan_tiles

CPU = torch.device("cpu")
TILE = 8192
BATCH_NORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Where:
    """Where things live.

    Attributes:
        params: Option ``offload_params``.
        optimizer: Option ``offload_optimizer``.
        aliased: False runs the code of an accelerator with memory of its own.
        tight: Give pages the least memory there is.
        prefetch: Option ``overlap.prefetch``.
        recompute: Option ``activation_checkpointing``.
        activations: Option ``offload_activations``; whatever autograd saves is large enough.
        activation_bytes: Option ``memory.activation_bytes``.
        early: Let steps be taken in backward, where the recipe does not clip.
        ahead: Sum the squares of gradients as they are complete, where it clips by norm.
        update: Option ``overlap.update``.
        share: Allow so much host memory, as a share of all planes and gradients, and leave the rest to the engine.
    """

    params: Offload = "none"
    optimizer: Offload = "none"
    aliased: bool | None = None
    tight: bool = False
    prefetch: bool = True
    recompute: bool | tuple[str, ...] = False
    activations: OffloadActivations = "none"
    activation_bytes: int | None = None
    share: float | None = None
    early: bool = False
    ahead: bool = False
    update: Literal["auto", "forward", "step"] = "auto"

    def __str__(self) -> str:
        flags = ["device"] * (self.aliased is False) + ["tight"] * self.tight + ["on-demand"] * (not self.prefetch)
        flags += ["early"] * self.early + ["ahead"] * self.ahead + [self.update] * (self.update != "auto")
        flags += [f"share-{self.share:g}"] if self.share is not None else []
        return "-".join([self.params, self.optimizer, *flags])


def buffer_sizes(
    module: nn.Module, precision: str, units: tuple[str, ...], shards: int = 1, tile_bytes: int | None = None
) -> dict[str, list[tuple[int, int]]]:
    """Return ``(elements, bytes of one)`` of each unit's flat buffers, by the layout's arithmetic alone."""
    found: dict[str, list[tuple[int, int]]] = {}
    whole = {id(p) for m in module.modules() if isinstance(m, BATCH_NORM) for p in m.parameters(recurse=False)}
    width = 4 if precision == "32-true" else 2
    tiled = plan_tiles(module, tile_bytes, lambda p: min(width, p.dtype.itemsize))
    for tile_plan in tiled:
        itemsize = min(width, tile_plan.param.dtype.itemsize)
        for number, shape in enumerate(tile_plan.grid.shapes(tuple(tile_plan.param.shape[1:]))):
            numel = FlatLayout.build([shape], itemsize, shards).padded_numel
            found[f"{tile_plan.name}[{number}]"] = [(numel, itemsize)]
    for plan in find_units(module, MemoryConfig().unit_bytes, units, {id(t.param) for t in tiled}):
        groups: dict[tuple[object, ...], list[nn.Parameter]] = {}
        for _, param in plan.params:
            low = param.dtype == torch.bfloat16 or (precision != "32-true" and id(param) not in whole)
            groups.setdefault((2 if low else 4, param.dtype, param.requires_grad), []).append(param)
        found[plan.name] = [
            (FlatLayout.build([p.shape for p in params], itemsize, shards).padded_numel, itemsize)
            for (itemsize, *_), params in groups.items()
        ]
    return found


def tight_memory(
    module: nn.Module,
    precision: str,
    units: tuple[str, ...],
    shards: int = 1,
    kept: int = 8,
    tile_bytes: int | None = None,
) -> MemoryConfig:
    """Return about the least memory that pages can do with: the largest unit beside the root's, and two tiles."""
    sizes = buffer_sizes(module, precision, units, shards, tile_bytes)
    totals = {name: sum(numel * itemsize for numel, itemsize in buffers) for name, buffers in sizes.items()}
    least = max(totals.values()) + (totals[""] if max(totals.values()) != totals[""] else 0)
    buffers = [buffer for unit in sizes.values() for buffer in unit]
    low = (4 if precision == "16-mixed" else 2) if any(itemsize == 2 for _, itemsize in buffers) else 0
    tile = min(TILE, max(numel for numel, _ in buffers)) * (max(kept, 8) + low)
    # A third may go to tiles.
    return MemoryConfig(host_bytes=max(least + 2 * tile, -(-least * 3 // 2)), device_bytes=least)


def part_of_memory(module: nn.Module, precision: str, units: tuple[str, ...], share: float) -> MemoryConfig:
    """Return a budget that has room for some of the planes beside what they pass through."""
    least = tight_memory(module, precision, units)
    sizes = [buffer for unit in buffer_sizes(module, precision, units).values() for buffer in unit]
    every = sum(numel * (2 * itemsize + 8 + (2 if itemsize == 2 else 0)) for numel, itemsize in sizes)
    return MemoryConfig(
        host_bytes=max(int(share * every), least.host_bytes or 0),
        device_bytes=(least.device_bytes or 0) + int(share * every) // 2,
    )


def least_memory(case: Case, precision: str) -> MemoryConfig:
    """Return room for the largest unit beside the root's, and for two small tiles."""
    totals = {
        name: sum(numel * itemsize for numel, itemsize in buffers)
        for name, buffers in buffer_sizes(case.make(), precision, case.units).items()
    }
    least = max(totals.values()) + totals[""]
    width = {"32-true": 8, "16-mixed": 12}.get(precision, 10)  # bytes of state of an element
    return MemoryConfig(host_bytes=least + 2 * 4096 * width, device_bytes=least)


@dataclass
class Session:
    """A paged model with its optimizer."""

    model: nn.Module
    engine: Engine
    binding: OptimizerBinding
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    case: Case
    recipe: Recipe
    precision: str
    number: int = 0
    stride: int = 1
    early: bool = False
    ahead: bool = False
    losses: list[float] = field(default_factory=list)

    def forward(self, loss: Callable[[], Tensor] | None = None, kind: str = "train") -> Tensor:
        """Compute a loss inside of a frame: the next micro-batch's, or what ``loss`` returns."""
        number = self.number
        device = self.engine.config.device
        with self.engine.frame(kind) as outputs, autocast(self.precision, device.type):
            if loss is None:
                batch = tuple(part.to(device) for part in self.case.batch(number))
                result = self.case.loss(self.model, batch, number) / self.recipe.accumulate
            else:
                result = loss()
            outputs.append(result)
        return result

    def backward(self, loss: Tensor) -> None:
        """Run backward, with room for the gradients."""
        self.engine.before_backward()
        try:
            loss.backward()
        except BaseException:
            self.engine.after_backward(failed=True)
            raise
        self.engine.after_backward()

    def micro_step(self, loss: Callable[[], Tensor] | None = None) -> float:
        """Forward and backward of a micro-batch."""
        result = self.forward(loss)
        self.backward(result)
        self.number += self.stride
        self.losses.append(float(result.detach()))
        return self.losses[-1]

    def update(self) -> None:
        """Clip, step the optimizer and the schedule."""
        if self.recipe.clip_norm is not None:
            self.binding.clip_by_norm(self.recipe.clip_norm)
        if self.recipe.clip_value is not None:
            self.binding.clip_by_value(self.recipe.clip_value)
        self.optimizer.step()
        self.schedule.step()

    def step(self) -> None:
        """One optimizer step over its micro-batches."""
        self.optimizer.zero_grad()
        for _ in range(self.recipe.accumulate - 1):
            self.micro_step()
        if self.early and self.recipe.clip_norm is None and self.recipe.clip_value is None:
            self.binding.early = True
            self.optimizer.step(self.micro_step)
            self.schedule.step()
        else:
            self.binding.wants_norm = self.ahead and self.recipe.clip_norm is not None
            with self.binding.norm_ahead():
                self.micro_step()
            self.update()

    def train(self, steps: int | None = None) -> Session:
        for _ in range(self.recipe.steps if steps is None else steps):
            self.step()
        return self

    def result(self) -> Result:
        """Read everything back, plane by plane."""
        engine, result = self.engine, Result(list(self.losses))
        engine.flush()
        for unit in engine.units:
            for buffer in unit.buffers:
                with engine.loaded(unit):
                    masters = buffer.views_of(buffer.read_master())
                for name, origin, master in zip(buffer.names, buffer.origins, masters, strict=True):
                    whole = result.masters.setdefault(name, torch.empty(origin.shape, dtype=master.dtype))
                    origin.put(whole, master)
        names = {id(p): n for n, p in self.model.named_parameters()}
        params = [p for g in self.optimizer.param_groups for p in g["params"]]
        states = self.optimizer.state_dict()["state"]
        for number, param in enumerate(params):
            state = states.get(number)
            result.counts[names[id(param)]] = int(state.get("step", 0)) if state else 0
            if state:
                put_state(result, names[id(param)], param, state)
        result.counts = {n: result.counts.get(n, 0) for n in result.masters}
        order = [name for name, _ in self.model.named_parameters()]
        result.masters = {n: result.masters[n] for n in order}
        return result


@contextmanager
def session(
    case: Case,
    folder: Path,
    where: Where | None = None,
    precision: str = "32-true",
    recipe: Recipe | None = None,
    *,
    model: nn.Module | None = None,
    memory: MemoryConfig | None = None,
    io: IOConfig | None = None,
    nvme: tuple[str, ...] = (),
    ranks: Ranks | None = None,
    stage: int = 3,
    shard: int | None = None,
    device: torch.device = CPU,
) -> Iterator[Session]:
    """Partition a model of the zoo, and give everything back at the end."""
    where, recipe = where or Where(), recipe or Recipe()
    model = case.make() if model is None else model
    for module in model.modules():
        module._buffers.update({name: b if b is None else b.to(device) for name, b in module._buffers.items()})
    optimizer = recipe.build(model.parameters())
    schedule = recipe.schedule(optimizer)
    names = planes_of([optimizer], rules_of([optimizer]))
    if memory is None:
        shards = 1 if ranks is None else ranks.shard_size
        kept = 4 * max(len(planes) for planes in names.values())
        memory = (
            tight_memory(model, precision, case.units, shards, kept, case.tile_bytes) if where.tight else MemoryConfig()
        )
        if where.share is not None:
            memory = part_of_memory(model, precision, case.units, where.share)
    memory = replace(memory, activation_bytes=where.activation_bytes, activation_min_bytes=1)
    config = PartitionConfig(
        device=device,
        precision=precision,  # type: ignore[arg-type]
        offload_params=where.params,
        offload_optimizer=where.optimizer,
        nvme_paths=nvme or (str(folder / "nvme"),),
        units=case.units,
        memory=memory,
        overlap=OverlapConfig(prefetch=where.prefetch, update=where.update),
        tiling=TilingConfig(case.tile_bytes),
        io=io or IOConfig(tile_numel=TILE, threads=2, backend="threads"),
        aliased=where.aliased,
        stage=stage,
        shard_size=shard,
        activation_checkpointing=where.recompute,
        offload_activations=where.activations,
    )
    trained = [p for g in optimizer.param_groups for p in g["params"]]
    engine = partition(model, config, trained, ranks, names)
    try:
        binding = OptimizerBinding(optimizer, engine)
        first, world = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
        yield Session(
            model,
            engine,
            binding,
            optimizer,
            schedule,
            case,
            recipe,
            precision,
            number=first,
            stride=world,
            early=where.early,
            ahead=where.ahead,
        )
    finally:
        engine.context.close()


def train_paged(
    case: Case, folder: Path, where: Where, precision: str, recipe: Recipe, memory: MemoryConfig | None = None
) -> Result:
    """Train a model of the zoo on the engine."""
    with session(case, folder, where, precision, recipe, memory=memory) as running:
        return running.train().result()


__all__ = ["CPU", "TILE", "Session", "Where", "buffer_sizes", "least_memory", "session", "tight_memory", "train_paged"]
