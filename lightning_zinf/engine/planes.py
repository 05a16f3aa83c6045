"""The planes of a flat buffer: what there is of each element, where parameters lie in it, and whole masters.

The weight plane is in the dtype that compute uses. With 16-bit weights ``low_plane`` makes float32 masters of it, see
Note [Two views of a weight] in ``buffer.py``. Several ranks have equal shards of every plane, one each.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_zinf import parameters as paging
from lightning_zinf.config import Tier
from lightning_zinf.engine.gradients import Piece
from lightning_zinf.layout import FlatLayout
from lightning_zinf.memory.state import LOW_PLANES, State
from lightning_zinf.ops import join_master, split_master

if TYPE_CHECKING:
    from lightning_zinf.engine.context import EngineContext
    from lightning_zinf.engine.residence import Weights
    from lightning_zinf.engine.snapshot import Held
    from lightning_zinf.optim.elementwise import ParamState
    from lightning_zinf.optim.update import Update


class Planes:
    """What is kept for parameters of one unit and one dtype.

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
        self.state: State | None = None
        self.steps = [0] * len(params)
        self.param_states: list[ParamState | None] = [None] * len(params)
        self.pending: list[Update] = []
        self._versions = [0] * len(params)
        self._outdated = [0] * len(params)
        self.gathered_low: Tensor | None = None
        self.held: Held | None = None
        self.changes = 0  # optimizer steps captured, and times that code outside of compute may have changed planes

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
            if self.held is not None and self.state.offloaded and not set(planes) <= set(self.state.planes):
                self.held.before_move()
            self.state.add_planes(planes)

    def views_of(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat tensor into one view per parameter."""
        layout = self.layout
        return [flat[o : o + n].view(s) for o, n, s in zip(layout.offsets, layout.numels, layout.shapes, strict=True)]

    def zero_pieces(self, indices: Collection[int]) -> list[Piece]:
        """Return a gradient of zeros for each of these parameters: this rank's part, where updates run."""
        start, stop = self.shard_range
        device = self.device if self.on_device or self.context.aliased else torch.device("cpu")
        parts = {index: (low - start, numel) for index, _, low, numel in self.layout.overlaps(start, stop)}
        found = [(index, *parts.get(index, (0, 0))) for index in sorted(indices)]
        return [Piece(index, first, torch.zeros(numel, device=device)) for index, first, numel in found]

    # ------------------------------------------------------------------ changes

    def before_change(self, plane: str | None = None) -> None:
        """Let a checkpoint that is being saved have a plane, or all of them, as they are before a change."""
        self.changes += 1
        if self.held is not None:
            self.held.before_change(plane)

    def touched(self, indices: Iterable[int] | None = None) -> None:
        """Note that the weights changed: saved tensors of an older graph are no longer what they were.

        Args:
            indices: Those of which parameters; all by default.
        """
        for index in range(len(self.params)) if indices is None else indices:
            self._versions[index] += 1

    def outdate(self, indices: Iterable[int] | None = None) -> None:
        """Have graphs that saved the parameters themselves refuse to go on, as after a change in place.

        Args:
            indices: Which parameters; all by default.
        """
        which = list(range(len(self.params)) if indices is None else indices)
        torch.autograd.graph.increment_version([self.params[i] for i in which])
        for index in which:
            self._outdated[index] += 1

    def index_at(self, element: int) -> int:
        """Return the number of the parameter that an element of the flat buffer is part of."""
        return max(bisect.bisect_right(self.layout.offsets, element) - 1, 0)

    def version_of(self, index: int) -> tuple[int, int]:
        """Return what tells the weights of a parameter that is bound from those before and after a change.

        The first number counts updates, the second one changes in place by other code.
        """
        return self._versions[index], self.params[index]._version - self._outdated[index]

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

    def write_master(self, master: Tensor, changed: Iterable[int] | None = None) -> None:
        """Set the master from a float32 tensor of the whole buffer, padding included; the weights must be loaded.

        Each rank keeps its own shard of it: all must have been given the same.

        Args:
            master: The float32 tensor.
            changed: The parameters whose values are others now; all by default.
        """
        if changed is None:
            self.touched()
        else:
            for index in changed:
                self._outdated[index] -= 1  # one change more that is not the engine's
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
