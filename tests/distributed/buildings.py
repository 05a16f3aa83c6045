"""What the ranks of a test do while they build a model together."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import construction_models
import torch
import torch.distributed as dist
from construction_models import SIDE, WEIGHT, expected_of, plain, values_of
from pool import PATIENCE
from torch import Tensor, nn

from lightning_zinf import full_state_dict
from lightning_zinf.comm.group import ranks_of
from lightning_zinf.config import IOConfig, MemoryConfig, PartitionConfig
from lightning_zinf.engine import construction
from lightning_zinf.engine.construction import paged_construction, shared_budget
from lightning_zinf.engine.pages import SMALLEST_PAGE
from lightning_zinf.engine.partition import partition
from lightning_zinf.engine.shared_pages import SharedPager
from lightning_zinf.layout import FlatLayout
from lightning_zinf.parameters import Released, owner_of


class Deep(construction_models.Deep):
    """Copies from and to weights that are cut."""

    depth = 12

    def copy_weights(self) -> None:
        with torch.no_grad():
            self.late.weight.copy_(self.blocks[0].weight)
            self.blocks[5].weight.copy_(self.blocks[1].weight.t())  # neither is here
            self.blocks[2].weight[3] = 7.0
            self.blocks[3].weight.add_(self.blocks[2].weight)  # of which one is here


def late() -> nn.Module:
    return Deep(init=False)


def halved() -> nn.Module:
    """What was cut is made another dtype, and then used."""
    model = plain(20).to(torch.bfloat16)
    for layer in model:
        nn.init.normal_(layer.weight)
    return model


def narrow() -> nn.Module:
    """Parameters that are bfloat16 from the start."""
    return nn.Sequential(*[nn.Linear(SIDE, SIDE, dtype=torch.bfloat16) for _ in range(20)])


def padded() -> nn.Module:
    """Weights of 99 KiB that fill no whole number of pages, of which some are used again when all are made."""
    model = nn.Sequential(*[nn.Linear(*sides, bias=False) for sides in [(131, 193), (193, 131)] * 6])
    with torch.no_grad():
        for layer in model[::2]:
            nn.init.normal_(layer.weight)
        model[1].weight.copy_(model[7].weight)
        model[3].weight[5] += 1.0
    return model


def loaded() -> nn.Module:
    """A state dict is loaded into what was cut."""
    model = Deep()
    values = {n: torch.randn(v.shape) for n, v in model.state_dict().items()}
    model.load_state_dict(values)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "deep": Deep,
    "late": late,
    "plain": plain,
    "halved": halved,
    "narrow": narrow,
    "padded": padded,
    "loaded": loaded,
}


def config_of(folder: Path, offload: str, budget: int = 4 * WEIGHT, **options: Any) -> PartitionConfig:
    memory = MemoryConfig(host_bytes=2 * budget)
    io = IOConfig(tile_numel=4096, threads=2, backend="threads")
    return PartitionConfig(
        torch.device("cpu"), "32-true", offload, "cpu", (str(folder / "nvme"),), memory=memory, io=io, **options
    )


def slices_of(model: nn.Module, size: int) -> int:
    """Return the bytes of one rank's slices of the parameters that are cut."""
    cut = [p for p in model.parameters() if owner_of(p) is not None]
    return sum(FlatLayout.build([tuple(p.shape)], p.dtype.itemsize, size).shard_numel * p.dtype.itemsize for p in cut)


