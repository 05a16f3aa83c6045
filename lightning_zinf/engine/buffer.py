"""A flat buffer: the parameters of one unit that share a dtype, and every plane of their state.

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
from lightning_zinf.engine.sharded import ShardedGradients
from lightning_zinf.layout import FlatLayout
from lightning_zinf.memory.slots import use_count
from lightning_zinf.memory.state import LOW_PLANES, State
from lightning_zinf.ops import crc32, join_master, split_master

if TYPE_CHECKING:
    from lightning_zinf.engine.context import EngineContext
    from lightning_zinf.engine.residence import Weights
    from lightning_zinf.engine.snapshot import Held
    from lightning_zinf.optim.elementwise import ParamState
    from lightning_zinf.optim.update import Update


_UNSHARED = use_count(torch.empty(1))
"""What :func:`use_count` says of a tensor that nobody else shares."""


class FlatBuffer:
    """Parameters of one unit, one dtype.

    Args:
        name: Name for messages: the unit's, and what is special about the buffer.
        names: Fully qualified name of each parameter.
        params: The parameters.
        compute_dtype: Dtype of the weight plane: float32, bfloat16 or float16.
        context: What the engine shares with its buffers.
        params_tier: Where the weights rest.
        state_tier: Where optimizer state rests.
    """

    weights: Weights

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
        self.name = name
        self.params_tier = params_tier
        self.state_tier = state_tier
        self.names = list(names)
        self.params = list(params)
        self.compute_dtype = compute_dtype
        self.view_dtype = params[0].dtype
        self.split = compute_dtype != torch.float32
        self.context = context
        self.device = context.device
        self.layout: FlatLayout = context.layout_of([tuple(p.shape) for p in params], compute_dtype.itemsize)
        self.origins = [paging.origin_of(p) for p in params]
        self.classes = [paging.original_class(p) for p in params]
        self.stand_ins = [paging.stand_in(p.shape, compute_dtype, self.device) for p in params]
        self.state: State | None = None
        self.steps = [0] * len(params)
        self.param_states: list[ParamState | None] = [None] * len(params)
        self.pending: list[Update] = []
        self.version = 0
        self.bound: Literal["new", "none", "compute", "master"] = "new"
        self.gradients: Gradients = WholeGradients(self) if context.comm is None else ShardedGradients(self)
        self.gathered_low: Tensor | None = None
        self.held: Held | None = None
        self.changes = 0  # optimizer steps captured, and times that code outside of compute may have changed planes
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
    def weight_bytes(self) -> int:
        """Bytes of the whole weight plane, padding included."""
        return self.layout.padded_numel * self.compute_dtype.itemsize

    @property
    def shard_numel(self) -> int:
        """Elements of this rank's shard, padding included."""
        return self.layout.shard_numel

    @property
    def shard_bytes(self) -> int:
        """Bytes of the weight plane of this rank's shard."""
        return self.layout.shard_numel * self.compute_dtype.itemsize

    @property
    def shard_range(self) -> tuple[int, int]:
        """First element of this rank's shard, and its end."""
        return self.layout.shard_range(self.context.shard_rank)

    @property
    def persistent(self) -> bool:
        """Whether the weights stay where compute reads them."""
        return self.weights.persistent

    @property
    def flips(self) -> bool:
        """Whether what compute sees is not what updates act on, so that the user's changes have to be taken over."""
        return (self.split and self.view_dtype != self.compute_dtype) or self.weights.mirrored

    @property
    def unseen(self) -> bool:
        """Whether the weights are plain parameters in place, which code may change without our seeing it."""
        return self.persistent and not self.flips

    @property
    def trained(self) -> bool:
        """Whether an optimizer keeps state here, or has taken steps."""
        return any(self.steps) or (self.state is not None and not set(self.state.planes) <= set(LOW_PLANES))

    @property
    def on_device(self) -> bool:
        """Whether updates run on the accelerator."""
        return self.state_tier == "device"

    @property
    def low_plane(self) -> str | None:
        """Name of the plane that makes masters of the weights."""
        return {torch.bfloat16: "residual", torch.float16: "master"}.get(self.compute_dtype)

    def need_planes(self, planes: tuple[str, ...]) -> None:
        """Make sure that the buffer has these planes of optimizer state; new ones are zero."""
        if self.state is None or not (self.state.planes or set(planes) <= set(self.state.planes)):
            self.state = self.context.new_state(self.shard_numel, planes, self.state_tier, self.name)
        else:
            self.state.add_planes(planes)

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
        if not self.weights.start(force=force, pending=bool(self.pending)):
            return False
        self.prefetch_state()
        return True

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
            self.pending.pop(0)
            if self.held is not None:
                self.held.updated()
            self.touched()
        self.weights.publish(updated=updated)
        if self.held is not None:
            self.held.settled()

    def before_change(self, plane: str | None = None) -> None:
        """Let a checkpoint that is being saved have a plane, or all of them, as they are before a change."""
        self.changes += 1
        if self.held is not None:
            self.held.before_change(plane)

    def defer(self, update: Update) -> None:
        """Take an update that is to be applied when the buffer is next settled."""
        self.pending.append(update)
        self.changes += 1

    def touched(self) -> None:
        """Note that the weights changed: saved tensors of an older graph are no longer what they were."""
        self.version += 1
        self.context.counters.updates += 1

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

    def views_of(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat tensor into one view per parameter."""
        layout = self.layout
        return [flat[o : o + n].view(s) for o, n, s in zip(layout.offsets, layout.numels, layout.shapes, strict=True)]

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
            if not torch.equal(self._master.view(torch.int32), before.view(torch.int32)):
                self.context.note_change(self.name, self._checksum(self._master))
                self.write_master(self._master)
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

    def storage_key(self) -> int:
        """Return what tells the slot's storage from others."""
        slot = self.weights.slot
        assert slot is not None, self
        return int(slot.memory.untyped_storage()._cdata)

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

    # ------------------------------------------------------------------ whole planes

    def read_master(self) -> Tensor:
        """Return the master as a new tensor on the device, whole, padding included.

        The weights must be loaded, and the residual gathered. It is float32, or the user's own dtype if compute has it.
        """
        return self._join(self._whole_low()) if self.split else self.weights.flat().clone()

    def _whole_low(self) -> Tensor:
        """Return the low plane of the whole buffer: what was gathered, or with one rank its own."""
        if self.context.comm is None:
            assert self.state is not None, self
            assert self.low_plane is not None, self
            return self.state.read(self.low_plane)
        low, self.gathered_low = self.gathered_low, None
        assert low is not None, self
        return low

    def _join(self, low: Tensor) -> Tensor:
        if self.low_plane == "master":
            return low.to(self.device, copy=True)
        master = torch.empty(self.layout.padded_numel, dtype=torch.float32)
        join_master(self.weights.flat().cpu(), low.cpu(), master)
        return master.to(self.device)

    def write_master(self, master: Tensor) -> None:
        """Set the master from a float32 tensor of the whole buffer, padding included; the weights must be loaded.

        Each rank keeps its own shard of it: all must have been given the same.
        """
        self.version += 1
        self.before_change()
        flat = self.weights.flat()
        start, stop = self.shard_range
        if self.low_plane == "master":
            assert self.state is not None, self
            flat.copy_(master)
            self.state.write("master", master[start:stop])
        elif self.split:
            assert self.state is not None, self
            weight = flat if flat.device.type == "cpu" else self.context.scratch(flat.numel(), torch.bfloat16)
            residual = self.context.scratch(flat.numel(), torch.int16)
            split_master(master.cpu(), weight, residual)
            if weight is not flat:
                flat.copy_(weight)
            self.state.write("residual", residual[start:stop])
        else:
            flat.copy_(master)
        self.weights.store()

    def read_plane(self, plane: str) -> Tensor | None:
        """Return this rank's shard of a plane, or None if the buffer has none; updates must not be pending.

        Where state is in memory it is the thing itself.
        """
        assert not self.pending, self
        return self.state.read(plane) if self.state is not None and plane in self.state.planes else None

    def whole_plane(self, plane: str) -> Tensor | None:
        """Return a plane of the whole buffer, gathered from all ranks, which must all ask for it."""
        shard, comm = self.read_plane(plane), self.context.comm
        if shard is None or comm is None:
            return shard
        whole = torch.empty(self.layout.padded_numel, dtype=shard.dtype, device=shard.device)
        comm.all_gather(whole.view(torch.uint8), shard.view(torch.uint8), f"{self.name}/{plane}").wait()
        return whole
