"""A flat buffer: the parameters of one unit that share a dtype, as they come, go and are seen.

Note [Two views of a weight]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Compute sees the weight plane, in the compute dtype. The user sees the master. In 32-bit training they are one and the
same memory. In mixed precision the weight plane is the high half of the master and ``residual`` its low half, and the
master exists only while somebody looks at it: ``open_master`` joins the halves into a float32 buffer that the
parameters then view, and ``close_master`` splits it again. So whatever code outside of a training step does to a
parameter, it does to the float32 master.

Note [Pending updates]
~~~~~~~~~~~~~~~~~~~~~~
An optimizer step of offloaded state is recorded here and applied when the weights are next needed, just in time: the
weight that the forward reads anyway is read once for both. Whoever wants the weights gets them through ``load``, so
nobody ever sees a weight whose update is still to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_zinf import parameters as paging
from lightning_zinf.config import Tier
from lightning_zinf.engine.gradients import Gradients, WholeGradients
from lightning_zinf.engine.planes import Planes
from lightning_zinf.engine.sharded import ShardedGradients
from lightning_zinf.memory.slots import use_count
from lightning_zinf.ops import crc32

if TYPE_CHECKING:
    from lightning_zinf.engine.context import EngineContext
    from lightning_zinf.optim.update import Update


_UNSHARED = use_count(torch.empty(1))
"""What :func:`use_count` says of a tensor that nobody else shares."""


class FlatBuffer(Planes):
    """Parameters of one unit, one dtype.

    The arguments are those of :class:`~lightning_zinf.engine.planes.Planes`.
    """

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        params: Sequence[nn.Parameter],
        compute_dtype: torch.dtype,
        context: EngineContext,
        params_tier: Tier = "nvme",
        state_tier: Tier = "host",
    ) -> None:
        super().__init__(name, names, params, compute_dtype, context, params_tier, state_tier)
        self.classes = [paging.original_class(p) for p in params]
        self.stand_ins = [paging.stand_in(p.shape, compute_dtype, self.device) for p in params]
        self.bound: Literal["new", "none", "compute", "master"] = "new"
        self.gradients: Gradients = WholeGradients(self) if context.comm is None else ShardedGradients(self)
        self._master: Tensor | None = None
        self._opened_low: Tensor | None = None
        self._opened_checksum = 0

    def adopt(self, *, keep: bool = False) -> None:
        """Become the owner of the parameters: from here on, their uses while released come here.

        Args:
            keep: Live for as long as the parameters have this owner.
        """
        for index, param in enumerate(self.params):
            paging.adopt(param, self, index, keep=keep)

    def __repr__(self) -> str:
        return f"FlatBuffer({self.name!r}, {len(self.params)} parameters, {self.layout.numel} elements)"

    @property
    def seen_dtype(self) -> torch.dtype:
        """Dtype that a use of the parameters would find now: a step sees what compute uses, others the master."""
        return self.compute_dtype if self.context.computing() else self.view_dtype

    @property
    def deferred(self) -> bool:
        """Whether optimizer steps wait until the weights are next needed."""
        return self.state is not None and (self.state.offloaded or not self.persistent)

    def fault(self, owners: list[Any], writes: bool) -> None:
        """Make every buffer of ``owners`` resident (a released parameter was used)."""
        self.context.fault(owners, writes)

    # ------------------------------------------------------------------ loading

    def start(self, *, force: bool) -> bool:
        """Start to bring the weights; return False if there is no slot for them now and ``force`` is not set."""
        return self.weights.start(force=force, pending=bool(self.pending))

    def would_wait(self) -> bool:
        """Whether :meth:`start` would wait for slots whose content is being written."""
        return self.weights.would_wait(pending=bool(self.pending))

    def prefetch_state(self, *, before_step: bool = False) -> None:
        """Start to fetch the state that updates need, as far as staging has room.

        Args:
            before_step: See :meth:`lightning_zinf.engine.units.Unit.prefetch_state`.
        """
        if self.state is not None:
            pending = any(update.needs(self.state.planes) for update in self.pending)
            if before_step or pending or self.context.updates_soon(self):
                self.state.prefetch()

    @property
    def collected(self) -> bool:
        """Whether the weights are here, or will be without another collective."""
        return not self.pending and self.weights.collected

    def collect(self, *, residual: bool = False) -> None:
        """Start to gather the weights from all ranks, which must all do so; the shard must have been started.

        Args:
            residual: Gather the plane that makes masters of the weights too, and keep it in ``gathered_low``.
        """
        comm = self.context.comm
        assert comm is not None
        self.settle()
        self.weights.gather()
        if residual and self.low_plane is not None:
            self.gathered_low = self.whole_plane(self.low_plane)

    def load(self) -> None:
        """Have the weights in place for compute; with several ranks they must have been collected."""
        if not (self.context.comm is not None and self.collected):
            self.settle()
        self.weights.finish()
        assert self.weights.whole, self

    def settle(self) -> None:
        """Finish bringing the shard: wait for reads, apply pending updates, copy to the accelerator."""
        self.weights.arrive()
        updated = bool(self.pending)
        if updated:  # a gathering under way would put the old shard back when it ends
            self.weights.finish()
        while self.pending:
            assert self.state is not None, self
            if self.held is not None:
                self.held.before_update()
            try:
                with self.context.counters.timed("update_seconds", self.name):
                    self.pending[0].apply(self.weights.host(), self.state)
            except BaseException:
                if self.pending[0].done:  # what is updated so far goes home, to be gone on with from there
                    self.weights.publish(updated=True)
                raise
            applied = self.pending.pop(0)
            if self.held is not None:
                self.held.updated()
            self.touched(applied.touches)
            self.context.counters.updates += 1
        self.weights.publish(updated=updated)
        if self.held is not None:
            self.held.settled()

    def defer(self, update: Update) -> None:
        """Take an update that is to be applied when the buffer is next settled."""
        self.pending.append(update)
        self.changes += 1

    # ------------------------------------------------------------------ binding

    def bind(self) -> None:
        """Let the parameters view the weights, as plain parameters."""
        if self.bound == "compute":
            return
        slot = self.weights.slot
        assert slot is not None, self
        views = slot.views(self.layout, self.compute_dtype)
        for param, cls, view in zip(self.params, self.classes, views, strict=True):
            param.__class__ = cls
            param.data = view
        self.bound = "compute"

    def unbind(self) -> None:
        """Let every use of the parameters fault; paged weights give their slot back."""
        if self.bound == "master":
            self.bind()
        if self.bound != "none":
            for param, cls, stand_in in zip(self.params, self.classes, self.stand_ins, strict=True):
                # Weights that stay in place stay readable: autograd saved the parameters themselves.
                if not self.persistent:
                    param.data = stand_in
                param.__class__ = paging.released_class(cls)
            self.bound = "none"
        self.weights.leave()

    def let_go(self, values: Sequence[Tensor]) -> None:
        """Give the parameters tensors of their own, and forget them."""
        for param, cls, value in zip(self.params, self.classes, values, strict=True):
            param.__class__ = cls
            param.data = value
            paging.disown(param)
        self.bound = "none"

    def storage_key(self) -> int:
        """Return what tells the slot's storage from others."""
        slot = self.weights.slot
        assert slot is not None, self
        return int(slot.memory.untyped_storage()._cdata)

    # ------------------------------------------------------------------ the user's view

    def open_master(self) -> None:
        """Let the parameters view the master; the weights must be loaded, and the residual gathered."""
        if not self.split or self.view_dtype == self.compute_dtype:
            for ticket in self.weights.under_way() if self.held is not None else ():
                ticket.wait()  # what is being written for a checkpoint to read is the memory that may change now
            self.bind()
            self._opened_checksum = self._checksum(self.weights.flat())
            return
        self._opened_low = self._whole_low()
        self._master = self._join(self._opened_low)
        for param, cls, view in zip(self.params, self.classes, self.views_of(self._master), strict=True):
            param.__class__ = cls
            param.data = view
        self.bound = "master"

    def close_master(self) -> None:
        """Take the user's changes back into the planes; the weights stay loaded and bound for compute."""
        flat = self.weights.flat() if self._master is None else self._master
        self._absorb(flat)
        if self._master is None:
            self.before_change("weight")
            self.weights.store()
            checksum = self._checksum(flat)
            if checksum != self._opened_checksum:
                self.context.note_change(self.name, checksum)
        else:
            assert self._opened_low is not None
            before = self._join(self._opened_low)
            # A look is no change: nothing to write, and a backward under way stays valid.
            pairs = zip(self.views_of(self._master), self.views_of(before), strict=True)
            changed = [
                i for i, (new, old) in enumerate(pairs) if not torch.equal(new.view(torch.int32), old.view(torch.int32))
            ]
            if changed:
                self.context.note_change(self.name, self._checksum(self._master))
                self.write_master(self._master, changed)
            self._master = self._opened_low = None
            self.bind()

    def _checksum(self, flat: Tensor) -> int:
        """Return what tells changed weights from others, for the comparison with other ranks; 0 if there are none."""
        if self.context.comm is None:
            return 0
        return crc32(flat.cpu())

    def take_in(self) -> None:
        """Take in values that the user put elsewhere, where the weights are in place and bound."""
        if self.bound == "compute":
            self._absorb(self.weights.flat())

    @property
    def seen(self) -> bool:
        """Whether somebody outside of the engine still sees the open master."""
        if self._master is not None:
            flat = self._master
            viewing = sum(p.untyped_storage().data_ptr() == flat.data_ptr() for p in self.params)
            return use_count(flat) > _UNSHARED + viewing
        slot = self.weights.slot
        if slot is not None:
            slot.wait_writes(self.context.counters)  # a request under way holds on to the memory too
        return slot is not None and slot.use_count_beyond(len(self.params))

    def _absorb(self, flat: Tensor) -> None:
        """Take in values that the user put elsewhere (``p.data = x``, ``model.to()``), and restore the views."""
        low, high = flat.data_ptr(), flat.data_ptr() + flat.nbytes
        for name, param, view in zip(self.names, self.params, self.views_of(flat), strict=True):
            if not param.numel() or (low <= param.data_ptr() < high and param.dtype == flat.dtype):
                continue
            if param.shape != view.shape:
                raise ValueError(
                    f"parameter {name!r} was given data of shape {tuple(param.shape)}, but it has shape "
                    f"{tuple(view.shape)}: change the model before the strategy sets it up"
                )
            self.before_change("weight")
            with torch.no_grad():
                view.copy_(param.detach())
            param.data = view