def build(
    rank: int, size: int, folder: Path, name: str, offload: str, options: dict[str, Any], seeds: bool, stage: int = 3
) -> dict[str, Any]:
    """Build and partition a model; return its values at three times, and what was counted.

    Args:
        seeds: Whether each rank has a seed of its own.
    """
    budget = options.pop("budget", 4 * WEIGHT)
    config = config_of(folder, offload, budget, stage=stage, **options)
    ranks = ranks_of(config.shard_size, PATIENCE, size)
    torch.manual_seed(3 + (rank if seeds else 0))
    with paged_construction(config, size, ranks) as pager:
        model = MODELS[name]()
        generator = torch.get_rng_state()
        budgeted = 0 if pager is None else pager._live_bytes
    seen: dict[str, Any] = {"generator": generator, "pages": 0 if pager is None else pager.pages}
    if isinstance(pager, SharedPager):
        cut = slices_of(model, ranks.shard_size)
        if offload == "nvme":
            assert pager.kept_bytes == 0
            assert pager.context.nvme.allocated_bytes == cut or name == "halved"  # which were cut as float32 before
        else:
            assert pager.kept_bytes == cut
            assert not pager.context.has_nvme
        assert budgeted <= max(WEIGHT, shared_budget(config))
        assert pager.pages >= 4
    seen["built"] = values_of(model)
    engine = partition(model, replace(config, memory=MemoryConfig()), list(model.parameters()), ranks)
    assert pager is None or pager.pages == 0
    assert not isinstance(pager, SharedPager) or pager.kept_bytes == 0
    seen["partitioned"] = full_state_dict(model)
    seen["names"] = [n for n, _ in model.named_parameters()]
    engine.dissolve()
    return seen


