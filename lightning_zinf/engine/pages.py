"""Parameters of a model under construction that are not whole in memory: a page each.

Note [Pages]
~~~~~~~~~~~~
A parameter is an ordinary one when it is registered, and stays so until enough others have come after it. Then it
gets a flat buffer of its own, its page, and is released: whatever touches it brings it back. Pages that are back stay
so until others need their room; nobody's view of one is taken away. A parameter that shares its memory with some
other tensor stays ordinary, since what is written there would not reach a page, and so does one that is made another
dtype until its turn comes again.

An operation on several parameters finds some of them here and some not, and is run again when those have come. If these
drove out the others, the two would take turns for ever: so what went with one fault and is back with the next lets
nothing go.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_zinf import parameters as paging
from lightning_zinf.comm.group import Collectives, Ranks
from lightning_zinf.config import IOConfig
from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.mapped import LargeTensors
from lightning_zinf.engine.residence import AliasedWeights
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.memory.slots import SlotRing, use_count
from lightning_zinf.monitor.counters import Counters

SMALLEST_PAGE = 64 * 2**10
"""Bytes: smaller parameters stay ordinary."""
_CHUNK = 256 * 2**20
_ALONE = use_count(torch.empty(1))
"""What :func:`use_count` says of a tensor that shares its memory with no other."""


class ConstructionPager:
    """Moves parameters of a model under construction to NVMe, oldest first.

    Args:
        folders: Where the pages go.
        budget: Bytes of ordinary parameters, and of pages that were brought back, to keep in memory.
        io: How to read and write.
        ranks: The ranks that build the model together, for pages that are cut over them; None for pages of one rank.
    """

    def __init__(self, folders: Sequence[str], budget: int, io: IOConfig, ranks: Ranks | None = None) -> None:
        self.counters = Counters()
        comm = None if ranks is None else Collectives(ranks, self.counters)
        self.context = EngineContext(torch.device("cpu"), self.counters, aliased=True, comm=comm)
        self.context.fault = self._on_fault
        self.context.retire = self.retire
        self.pages = 0
        self.large: LargeTensors | None = None
        self._folders, self._io, self._budget = folders, io, budget
        self._live: dict[int, weakref.ref[nn.Parameter]] = {}
        self._nbytes: dict[int, int] = {}
        self._numbers: dict[int, int] = {}  # by id, which a later parameter may have again
        self._count = 0
        self._live_bytes = 0
        self._largest = 0
        self._open: dict[FlatBuffer, None] = {}
        self._gone: set[FlatBuffer] = set()  # with the last fault

    def seen(self, module: nn.Module | None, name: str, param: nn.Parameter | None) -> None:
        """A parameter is being registered with ``module``."""
        if param is None or isinstance(param, paging.Released) or self._known(param):
            return
        pageable = param.device.type == "cpu" and _pageable_dtype(param.dtype)
        if not pageable or param.nbytes < SMALLEST_PAGE or type(param.data) is not torch.Tensor:
            return
        if self.large is not None and self.large.made(param):  # not in memory, so it need not go
            return
        self._note(module, name, param)
        while self._live and self._live_bytes + param.nbytes > self._budget - self._budget // 4:  # the rest: pages
            self._page_out_oldest()
        self._follow(param)

    def _note(self, module: nn.Module | None, name: str, param: nn.Parameter) -> None:
        """A parameter is about to be followed."""

    def _known(self, param: nn.Parameter) -> bool:
        number = self._numbers.get(id(param))
        found = None if number is None else self._live.get(number)
        return found is not None and found() is param

    def _follow(self, param: nn.Parameter) -> None:
        """Take a parameter as the newest of the ordinary ones."""
        self._count += 1
        self._numbers[id(param)] = self._count
        self._live[self._count] = weakref.ref(param)
        self._nbytes[self._count] = param.nbytes
        self._live_bytes += param.nbytes

    def _drop(self, number: int) -> nn.Parameter | None:
        """Follow a parameter no longer; return it, or None if it is gone."""
        self._live_bytes -= self._nbytes.pop(number)
        return self._live.pop(number)()

    def _page_out_oldest(self) -> None:
        param = self._drop(next(iter(self._live)))
        if param is None:  # the module dropped it
            for number in [n for n, ref in self._live.items() if ref() is None]:
                self._drop(number)
        elif not shares_memory(param):
            with torch.inference_mode(False), torch.no_grad():
                self._page_out(param)

    def _page_out(self, param: nn.Parameter) -> None:
        page = self._new_page(param)
        page.weights = AliasedWeights(page, None, self.context.nvme.allocate(page.weight_bytes))
        page.weights.claim()
        page.weights.flat()[: param.numel()].copy_(param.data.reshape(-1))
        page.weights.store()
        page.adopt(keep=True)
        page.bind()
        page.unbind()

    def _new_page(self, param: nn.Parameter) -> FlatBuffer:
        if not self.pages:
            self.context.install(ring=SlotRing(self._budget // 4, self.context.allocate_device, self.counters))
            self._open_store()
        page = FlatBuffer(f"page {self.pages}", [f"parameter {self.pages}"], [param], param.dtype, self.context)
        self._largest = max(self._largest, page.weight_bytes)
        self.pages += 1
        return page

    def _open_store(self) -> None:
        chunk = _CHUNK // self.context.shards
        self.context.install(nvme=NvmeStore(self._folders, self._io, self.counters, chunk_bytes=chunk))

    # ------------------------------------------------------------------ pages that are back

    def _on_fault(self, owners: list[Any], writes: bool) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._bring([page for page in owners if page.context is self.context])

    def _bring(self, pages: Sequence[FlatBuffer]) -> None:
        """Have pages here, and let others go if there are too many."""
        again = not self._gone.isdisjoint(pages)
        for page in pages:
            self._open.pop(page, None)
            if page.bound != "compute":
                self._fetch(page)
                page.bind()
            self._open[page] = None
        if not again:
            self._gone = set(self._let_go_beyond(self._budget, pages))

    def _fetch(self, page: FlatBuffer) -> None:
        """Have the values of a page in its slot."""
        page.start(force=True)
        page.load()

    def _let_go_beyond(self, nbytes: int, needed: Iterable[FlatBuffer]) -> list[FlatBuffer]:
        """Close pages that nobody sees, oldest first, until the others have no more than ``nbytes``."""
        spare = [p for p in self._open if p not in needed and not p.seen]
        closed: list[FlatBuffer] = []
        while spare and sum(p.weight_bytes for p in self._open) > nbytes:
            closed.append(spare.pop(0))
            self._close(closed[-1])
        return closed

    def _close(self, page: FlatBuffer) -> None:
        if changed_kind(page):
            self._make_ordinary(page)
            return
        self._open.pop(page)
        page.close_master()
        page.unbind()

    def _make_ordinary(self, page: FlatBuffer) -> None:
        """Let a parameter that is back keep the memory that it has."""
        (param,) = page.params
        values = param.data
        self.retire(page)
        param.data = values
        self.seen(None, "", param)

    # ------------------------------------------------------------------ the end

    def finish(self) -> None:
        """The model is built: keep no more of its pages in memory than one at a time needs."""
        if self.pages:
            self._budget = self._largest
            self._let_go_beyond(0, ())
        if self.pages:
            self.context.ring.shrink(self._largest)

    def abandon(self, error: BaseException) -> None:
        """The model does not get built: what there is of it may still be used."""
        self.finish()

    def retire(self, page: FlatBuffer) -> None:
        """Forget a page whose value has been taken over."""
        if self._open.pop(page, True) is None:
            page.unbind()
        page.let_go([torch.empty(0, dtype=page.view_dtype)])
        self._gone.discard(page)
        self.pages -= 1
        if not self.pages:
            self.context.close()


def shares_memory(param: nn.Parameter) -> bool:
    """Whether some other tensor has the memory of a parameter too."""
    return use_count(param) > _ALONE


def _pageable_dtype(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16)


def changed_kind(page: FlatBuffer) -> bool:
    """Whether the user has given a parameter that is back data of another dtype, shape or device."""
    (param,) = page.params
    shape, dtype = page.layout.shapes[0], page.view_dtype
    return tuple(param.shape) != shape or param.dtype != dtype or param.device != page.device
