"""What compute is in the midst of: steps and forwards that are open, and the units that they need.

Note [Frames]
~~~~~~~~~~~~~
Compute happens inside of frames: the strategy opens one around every step, and each unit's forward is one. What touches
a parameter inside of a frame or in backward sees the weight that compute uses. What touches it outside sees the master,
for as long as it holds on to it or until two other units have been touched, and may change it. So in mixed precision a
forward outside of a step computes with the float32 master, as it would after any other strategy. A released parameter
that is changed inside of a step (clipping the weights of a critic, say) opens its master too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_zinf.comm.rounds import Rounds
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.net import SavedTensorNet
from lightning_zinf.engine.pager import Pager
from lightning_zinf.engine.profile import StepProfile
from lightning_zinf.engine.reduction import Reducer
from lightning_zinf.engine.snapshot import Saving
from lightning_zinf.engine.units import Unit
from lightning_zinf.monitor.trace import follow_profiler, span

if TYPE_CHECKING:
    from lightning_zinf.tiling.parameter import TiledParameter


@dataclass(eq=False)
class Frame:
    """A module's forward, or a step, that is running."""

    module: nn.Module | None
    needs: list[Unit]
    net: bool = False
    span: AbstractContextManager[Any] | None = None


def in_backward() -> bool:
    """Whether autograd is running a graph on this thread."""
    return int(torch._C._current_graph_task_id()) != -1


def refuse_tracing() -> None:
    """Raise while a module is exported: the program would have stand-ins of weights in it.

    Raises:
        RuntimeError: Always then.
    """
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        raise RuntimeError(
            "a module whose weights come and go cannot be traced: export copy.deepcopy(module), or a new module that "
            "has loaded lightning_zinf.full_state_dict(module). (TensorBoardLogger(log_graph=True) traces.)"
        )


