"""Pages that the ranks which build a model hold together.

Note [Shared pages]
~~~~~~~~~~~~~~~~~~~
In stage 3 every rank runs the same code to build the model, and in the end keeps a slice of what rank 0 made. So a
parameter that has its turn to go is sent from rank 0, and each rank keeps its slice of it: in memory, or on NVMe if
that is where weights rest or if memory is short. A rank then holds its slices and a small budget of whole parameters.
Whatever touches such a parameter brings it back on all ranks, by a gathering that they agree on (``comm/rounds.py``);
when it goes again, rank 0's value is what goes. Nobody can tell from the values: rank 0 always has its own, and
partitioning takes those.

Nothing but the configuration says when a parameter has its turn, so that comes at the same place of the same code
everywhere; what was registered until then tells the place. A parameter is cut only if all ranks are there. If they
are not (rank 0 alone builds something and throws it away, say), they do not build the same model, and each goes on
with pages of its own. What they have cut together by then stays good, and becomes ordinary before a model is set up
in which it is not the same parameters on all ranks.
"""

from __future__ import annotations

import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_zinf import parameters as paging
from lightning_zinf.comm.channel import ChannelError
from lightning_zinf.comm.group import Ranks
from lightning_zinf.comm.rounds import Rounds, Want
from lightning_zinf.config import IOConfig
from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.pages import ConstructionPager, changed_kind, shares_memory
from lightning_zinf.engine.residence import AliasedWeights
from lightning_zinf.memory.slots import use_count
from lightning_zinf.ops import host_empty

SHARED_BUDGET = 16 * 2**20
"""Bytes of whole parameters, ordinary or back, that a rank keeps beside its slices."""
_FIRST_PAGE = 1 << 30
"""Pages have numbers from here on when ranks agree on them: no unit of an engine has one of these."""
_PATIENCE = 1.0
"""Most seconds to wait for gloo to drop what it has sent: it always does, and less is free until then."""
_BUSY, _SPARE, _CHANGED = range(3)
_GONE, _MEMORY_SHARED, _READY = range(3)


_WITH_PAGES: dict[int, SharedPager] = {}
"""By id: all that a model to be set up may have parameters of."""


