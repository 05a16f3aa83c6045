"""Hooks of modules and gradients, which tell the pager what is needed when.

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
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_zinf.engine.activations import Activations, Offload, staying_storages
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.frames import Frames, in_backward, refuse_tracing
from lightning_zinf.engine.gradients import Gradients
from lightning_zinf.engine.units import Unit
from lightning_zinf.memory.activations import ActivationStore

if TYPE_CHECKING:
    from lightning_zinf.tiling.parameter import TiledParameter


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


class Hooks(Frames):
    """Has the units of a model come and go as its modules compute; what else an engine does is in ``engine.py``.

    The arguments are those of :class:`Frames`.
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
        super().__init__(root, units, context, prefetch=prefetch, reduce_bytes=reduce_bytes, tiled=tiled)
        self._running = True
        self._in_backward_callback = False
        self._backward_nets = 0
        self._sums_squares = False
        self._unsummed: list[Gradients] = []
        self._handles: list[Any] = []
        self.activations: Activations | None = None
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

    # ------------------------------------------------------------------ installing

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

    def _borrowers(self) -> Iterator[tuple[nn.Module, Unit]]:
        """Yield modules with a parameter that the unit of another branch owns: tied weights."""
        inside = {u.index: set(u.module.modules()) for u in self.units}
        for module in self.root.modules():
            for param in module._parameters.values():
                found = None if param is None else self.pager.unit_of(param)
                if found is not None and found[0].moves and module not in inside[found[0].index]:
                    yield module, found[0]

    # ------------------------------------------------------------------ forward and backward of a unit

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in self._needs and (self._frames or in_backward() or not self._any_flips):
            if self._any_moves:
                refuse_tracing()
            self._push(module, module)

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _post_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._frames and self._frames[-1].module is module:
            self._pop(output)
        return output

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
        self.pager.go_on()
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

    # ------------------------------------------------------------------ squares of gradients

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

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _on_grad_in_place(self, unit: Unit, key: tuple[int, int]) -> None:
        unit.fired.add(key)
        if unit.fired >= unit.expected():
            unit.fired.clear()
            self._sum_squares(unit)

    def _sum_squares(self, unit: Unit) -> None:
        """Sum those of a unit, and of earlier ones that were still on their way then."""
        self._unsummed = [g for g in [*self._unsummed, *(b.gradients for b in unit.buffers)] if not g.sum_squares()]

    # ------------------------------------------------------------------ the end of a backward

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