def plainly(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return what one process would build with rank 0's seed, and its random generator."""
    return expected_of(MODELS[name])


# ---------------------------------------------------------------------- ranks that do not do the same


def unequal(rank: int, size: int, folder: Path, kind: str) -> dict[str, Any]:
    """Rank 0 or 1 does something alone while the model is built; return the values, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _unequal(rank, size, folder, kind)
    said = [str(w.message) for w in caught if "build different parameters" in str(w.message)]
    return {**found, "said": said}


def _unequal(rank: int, size: int, folder: Path, kind: str) -> dict[str, Any]:
    config = config_of(folder, "none")
    ranks = ranks_of(None, PATIENCE, size)
    torch.manual_seed(3)
    read = 0.0
    with paged_construction(config, size, ranks) as pager:
        assert isinstance(pager, SharedPager)
        if rank == 0 and kind.startswith("throwaway"):
            state = torch.get_rng_state()
            Deep(init=False) if "same" in kind else plain(2 if "small" in kind else 8)
            torch.set_rng_state(state)
        if "barrier" in kind:
            pager.meet("a barrier")
        model = Deep(init=False)
        assert pager.pages or (kind.startswith("throwaway") and "barrier" not in kind)
        if rank == 1 and kind == "read":
            read = float(model.blocks[0].weight.detach().sum())
        if rank == 0 and kind == "write":
            nn.init.constant_(model.blocks[0].weight, 5.0)
        if rank == 1 and kind == "lost write":
            nn.init.constant_(model.blocks[0].weight, 5.0)
    if rank == 0 and kind == "read":
        read = float(model.blocks[0].weight.detach().sum())
    engine = partition(model, config, list(model.parameters()), ranks)
    values = full_state_dict(model)
    engine.dissolve()
    return {"values": values, "read": read}


def fail(rank: int, size: int, folder: Path) -> str:
    """Rank 1 raises while the model is built, and all build it again then."""
    config = config_of(folder, "none")
    said = ""
    try:
        with paged_construction(config, size, ranks_of(None, PATIENCE, size)):
            plain()
            if rank == 1:
                raise RuntimeError("broken on purpose")
            plain()
    except RuntimeError as error:
        said = str(error)
    ranks = ranks_of(None, PATIENCE, size)
    with paged_construction(config, size, ranks) as pager:
        model = plain()
    assert pager is not None
    assert pager.pages > 0
    engine = partition(model, config, list(model.parameters()), ranks)
    engine.dissolve()
    return said


def outside(rank: int, size: int, folder: Path) -> tuple[bool, dict[str, Tensor], int]:
    """A second model beside the one that is partitioned becomes an ordinary one."""
    config = config_of(folder, "none")
    ranks = ranks_of(None, PATIENCE, size)
    torch.manual_seed(3)
    with paged_construction(config, size, ranks) as pager:
        teacher, model = plain(), plain()
    assert isinstance(pager, SharedPager)
    was_cut = any(isinstance(p, Released) for p in teacher.parameters())
    engine = partition(model, config, list(model.parameters()), ranks)
    pager.give_back()
    assert not any(isinstance(p, Released) for p in teacher.parameters())
    assert not pager.context.has_nvme
    values = values_of(teacher)
    engine.dissolve()
    return was_cut, values, pager.pages


def partition_again(rank: int, size: int, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Setting up fails on all ranks, after which the ways between them are new; the pages are still good."""
    config = config_of(folder, "none")
    ranks = ranks_of(None, PATIENCE, size)
    torch.manual_seed(3)
    with paged_construction(config, size, ranks):
        model = plain()
    model.register_parameter("odd", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    said = ""
    try:
        partition(model, config, list(model.parameters()), ranks)
    except ValueError as error:
        said = str(error)
    ranks.channel.abort("an earlier failure")
    del model.odd
    dist.barrier()
    engine = partition(model, config, list(model.parameters()), ranks_of(None, PATIENCE, size))
    values = full_state_dict(model)
    engine.dissolve()
    return said, values


def keep_unequally(rank: int, size: int, folder: Path, memory: list[int]) -> dict[str, Any]:
    """Build a model where each rank's slices have room of their own in memory; return where they rest, and values.

    Args:
        rank: This rank.
        size: Number of ranks.
        folder: For files.
        memory: Bytes of slices that stay in memory, by rank.
    """
    config = config_of(folder, "none", 8 * SMALLEST_PAGE)
    ranks = ranks_of(None, PATIENCE, size)
    torch.manual_seed(3 + rank)
    room = mock.patch.object(construction, "construction_budget", return_value=memory[rank])
    with room, paged_construction(config, size, ranks) as pager:
        model = padded()
    assert isinstance(pager, SharedPager)
    pages = {name: owner_of(p) for name, p in model.named_parameters()}
    cut = {name: found[0] for name, found in pages.items() if found is not None}
    seen: dict[str, Any] = {"on_nvme": {name: page.weights.extent is not None for name, page in cut.items()}}
    seen["kept"] = pager.kept_bytes
    values = values_of(model)
    seen["built"] = {name: values[name] for name in cut}
    engine = partition(model, replace(config, memory=MemoryConfig()), list(model.parameters()), ranks)
    seen["partitioned"] = full_state_dict(model)
    engine.dissolve()
    return seen


# ---------------------------------------------------------------------- memory


def _memory(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _peak(*, reset: bool = False) -> int:
    """Return the most resident memory that this process has had since the last reset."""
    peak = _memory("VmHWM")
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return peak


def measure(rank: int, size: int, folder: Path, layers: int, width: int, offload: str) -> dict[str, int]:
    """Build and partition a row of matrices; return what memory grew by at most until each was done, and the slots."""
    io = IOConfig(tile_numel=4096, threads=2, backend="threads")
    memory = MemoryConfig(device_bytes=4 * width * width * 4)
    config = PartitionConfig(
        torch.device("cpu"), "32-true", offload, "cpu", (str(folder / "nvme"),), memory=memory, io=io
    )
    ranks = ranks_of(None, PATIENCE, size)
    found: dict[str, int] = {}
    for count, side in ((4, 1100), (layers, width)):  # the first takes what imports and first calls take
        gc.collect()
        _peak(reset=True)
        before = _memory("VmRSS")
        with paged_construction(config, size, ranks) as pager:
            model = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(count)])
        assert pager is not None
        found = {"building": _peak() - before, "pages": pager.pages}
        engine = partition(model, config, (), ranks)
        found["partitioning"] = _peak() - before
        found["slots"] = sum(nbytes for _, _, nbytes in engine.context.pages())
        found["shards"] = sum(b.weights.host_bytes for u in engine.units for b in u.buffers)
        engine.dissolve()
        del model, engine
    return found