class SharedPager(ConstructionPager):
    """Cuts parameters of a model under construction over the ranks, oldest first.

    Args:
        folders: Where slices go that do not stay in memory.
        budget: Bytes of whole parameters to keep in memory; the same on all ranks.
        io: How to read and write.
        ranks: The ranks that build the model together.
        memory: Bytes of slices that stay in memory.
        apart: What to go on with if the ranks turn out to build different things.
    """

    def __init__(
        self,
        folders: Sequence[str],
        budget: int,
        io: IOConfig,
        ranks: Ranks,
        memory: int,
        apart: ConstructionPager,
    ) -> None:
        super().__init__(folders, budget, io, ranks)
        self.rounds = Rounds(ranks.channel, self._collect)
        self.kept_bytes = 0
        self._memory = memory
        self._apart = apart
        self._together = True
        self._shared: dict[int, FlatBuffer] = {}
        self._indices: dict[FlatBuffer, int] = {}
        self._turns = 0
        self._history = 0  # of what was registered: that it is the same tells the same place
        self._wanted: list[FlatBuffer] = []

    # ------------------------------------------------------------------ cutting

    def seen(self, module: nn.Module | None, name: str, param: nn.Parameter | None) -> None:
        """A parameter is being registered with ``module``."""
        if self._together:
            super().seen(module, name, param)
        else:
            self._apart.seen(module, name, param)

    def _note(self, module: nn.Module | None, name: str, param: nn.Parameter) -> None:
        text = f"{type(module).__qualname__} {name} {tuple(param.shape)} {param.dtype}"
        self._history = zlib.crc32(text.encode(), self._history)

    def _page_out_oldest(self) -> None:
        number = next(iter(self._live))
        nbytes = self._nbytes[number]
        param = self._drop(number)
        state = _GONE if param is None else _MEMORY_SHARED if shares_memory(param) else _READY
        place = f"configure_model, where {nbytes} bytes are to be cut, after {self._history:08x}"
        answers = self.rounds.agree(place, bytes([state]))
        if answers is None:
            _warn()
            self._part_ways(param)
        elif all(answer[0] == _READY for answer in answers):
            assert param is not None
            with torch.inference_mode(False), torch.no_grad():
                self._page_out(param)

    def _part_ways(self, *more: nn.Parameter | None) -> None:
        """The ranks build different things: what is ordinary here, and ``more``, is nothing to others."""
        self._together = False
        ordinary = [*more, *(ref() for ref in self._live.values())]
        for number in list(self._live):
            self._drop(number)
        for param in ordinary:
            self._apart.seen(None, "", param)

    def _page_out(self, param: nn.Parameter) -> None:
        page = self._new_page(param)
        index = _FIRST_PAGE + self._turns
        self._turns += 1
        self._shared[index], self._indices[page] = page, index
        _WITH_PAGES[id(self)] = self
        if self.kept_bytes + page.shard_bytes <= self._memory:
            self._keep_slice(page, param)
        else:
            if not self.context.has_nvme:
                super()._open_store()
            page.weights = AliasedWeights(page, None, self.context.nvme.allocate(page.shard_bytes))
            page.weights.claim()
            page.weights.flat()[: param.numel()].copy_(param.data.reshape(-1))
            self._send(page.weights.flat()[: param.numel()])  # as many bytes as those who keep their slices
            page.weights.store()
        page.adopt(keep=True)
        page.unbind()

    def _keep_slice(self, page: FlatBuffer, param: nn.Parameter) -> None:
        """Keep this rank's slice of rank 0's value, which needs no slot."""
        home = host_empty(page.shard_bytes, huge_pages=False).view(page.compute_dtype)
        flat = param.data.reshape(-1)
        self._send(flat)
        start, stop = page.shard_range
        part = flat[start:stop]
        home[: part.numel()].copy_(part)
        page.weights = AliasedWeights(page, None, None, home)
        self.kept_bytes += page.shard_bytes

    def _send(self, flat: Tensor) -> None:
        """Give all ranks rank 0's values."""
        assert self.context.comm is not None
        count = use_count(flat)
        self.context.comm.broadcast(flat)
        _wait_while(lambda: use_count(flat) > count)

    def _open_store(self) -> None:
        """Nothing goes to NVMe before memory for slices is used up."""

    # ------------------------------------------------------------------ pages that are back

    def _on_fault(self, owners: list[Any], writes: bool) -> None:
        self._wanted = [page for page in owners if page.context is self.context]
        try:
            self.rounds.want(self._missing, list, "a parameter of the model under construction")
        finally:
            self._wanted = []

    def _fetch(self, page: FlatBuffer) -> None:
        page.start(force=True)
        page.collect()
        page.load()
        slot = page.weights.slot
        assert slot is not None
        _wait_while(lambda: slot.visible)  # to nobody but gloo: else a page that nobody uses would seem to be in use

    def _missing(self) -> list[Want]:
        return [Want(self._indices[page]) for page in self._wanted if page.bound != "compute"]

    def _collect(self, wants: list[Want]) -> None:
        """Bring pages back, as all ranks do now."""
        unknown = [want.unit for want in wants if want.unit not in self._shared]
        if unknown:
            raise ChannelError(
                "some ranks use the parameters of one model and others those of another: all ranks must do the same "
                "while a model is built and set up"
            )
        with torch.inference_mode(False), torch.no_grad():
            self._bring([self._shared[want.unit] for want in wants])

    def _let_go_beyond(self, nbytes: int, needed: Iterable[FlatBuffer]) -> list[FlatBuffer]:
        """Close pages that no rank sees; all ranks are here, and have the same pages open in the same order."""
        if sum(p.weight_bytes for p in self._open) <= nbytes:
            return []
        pages = list(self._open)
        mine = bytes(map(self._state_of, pages))
        everyone = self.rounds.channel.exchange(mine, "is letting go parameters of the model under construction")
        closed: list[FlatBuffer] = []
        for page, states in zip(pages, zip(*everyone, strict=True), strict=True):
            if sum(p.weight_bytes for p in self._open) <= nbytes:
                break
            if set(states) == {_CHANGED}:
                self._make_ordinary(page)
            elif set(states) == {_SPARE} and page not in needed:
                self._close(page)
                closed.append(page)
        return closed

    def _state_of(self, page: FlatBuffer) -> int:
        if page in self._wanted or page.seen:
            return _BUSY
        return _CHANGED if changed_kind(page) else _SPARE

    def _close(self, page: FlatBuffer) -> None:
        self._open.pop(page)
        page.take_in()
        self._send(page.weights.flat())
        page.weights.store()
        page.unbind()

    # ------------------------------------------------------------------ the end

    def meet(self, place: str) -> None:
        """Serve other ranks until all are at ``place``; if they built different things before, build together again."""
        state = struct.pack("<?IQ", self._together, self._history, self._live_bytes)
        if len(set(self.rounds.meet(place, state))) > 1:
            self._part_ways()
            self._together, self._history = True, 0

    def compare(self, root: nn.Module) -> bool:
        """Meet before a model is partitioned; if its parameters have not the same pages on all ranks, give all back.

        Returns:
            Whether it has pages here.
        """
        owners = [paging.owner_of(p) for p in root.parameters()]
        indices = [-1] + [-1 if owner is None else self._indices.get(owner[0], -1) for owner in owners]
        checksum = zlib.crc32(struct.pack(f"<{len(indices)}q", *indices))
        if len(set(self.rounds.meet("setting up the model", struct.pack("<I", checksum)))) > 1:
            _warn()
            self.give_back()
            return False
        return max(indices) >= 0

    def finish(self) -> None:
        """The model is built on all ranks: keep no more of its pages in memory than one at a time needs."""
        self.meet("the end of configure_model")
        self._apart.finish()
        with torch.inference_mode(False), torch.no_grad():
            super().finish()

    def abandon(self, error: BaseException) -> None:
        """This rank does not get to the end, and others are told so; what was cut is lost, as the ways to them are."""
        _WITH_PAGES.pop(id(self), None)
        text = f"rank {self.rounds.channel.rank} stopped in configure_model with {type(error).__name__}: {error}"
        self.rounds.channel.abort(text[:500])

    def join(self, ranks: Ranks) -> SharedPager:
        """Go on with new ways to the other ranks, since what broke the old ones is over."""
        assert self.context.comm is not None
        self.context.comm.ranks = ranks
        self.rounds.channel = ranks.channel
        return self

    def retire(self, page: FlatBuffer) -> None:
        """Forget a page whose value has been taken over."""
        self.kept_bytes -= 0 if page.weights.extent is not None else page.shard_bytes
        del self._shared[self._indices.pop(page)]
        super().retire(page)
        page.weights.drop()
        if not self.pages:
            _WITH_PAGES.pop(id(self), None)

    def give_back(self) -> None:
        """Make the pages that are left, of parameters outside of the model, ordinary parameters again on all ranks."""
        with torch.inference_mode(False), torch.no_grad():
            while self._shared:  # bringing one back may make another ordinary
                page = next(iter(self._shared.values()))
                if page.bound != "compute":
                    self._bring([page])
                (param,) = page.params
                values = param.data
                self.retire(page)
                param.data = values


def _wait_while(held: Callable[[], bool]) -> None:
    """Wait until a thread of gloo's has come to drop a tensor, some time after the collective is done."""
    deadline = time.monotonic() + _PATIENCE
    while held() and time.monotonic() < deadline:
        time.sleep(0.0002)


def pagers_with_pages() -> list[SharedPager]:
    """Return the pagers that have pages, in the order in which they got the first one: the same on all ranks."""
    return list(_WITH_PAGES.values())


def _warn() -> None:
    warnings.warn(
        "the ranks build different parameters in configure_model, so what they build until they next meet is whole on "
        "each of them: let all ranks run the same code there, with a barrier after what one of them builds alone",
        stacklevel=3,
    )
