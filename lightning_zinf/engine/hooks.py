"""Frames, hooks and faults, which tell the pager what is needed when.

Note [Life of a unit]
~~~~~~~~~~~~~~~~~~~~~
Forward: the pre-forward hook gathers the unit (its slot is filled, a pending update applied, its parameters bound) and
starts to fetch what the recorded order expects next; the post-forward hook releases it. Backward: a hook on the unit's
outputs gathers it again; when the gradients of all of its parameters have arrived it is released. Recomputation under
activation checkpointing runs forward hooks inside of backward: those must not release
(``torch._C._current_graph_task_id()`` tells). A callback at the end of backward releases what is left: unused
parameters, units whose inputs needed no gradient.

All of this is for speed alone. What makes results right are the fault (a released parameter that is used comes), the
saved-tensor net (autograd never holds a slot) and the storage use count (a slot somebody sees is never reused). So any
unit may be evicted at any time.

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
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_zinf.comm.rounds import Rounds
from lightning_zinf.engine.activations import Activations, Offload, staying_storages
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.gradients import Gradients
from lightning_zinf.engine.net import SavedTensorNet
from lightning_zinf.engine.pager import Pager
from lightning_zinf.engine.profile import StepProfile
from lightning_zinf.engine.reduction import Reducer
from lightning_zinf.engine.snapshot import Saving
from lightning_zinf.engine.units import Unit
from lightning_zinf.memory.activations import ActivationStore
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


def _refuse_tracing() -> None:
    """Raise while a module is exported: the program would have stand-ins of weights in it.

    Raises:
        RuntimeError: Always then.
    """
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 has the latter
    if torch._C._get_tracing_state() is not None or exporting():
        raise RuntimeError(
            "a module whose weights come and go cannot be traced: export copy.deepcopy(module), or a new module that "
            "has loaded lightning_zinf.full_state_dict(module). (TensorBoardLogger(log_graph=True) traces.)"
        )


class Absent:
    """What the hooks of an unpickled module lead to: its parameters are ordinary ones."""

    def _pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        pass

    def _post_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output


def _grad_arrived(ref: weakref.ref[Hooks], unit: int, key: tuple[int, int], param: Tensor) -> None:
    engine = ref()
    if engine is not None:
        engine._on_grad(engine.units[unit], key)


def _grad_stays(ref: weakref.ref[Hooks], unit: int, key: tuple[int, int], param: Tensor) -> None:
    engine = ref()
    if engine is not None and engine.context.norms_ahead:
        engine._on_grad_in_place(engine.units[unit], key)


class _NoHook:
    """The handle of a hook that there is none of."""

    def remove(self) -> None:
        """Nothing to remove."""


def _on_gradient(param: nn.Parameter, hook: Any) -> Any:
    """Call ``hook`` whenever the gradient of a parameter is complete, also if it starts to require grad later."""
    if not param.dtype.is_floating_point:
        return _NoHook()
    required = param.requires_grad
    param.requires_grad_(True)  # torch takes hooks for such parameters only
    try:
        return param.register_post_accumulate_grad_hook(hook)
    finally:
        param.requires_grad_(required)


class Hooks:
    """Has the units of a model come and go as its modules compute; what else an engine does is in ``engine.py``.

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
        self._running = True
        self._needs: dict[nn.Module, list[Unit]] = {}
        self._frames: list[Frame] = []
        self._in_backward_callback = False
        self._backward_nets = 0
        self._net = SavedTensorNet(self.pager)
        self._sums_squares = False
        self._unsummed: list[Gradients] = []
        self.profile: StepProfile | None = None
        self._look_at_units()
        self._handles: list[Any] = []
        self.activations: Activations | None = None
        context.fault = self._on_fault
        context.computing = self._computing
        context.updates_soon = lambda buffer: self.early.expected(self.pager.unit_with(buffer))
        self.pager.close_wholes = self._close_wholes
        for parameter in self.tiled:
            parameter.install(self._computing)
        self._install_hooks()

    def handle_activations(
        self, modules: Sequence[nn.Module], store: ActivationStore | None = None, min_bytes: int = 1
    ) -> None:
        """Recompute modules in backward, and bring away what autograd saves; call it once.

        Args:
            modules: The modules.
            store: Where their inputs go, or all that autograd saves if there are no such modules; None if it all stays.
            min_bytes: What has fewer bytes stays.
        """
        if store is not None:
            staying = functools.partial(staying_storages, self.root, self.units)
            self._net.offload = Offload(
                store,
                self.context.device,
                min_bytes=min_bytes,
                only_inputs=bool(modules),
                staying=staying,
                in_backward=in_backward,
            )
            self._needs_net = True
        self.activations = Activations(modules, self, self._net.offload)

    # ------------------------------------------------------------------ hooks

    def _look_at_units(self) -> None:
        """See what has to be done for the units as their planes rest now."""
        self._needs_net = any(not u.persistent for u in self.units) or self._net.offload is not None
        self._any_moves = any(u.moves for u in self.units)
        self._any_flips = any(u.flips for u in self.units)
        self._flipping = [u for u in self.units if u.flips and not u.moves]

    def rewire(self) -> None:
        """Planes of some units rest elsewhere now: hook what has to be hooked for that; call it between steps."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sums_squares = False  # those hooks are gone too, and come back when sums are next wanted
        self._needs.clear()
        self._look_at_units()
        if self._net.offload is not None:
            self._net.offload.look_again()
        self._install_hooks()

    def _install_hooks(self) -> None:
        self._needs[self.root] = [self.units[-1]]
        for unit in self.units:
            if unit.moves and unit.module is not self.root:
                self._needs[unit.module] = [unit]
        for module, unit in self._borrowers():
            needs = self._needs.setdefault(module, [])
            if unit not in needs:
                needs.append(unit)
        for module in self._needs if self._any_moves or self._any_flips else ():
            pre = module.register_forward_pre_hook(self._pre_forward, prepend=True, with_kwargs=True)
            post = module.register_forward_hook(self._post_forward, always_call=True)
            self._handles += [pre, post]
        self._hook_gradients([u for u in self.units if self._follows(u)], _grad_arrived)

    def _follows(self, unit: Unit) -> bool:
        """Whether something has to be done as soon as the gradients of a unit are complete."""
        return unit.moves or not self.context.aliased or self.reducer is not None or self.context.spills

    def _hook_gradients(self, units: Sequence[Unit], arrived: Callable[..., None]) -> None:
        engine = weakref.ref(self)  # hooks of tensors hide from the garbage collector what they hold
        for unit in units:
            for i, buffer in enumerate(unit.buffers):
                for j, param in enumerate(buffer.params):
                    hook = functools.partial(arrived, engine, unit.index, (i, j))
                    self._handles.append(_on_gradient(param, hook))

    @contextmanager
    def summing_squares(self) -> Iterator[None]:
        """While this is open, sum the squares of gradients as they are complete: their norm will be wanted."""
        if not self._sums_squares:
            self._sums_squares = True
            self._hook_gradients([u for u in self.units if not self._follows(u)], _grad_stays)
        self.context.norms_ahead = True
        try:
            yield
        finally:
            self.context.norms_ahead = False

    def _sum_squares(self, unit: Unit) -> None:
        """Sum those of a unit, and of earlier ones that were still on their way then."""
        self._unsummed = [g for g in [*self._unsummed, *(b.gradients for b in unit.buffers)] if not g.sum_squares()]

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _on_grad_in_place(self, unit: Unit, key: tuple[int, int]) -> None:
        unit.fired.add(key)
        if unit.fired >= unit.expected():
            unit.fired.clear()
            self._sum_squares(unit)

    def _borrowers(self) -> Iterator[tuple[nn.Module, Unit]]:
        """Yield modules with a parameter that the unit of another branch owns: tied weights."""
        inside = {u.index: set(u.module.modules()) for u in self.units}
        for module in self.root.modules():
            for param in module._parameters.values():
                found = None if param is None else self.pager.unit_of(param)
                if found is not None and found[0].moves and module not in inside[found[0].index]:
                    yield module, found[0]

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in self._needs and (self._frames or in_backward() or not self._any_flips):
            if self._any_moves:
                _refuse_tracing()
            self._push(module, module)

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _post_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._frames and self._frames[-1].module is module:
            self._pop(output)
        return output

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

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _pre_backward(self, needs: list[Unit], grad: Tensor) -> None:
        self._queue_callback()
        wanted = {id(u) for u in needs}
        for unit in [u for u in self.pager.held if not u.has_trainable and id(u) not in wanted]:
            self._end_backward(unit)
            self.pager.release(unit)  # nothing will tell when a frozen unit is done; the next unit's turn does
        if self.reducer is not None:
            self.reducer.poll()
        for unit in needs:
            self.early.touched(unit)
            self.pager.need(unit)
            if self.counters.trace is not None:
                self.counters.trace.begin("backward", unit.label)

    def _end_backward(self, unit: Unit | None) -> None:
        """Tell the trace that the backward of a unit, or of all, is complete."""
        if self.counters.trace is not None:
            self.counters.trace.end("backward", None if unit is None else unit.label)

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _on_grad(self, unit: Unit, key: tuple[int, int]) -> None:
        self._queue_callback()
        reducer = self.reducer if self._running else None
        if reducer is not None:
            reducer.dirty = True
        if not self.context.aliased:
            unit.buffers[key[0]].gradients.take(key[1])
        self.early.arrived(unit)
        unit.fired.add(key)
        if unit.fired >= unit.expected():
            unit.fired.clear()
            self._end_backward(unit)
            self.early.complete(unit)
            if reducer is not None:
                reducer.complete(unit)
            elif self.context.norms_ahead:
                self._sum_squares(unit)
            for buffer in unit.buffers:
                buffer.gradients.rest()
            if unit.index not in self._live():
                self.pager.release(unit)
            self.pager.prefetch_states()

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

    def _queue_callback(self) -> None:
        if not self._in_backward_callback:
            self._in_backward_callback = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        self._in_backward_callback = False
        self._end_backward(None)
        self._unsummed.clear()
        for unit in self.units:
            unit.fired.clear()
        self.pager.release_idle()

    def reset(self) -> None:
        """Get ready for the next step after an exception left frames open."""
        if self.reducer is not None:
            self.reducer.reset()
        while self._frames:
            frame = self._frames.pop()
            if frame.net:
                self._net.exit()
            if frame.span is not None:
                frame.span.__exit__(None, None, None)
        self._after_backward()
        if self.activations is not None:
            self.activations.after_backward(failed=True)

    # ------------------------------------------------------------------ faults

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _on_fault(self, owners: list[Any], writes: bool) -> None:
        _refuse_tracing()
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
