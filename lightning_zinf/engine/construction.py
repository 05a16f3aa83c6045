"""Building a model that does not fit into memory.

Note [Paged construction]
~~~~~~~~~~~~~~~~~~~~~~~~~
While a model is being built, every parameter is seen as it is registered with its module, before ``reset_parameters``
runs; memory from ``torch.empty`` that nobody touched yet costs nothing. What has been registered stays an ordinary
parameter as long as the total is below the budget. Above it, the oldest ones go to a page each on NVMe. Whatever
touches one later (an ``apply(init)`` at the end, a weight that is tied or copied) brings it back like any released
parameter. So the peak is the budget plus the largest module, and the model's own init code draws the values that it
always drew.

The final partition reads page by page into the units' flat buffers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lightning_zinf import parameters as paging
from lightning_zinf.config import IOConfig, PartitionConfig
from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.residence import AliasedWeights
from lightning_zinf.memory.heap import large_blocks_apart
from lightning_zinf.memory.machine import free_host_bytes
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.memory.placement import COMFORT
from lightning_zinf.memory.slots import SlotRing
from lightning_zinf.monitor.counters import Counters

DEFAULT_BUDGET = 256 * 2**20
"""Most bytes of parameters that stay ordinary while a model is built, unless told otherwise."""
SMALLEST_PAGE = 64 * 2**10
"""Bytes: smaller parameters stay ordinary."""
_CHUNK = 256 * 2**20


class ConstructionPager:
    """Moves parameters of a model under construction to NVMe, oldest first.

    Args:
        folders: Where the pages go.
        budget: Bytes of ordinary parameters, and of pages that were brought back, to keep in memory.
        io: How to read and write.
    """

    def __init__(self, folders: Sequence[str], budget: int, io: IOConfig) -> None:
        self.counters = Counters()
        self.context = EngineContext(torch.device("cpu"), self.counters, aliased=True)
        self.context.fault = self._on_fault
        self.context.retire = self.retire
        self.pages = 0
        self._folders, self._io, self._budget = folders, io, budget
        self._live: dict[int, weakref.ref[nn.Parameter]] = {}
        self._live_bytes = 0
        self._largest = 0
        self._open: dict[FlatBuffer, None] = {}

    def seen(self, module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        """A parameter is being registered with ``module``."""
        if param is None or isinstance(param, paging.Released) or id(param) in self._live:
            return
        pageable = param.device.type == "cpu" and param.dtype in (torch.float32, torch.bfloat16)
        if not pageable or param.nbytes < SMALLEST_PAGE or type(param.data) is not torch.Tensor:
            return
        while self._live and self._live_bytes + param.nbytes > self._budget - self._budget // 4:  # the rest: pages
            self._page_out_oldest()
        self._live[id(param)] = weakref.ref(param)
        self._live_bytes += param.nbytes

    def _page_out_oldest(self) -> None:
        key = next(iter(self._live))
        param = self._live.pop(key)()
        if param is None:  # the module dropped it
            alive = [p for ref in self._live.values() if (p := ref()) is not None]
            self._live = {id(p): weakref.ref(p) for p in alive}
            self._live_bytes = sum(p.nbytes for p in alive)
            return
        self._live_bytes -= param.nbytes
        with torch.inference_mode(False), torch.no_grad():
            self._page_out(param)

    def _page_out(self, param: nn.Parameter) -> None:
        if not self.context.has_nvme:
            store = NvmeStore(self._folders, self._io, self.counters, chunk_bytes=_CHUNK)
            ring = SlotRing(self._budget // 4, self.context.allocate_device, self.counters)
            self.context.install(nvme=store, ring=ring)
        page = FlatBuffer(f"page {self.pages}", [f"parameter {self.pages}"], [param], param.dtype, self.context)
        page.weights = AliasedWeights(page, None, self.context.nvme.allocate(page.weight_bytes))
        self._largest = max(self._largest, page.weight_bytes)
        page.weights.claim()
        page.weights.flat()[: param.numel()].copy_(param.data.reshape(-1))
        page.weights.store()
        page.adopt(keep=True)
        page.bind()
        page.unbind()
        self.pages += 1

    def _on_fault(self, owners: list[Any], writes: bool) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for page in owners:
                self._open.pop(page, None)
                if page.bound != "compute":
                    page.start(force=True)
                    page.load()
                    page.bind()
                self._open[page] = None
            spare = [p for p in self._open if p not in owners and not p.seen]
            while spare and sum(p.weight_bytes for p in self._open) > self._budget:
                self._close(spare.pop(0))

    def _close(self, page: FlatBuffer) -> None:
        self._open.pop(page)
        page.close_master()
        page.unbind()

    def finish(self) -> None:
        """The model is built: keep no more of its pages in memory than one at a time needs."""
        if self.context.has_nvme:
            self._budget = self._largest
            for page in [p for p in self._open if not p.seen]:
                self._close(page)
            self.context.ring.shrink(self._largest)

    def retire(self, page: FlatBuffer) -> None:
        """Forget a page whose value has been taken over."""
        if self._open.pop(page, True) is None:
            page.unbind()
        page.let_go([torch.empty(0, dtype=page.view_dtype)])
        self.pages -= 1
        if not self.pages:
            self.context.close()


def construction_budget(config: PartitionConfig, ranks: int = 1) -> int | None:
    """Return how many bytes of parameters may stay in memory while a model is built, or None for all of them.

    Args:
        config: How the model will be partitioned.
        ranks: Number of processes on this host that build it at the same time.
    """
    if config.offload_params == "nvme":
        asked = config.memory.host_bytes
        return (
            min(DEFAULT_BUDGET, free_host_bytes() // (8 * ranks)) if asked is None else max(asked // 2, SMALLEST_PAGE)
        )
    if config.offload_params == "auto" or (ranks > 1 and config.stage == 3):
        return int(COMFORT * free_host_bytes()) // ranks
    return None


@contextmanager
def paged_construction(config: PartitionConfig, ranks: int = 1) -> Iterator[ConstructionPager | None]:
    """Build modules inside; parameters beyond the budget go to files in ``config.nvme_paths``.

    Nothing is written there before the budget is exceeded.

    Args:
        config: How the model will be partitioned.
        ranks: Number of processes on this host that build it at the same time.

    Yields:
        The pager, or None if all parameters stay in memory.
    """
    budget = construction_budget(config, ranks)
    if budget is None:
        yield None
        return
    pager = ConstructionPager(config.nvme_paths, budget, config.io)
    handle = register_module_parameter_registration_hook(pager.seen)
    try:
        with large_blocks_apart():
            yield pager
    finally:
        handle.remove()
        pager.finish()