class Frames:
    """The frames of a model: what units they need, and what a use of a released parameter means within and outside.

    Args:
        root: The model.
        units: Its units; the last one is the root's.
        context: Rings, stores and counters.
        prefetch: Whether to fetch ahead along the recorded order.
        reduce_bytes: Bytes of gradients that may be under way to other ranks in a backward.
        tiled: The parameters of which units have tiles.
    """

    def __init__(
        self,
        root: nn.Module,
        units: list[Unit],
        context: EngineContext,
        *,
        prefetch: bool = True,
        reduce_bytes: int = 256 * 2**20,
        tiled: Sequence[TiledParameter] = (),
    ) -> None:
        self.tiled = list(tiled)
        self.root = root
        self.units = units
        self.context = context
        self.counters = context.counters
        self.pager = Pager(units, context, self._live, prefetch=prefetch)
        self.early = self.pager.early
        self.rounds: Rounds | None = None
        self.reducer: Reducer | None = None
        if context.comm is not None:
            self.rounds = self.pager.rounds = Rounds(context.comm.ranks.channel, self.pager.collect)
            self.reducer = Reducer(units, context, self.rounds, self.early, reduce_bytes)
        self.saving: Saving | None = None
        self._needs: dict[nn.Module, list[Unit]] = {}
        self._frames: list[Frame] = []
        self._net = SavedTensorNet(self.pager)
        self.profile: StepProfile | None = None
        self._look_at_units()
        context.fault = self._on_fault
        context.computing = self._computing
        context.updates_soon = lambda buffer: self.early.expected(self.pager.unit_with(buffer))
        self.pager.close_wholes = self._close_wholes
        for parameter in self.tiled:
            parameter.install(self._computing)

    def _look_at_units(self) -> None:
        """See what has to be done for the units as their planes rest now."""
        self._needs_net = any(not u.persistent for u in self.units) or self._net.offload is not None
        self._any_moves = any(u.moves for u in self.units)
        self._any_flips = any(u.flips for u in self.units)
        self._flipping = [u for u in self.units if u.flips and not u.moves]

    # ------------------------------------------------------------------ steps and forwards

    @contextmanager
    def frame(self, kind: str) -> Iterator[list[Any]]:
        """Open the frame of a step.

        Args:
            kind: ``train``, ``validate``...: steps of one kind share a recorded order.

        Yields:
            A list to put the step's outputs into: tensors in it that require grad bring the root's parameters back in
            backward.
        """
        if not self._frames and not in_backward():
            self.pager.flush_host()
            self.pager.schedule.begin(kind)
        follow_profiler(self.counters)
        outputs: list[Any] = []
        with span(self.counters, "step", kind):
            try:
                self._push(self.root, None)
                if self.profile is not None and kind == "train":
                    self._net.profile = self.profile
                    self.profile.begin(hooked=self._frames[0].net)
                yield outputs
                self._pop(outputs)
            except BaseException:
                self._pop(outputs)
                raise
        if self.rounds is not None and not self._frames and not in_backward() and (self._any_moves or self._any_flips):
            self.rounds.pause(f"the end of a {kind} step")

    def _push(self, key: nn.Module, module: nn.Module | None) -> None:
        # The frame goes on the stack first: whatever raises after that, the post-forward hook takes it off again.
        frame = Frame(module, list(self._needs[key]))
        self._frames.append(frame)
        if len(self._frames) == 1 and not in_backward():
            self.pager.flush_host()
            self.pager.gather(self._flipping)
            if torch.is_grad_enabled() and (self._needs_net or self._watches):
                self._net.enter()
                frame.net = True
        for needed in frame.needs:
            if in_backward():
                self.early.touched(needed, used=True)
            self.pager.need(needed)
        if module is not None and self.counters.trace is not None:
            frame.span = self.counters.trace.span("forward", self._needs[key][0].label)
            frame.span.__enter__()

    def _pop(self, output: Any) -> None:
        frame = self._frames.pop()
        if frame.span is not None:
            frame.span.__exit__(None, None, None)
        if frame.net:
            self._net.exit()
        if not in_backward():  # after recomputation, the backward that follows needs the weights
            live = self._live()
            for unit in frame.needs:
                if unit.index not in live:
                    self.pager.release(unit)
            if not self._frames:
                self.pager.release_idle()
        if torch.is_grad_enabled() and any(not u.persistent for u in frame.needs):
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(functools.partial(self._pre_backward, frame.needs))

    def _pre_backward(self, needs: list[Unit], grad: Tensor) -> None:
        """Have units back: the backward of what they computed begins. See ``hooks.py``."""
        raise NotImplementedError

    # ------------------------------------------------------------------ recomputation

    def in_step(self) -> bool:
        """Whether a step or a backward is running."""
        return self._computing()

    @contextmanager
    def saving_inputs(self) -> Iterator[None]:
        """While this is open, autograd saves inputs of a unit that will be recomputed from them."""
        if self._net.offload is None:
            yield
        else:
            with self._net.offload.inputs():
                yield

    @contextmanager
    def recomputing(self, module: nn.Module) -> Iterator[None]:
        """While this is open, ``module`` is computed again in backward: it needs its weights."""
        if module not in self._needs or not in_backward() or not (self._any_moves or self._any_flips):
            yield
            return
        depth = len(self._frames)
        try:
            self._push(module, module)
            yield
        finally:
            if len(self._frames) > depth:
                self._pop(None)

    # ------------------------------------------------------------------ what is open

    @property
    def may_update_early(self) -> bool:
        """Whether the gradients of a unit may be complete in backward already."""
        return self.reducer is None or self.reducer.early

    def _live(self) -> set[int]:
        """Return the index of every unit that running frames need."""
        return {u.index for f in self._frames for u in f.needs}

    @property
    def _watches(self) -> bool:
        """Whether it is yet to be seen if weights that stay in place may be updated in backward."""
        return self._any_moves and self.may_update_early and self.early.learning

    def _computing(self) -> bool:
        """Whether a use of a parameter now is one of a step."""
        return bool(self._frames) or in_backward()

    # ------------------------------------------------------------------ faults

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _on_fault(self, owners: list[Any], writes: bool) -> None:
        refuse_tracing()
        self.counters.faults += 1
        units = list(dict.fromkeys(self.pager.unit_with(owner) for owner in owners))
        if self._computing() and not (writes and self._live().isdisjoint(u.index for u in units)):
            for unit in units:
                if in_backward():
                    self.early.touched(unit, used=True)
                self.pager.schedule.touch(unit.index)
            self.pager.gather(units)
            if self._frames:
                self._remember(self._frames[-1], units)
        else:
            self.pager.open_host(units)

    def _close_wholes(self) -> None:
        """Take in what code outside of steps did to parameters that are in tiles."""
        for parameter in self.tiled:
            parameter.close()

    def _remember(self, frame: Frame, units: list[Unit]) -> None:
        """A unit that is used in another's forward is gathered along with it from now on, and in its backward."""
        if frame.module is None or frame.module is self.root:
            return  # whatever a whole step touches would pile up
        recorded = self._needs[frame.module]
        for unit in units:
            for needs in (frame.needs, recorded):
                if unit not in needs:
                    needs.append(unit)
