"""The engine: which units are resident when, and who makes them so.

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
unit may be evicted at any time, and a full ring evicts the one whose use is longest ago.

Note [Frames]
~~~~~~~~~~~~~
Compute happens inside of frames: the strategy opens one around every step, and each unit's forward is one. What touches
a parameter inside of a frame or in backward sees the weight that compute uses. What touches it outside sees the master,
for as long as it holds on to it or until two other units have been touched, and may change it. So in mixed precision a
forward outside of a step computes with the float32 master, as it would after any other strategy.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.net import SavedTensorNet
from lightning_zinf.engine.schedule import Schedule
from lightning_zinf.engine.units import Unit, UnitState
from lightning_zinf.memory.placement import Placement
from lightning_zinf.optim.update import Update
from lightning_zinf.parameters import owner_of

if TYPE_CHECKING:
    from lightning_zinf.config import PartitionConfig

MAX_HOST_UNITS = 2
"""Units that code outside of a training step keeps in memory at once, unless it holds on to more."""


@dataclass(eq=False)
class Frame:
    """A module's forward, or a step, that is running."""

    module: nn.Module | None
    needs: list[Unit]
    net: bool = False


def in_backward() -> bool:
    """Whether autograd is running a graph on this thread."""
    return int(torch._C._current_graph_task_id()) != -1


class _Absent:
    """What the hooks of an unpickled module lead to: its parameters are ordinary ones."""

    def _pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        pass

    def _post_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output


def _grad_arrived(ref: weakref.ref[Engine], unit: int, key: tuple[int, int], param: Tensor) -> None:
    engine = ref()
    if engine is not None:
        engine._on_grad(engine.units[unit], key)


class Engine:
    """Gathers and releases the units of one model.

    Built by :func:`lightning_zinf.engine.partition.partition`.

    Args:
        root: The model.
        units: Its units; the last one is the root's.
        context: Rings, stores and counters.
        prefetch: Whether to fetch ahead along the recorded order.
    """

    def __init__(self, root: nn.Module, units: list[Unit], context: EngineContext, *, prefetch: bool = True) -> None:
        self.root = root
        self.units = units
        self.context = context
        self.counters = context.counters
        self.schedule = Schedule()
        self._prefetch_on = prefetch
        self._unit_of: dict[int, Unit] = {id(b): u for u in units for b in u.buffers}
        self._needs: dict[nn.Module, list[Unit]] = {}
        self.has_pending = False
        self.placement: Placement
        self.config: PartitionConfig
        self._frames: list[Frame] = []
        self._held: dict[Unit, None] = {}  # resident or loading, least recently needed first
        self._host: list[Unit] = []  # HOST, least recently needed first
        self._in_backward_callback = False
        self._backward_nets = 0
        self._net = SavedTensorNet(self)
        self._needs_net = any(not u.persistent for u in units)
        self._any_moves = any(self._moves(u) for u in units)
        self._by_storage: dict[int, FlatBuffer] = {}
        self._any_flips = any(self._flips(u) for u in units)
        self._flipping = [u for u in units if self._flips(u) and not self._moves(u)]
        for unit in units:
            if not self._moves(unit) and not self._flips(unit):
                unit.state = UnitState.RESIDENT  # for good
        self._handles: list[Any] = []
        context.fault = self._on_fault
        context.computing = self._computing
        self._install_hooks()

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """Stay the one engine: a copied module's hooks lead here, where the copy is unknown."""
        return self

    def __reduce__(self) -> Any:
        """Leave a stand-in in the pickle of a module, whose hooks do nothing."""
        return _Absent, ()

    # ------------------------------------------------------------------ hooks

    def _install_hooks(self) -> None:
        self._needs[self.root] = [self.units[-1]]
        for unit in self.units:
            if self._moves(unit) and unit.module is not self.root:
                self._needs[unit.module] = [unit]
        for module, unit in self._borrowers():
            needs = self._needs.setdefault(module, [])
            if unit not in needs:
                needs.append(unit)
        for module in self._needs if self._any_moves or self._any_flips else ():
            pre = module.register_forward_pre_hook(self._pre_forward, prepend=True, with_kwargs=True)
            post = module.register_forward_hook(self._post_forward, always_call=True)
            self._handles += [pre, post]
        engine = weakref.ref(self)  # hooks of tensors hide from the garbage collector what they hold
        for unit in self.units:
            if not unit.persistent or not self.context.aliased:
                for i, buffer in enumerate(unit.buffers):
                    for j, param in enumerate(buffer.params):
                        hook = functools.partial(_grad_arrived, engine, unit.index, (i, j))
                        if param.requires_grad:
                            self._handles.append(param.register_post_accumulate_grad_hook(hook))

    def _borrowers(self) -> Iterator[tuple[nn.Module, Unit]]:
        """Yield modules with a parameter that the unit of another branch owns: tied weights."""
        inside = {u.index: set(u.module.modules()) for u in self.units}
        for module in self.root.modules():
            for param in module._parameters.values():
                found = None if param is None else self.unit_of(param)
                if found is not None and self._moves(found[0]) and module not in inside[found[0].index]:
                    yield module, found[0]

    @staticmethod
    def _moves(unit: Unit) -> bool:
        """Whether anything has to happen before the unit computes."""
        return any(not b.persistent or b.deferred for b in unit.buffers)

    @staticmethod
    def _flips(unit: Unit) -> bool:
        """Whether the user's changes outside of a step have to be taken over, since compute sees other memory."""
        return any(b.flips for b in unit.buffers)

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in self._needs and (self._frames or in_backward() or not self._any_flips):
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
            self._flush_host()
            self.schedule.begin(kind)
        outputs: list[Any] = []
        try:
            self._push(self.root, None)
            yield outputs
        finally:
            self._pop(outputs)

    def _push(self, key: nn.Module, module: nn.Module | None) -> None:
        # The frame goes on the stack first: whatever raises after that, the post-forward hook takes it off again.
        frame = Frame(module, list(self._needs[key]))
        self._frames.append(frame)
        if len(self._frames) == 1 and not in_backward():
            self._flush_host()
            self._gather(self._flipping)
            if self._needs_net and torch.is_grad_enabled():
                self._net.enter()
                frame.net = True
        for needed in frame.needs:
            self._need(needed)

    def _pop(self, output: Any) -> None:
        frame = self._frames.pop()
        if frame.net:
            self._net.exit()
        if not in_backward():  # after recomputation, the backward that follows needs the weights
            live = {id(u) for f in self._frames for u in f.needs}
            for unit in frame.needs:
                if id(unit) not in live:
                    self._release(unit)
            if not self._frames:
                self._release_all()
        if torch.is_grad_enabled() and any(not u.persistent for u in frame.needs):
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(functools.partial(self._pre_backward, frame.needs))

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _pre_backward(self, needs: list[Unit], grad: Tensor) -> None:
        self._queue_callback()
        wanted = {id(u) for u in needs}
        for unit in [u for u in self._held if not u.has_trainable and id(u) not in wanted]:
            self._release(unit)  # nothing will tell when a frozen unit is done; the next unit's turn does
        for unit in needs:
            self._need(unit)

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _on_grad(self, unit: Unit, key: tuple[int, int]) -> None:
        self._queue_callback()
        if not self.context.aliased:
            unit.buffers[key[0]].gradients.take(key[1])
        unit.fired.add(key)
        if unit.fired >= unit.expected():
            unit.fired.clear()
            if not any(unit in f.needs for f in self._frames):
                self._release(unit)

    def _computing(self) -> bool:
        """Whether a use of a parameter now is one of a step."""
        return bool(self._frames) or in_backward()

    def _queue_callback(self) -> None:
        if not self._in_backward_callback:
            self._in_backward_callback = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        self._in_backward_callback = False
        for unit in self.units:
            unit.fired.clear()
        self._release_all()

    def _release_all(self) -> None:
        live = {id(u) for f in self._frames for u in f.needs}
        for unit in [u for u in self._held if id(u) not in live and u.state is UnitState.RESIDENT]:
            self._release(unit)

    def reset(self) -> None:
        """Get ready for the next step after an exception left frames open."""
        while self._frames:
            if self._frames.pop().net:
                self._net.exit()
        self._after_backward()

    # ------------------------------------------------------------------ gathering

    def _need(self, unit: Unit) -> None:
        """Make a unit resident for compute, and fetch ahead."""
        self.schedule.touch(unit.index)
        self._gather([unit])
        self._prefetch()

    def _gather(self, units: list[Unit], keep: list[Unit] | None = None) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for unit in units:
                if unit.state is UnitState.HOST:
                    self._close_host(unit)
            for unit in units:
                self._start(unit, keep=keep or units)
            for unit in units:
                if unit.state is UnitState.RESIDENT:
                    if unit in self._held:
                        self._held.pop(unit)
                        self._held[unit] = None
                else:
                    self._finish(unit)

    def _start(self, unit: Unit, keep: list[Unit]) -> None:
        """Start loading, evicting whatever has to go."""
        if unit.state in (UnitState.LOADING, UnitState.RESIDENT):
            return
        pinned = {id(u) for f in self._frames for u in f.needs} | {id(u) for u in keep}
        for buffer in unit.buffers:
            while not buffer.start(force=False):
                if (victim := self._victim(pinned)) is not None:
                    self._release(victim)
                elif (opened := self._unseen_host(pinned)) is not None:
                    self._close_host(opened)
                else:
                    buffer.start(force=True)
                    break
        unit.state = UnitState.LOADING
        self._held[unit] = None

    def _unseen_host(self, pinned: set[int]) -> Unit | None:
        """Return the unit that code outside of a step has used longest ago and no longer sees."""
        return next((u for u in self._host if id(u) not in pinned and not any(b.seen for b in u.buffers)), None)

    def _victim(self, pinned: set[int]) -> Unit | None:
        """Return the unit to evict: what was fetched for the farthest future, else what was needed longest ago."""
        spare = [u for u in self._held if id(u) not in pinned and not u.persistent]
        loading = [u for u in spare if u.state is UnitState.LOADING]
        return loading[-1] if loading else next(iter(spare), None)

    def _finish(self, unit: Unit) -> None:
        try:
            for buffer in unit.buffers:
                buffer.load()
        except BaseException:
            self._release(unit)
            raise
        for buffer in unit.buffers:
            buffer.bind()
            if not buffer.persistent:
                self._by_storage[buffer.storage_key()] = buffer
        unit.state = UnitState.RESIDENT
        self.counters.gathers += 1

    def _release(self, unit: Unit, *, stale: bool = False) -> None:
        """Give a unit's slots back.

        Args:
            unit: The unit.
            stale: Its weights are out of date, so also weights that stay in place must not be used as they are.
        """
        if unit.state not in (UnitState.LOADING, UnitState.RESIDENT):
            return
        if unit.persistent and not stale and not self._flips(unit):
            return
        self._held.pop(unit, None)
        unit.state = UnitState.RELEASED
        with torch.inference_mode(False):
            for buffer in unit.buffers:
                if buffer.bound == "compute" and not buffer.persistent:
                    self._by_storage.pop(buffer.storage_key(), None)
                buffer.unbind()

    def _prefetch(self, *, wrap: bool = False) -> None:
        if not self._prefetch_on or not self._any_moves:
            return
        for unit in self._held:
            if unit.state is UnitState.LOADING:
                unit.prefetch_state()
        with torch.inference_mode(False), torch.no_grad():
            self._start_ahead(wrap=wrap)

    def _start_ahead(self, *, wrap: bool) -> None:
        """Start to load what the recorded order expects next, until no slot is free."""
        for index in self.schedule.ahead(wrap=wrap):
            unit = self.units[index]
            if unit.state is not UnitState.RELEASED or not self._moves(unit):
                continue
            started: list[FlatBuffer] = []
            for buffer in unit.buffers:
                if not buffer.start(force=False):
                    for other in started:
                        other.weights.leave()
                    return
                started.append(buffer)
            unit.state = UnitState.LOADING
            self._held[unit] = None

    # ------------------------------------------------------------------ faults and the user's view

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _on_fault(self, owners: list[Any]) -> None:
        self.counters.faults += 1
        units: list[Unit] = []
        for owner in owners:
            unit = self._unit_of[id(owner)]
            if unit not in units:
                units.append(unit)
        if self._computing():
            for unit in units:
                self.schedule.touch(unit.index)
            self._gather(units)
            if self._frames:
                self._remember(self._frames[-1], units)
        else:
            self._open_host(units)

    def _remember(self, frame: Frame, units: list[Unit]) -> None:
        """A unit that is used in another's forward is gathered along with it from now on, and in its backward."""
        if frame.module is None or frame.module is self.root:
            return  # whatever a whole step touches would pile up
        recorded = self._needs[frame.module]
        for unit in units:
            for needs in (frame.needs, recorded):
                if unit not in needs:
                    needs.append(unit)

    def _open_host(self, units: list[Unit]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for unit in units:
                if unit.state is UnitState.HOST:
                    self._host.remove(unit)
                else:
                    self._gather([unit], keep=units)
                    for buffer in unit.buffers:
                        buffer.open_master()
                    self._held.pop(unit, None)
                    unit.state = UnitState.HOST
                self._host.append(unit)
            spare = [u for u in self._host if u not in units]
            for unit in spare[: max(0, len(self._host) - max(MAX_HOST_UNITS, len(units)))]:
                if not any(b.seen for b in unit.buffers):
                    self._close_host(unit)

    def _close_host(self, unit: Unit) -> None:
        """Take the user's changes to a unit back and release it."""
        with torch.inference_mode(False), torch.no_grad():
            for buffer in unit.buffers:
                buffer.close_master()
            self.context.drop_scratch()
            if not unit.persistent:
                # A graph built outside of a step may have saved the parameters: have it refuse, not read NaN.
                torch.autograd.graph.increment_version([p for b in unit.buffers for p in b.params])
        self._host.remove(unit)
        self._held[unit] = None
        unit.state = UnitState.RESIDENT
        self._release(unit)

    def _flush_host(self) -> None:
        for unit in list(self._host):
            self._close_host(unit)

    # ------------------------------------------------------------------ for the net

    def buffer_at(self, storage: int) -> FlatBuffer | None:
        """Return the paged buffer whose slot has this storage, if any."""
        return self._by_storage.get(storage)

    def refill(self, buffer: FlatBuffer) -> Tensor:
        """Make the buffer's unit resident for backward and return the flat weights."""
        unit = self._unit_of[id(buffer)]
        if unit.state is not UnitState.RESIDENT:
            self.counters.refills += 1
            self._gather([unit])
        return buffer.weights.flat()

    # ------------------------------------------------------------------ flushing

    @contextmanager
    def loaded(self, unit: Unit) -> Iterator[Unit]:
        """Have a unit's weights loaded and its updates applied, to read or replace whole planes."""
        if unit.state is UnitState.HOST:
            self._close_host(unit)
        self._gather([unit])
        self._take_in(unit)
        try:
            yield unit
        finally:
            if not any(unit in f.needs for f in self._frames):
                self._release(unit)

    @staticmethod
    def _take_in(unit: Unit) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for buffer in unit.buffers:
                if buffer.persistent:
                    buffer.take_in()

    # ------------------------------------------------------------------ updates

    def update(self, buffer: FlatBuffer, update: Update) -> None:
        """Apply an optimizer step to a buffer, now or when its weights are next needed."""
        unit = self._unit_of[id(buffer)]
        with torch.inference_mode(False), torch.no_grad():
            if unit.state is UnitState.HOST:
                self._close_host(unit)
            buffer.pending.append(update)
            if buffer.deferred:
                self._release(unit, stale=True)
                self.has_pending = True
            else:
                buffer.take_in()
                buffer.load()
                torch.autograd.graph.increment_version(buffer.params)

    def prefetch_next_step(self) -> None:
        """Start to fetch what the next step begins with."""
        self._prefetch(wrap=True)

    def before_backward(self) -> None:
        """Make room for the gradients of a backward that is about to start."""
        self._gather(self._flipping)
        for unit in self.units:
            for buffer in unit.buffers:
                buffer.gradients.before_backward()
        if self._needs_net:  # recomputation saves tensors too, and so does a backward that builds a graph
            self._net.enter()
            self._backward_nets += 1

    def after_backward(self) -> None:
        """Release what a backward that has ended, well or not, left behind."""
        if self._backward_nets:
            self._backward_nets -= 1
            self._net.exit()
        self._after_backward()

    def flush(self) -> None:
        """Apply every pending update, take in the user's changes, and wait for every write."""
        self._flush_host()
        for unit in self.units:
            if any(b.pending for b in unit.buffers):
                with self.loaded(unit):
                    pass
            else:
                self._take_in(unit)
        self.has_pending = False
        self.context.drain()

    def release_host(self) -> None:
        """Take in what code outside of a step did to parameters, and release them."""
        self._flush_host()

    def dissolve(self) -> None:
        """Turn every parameter back into an ordinary tensor with the master's value, and give all memory back.

        Optimizer state is lost. The model must fit into the accelerator's memory.
        """
        self.flush()
        for handle in self._handles:
            handle.remove()
        for unit in self.units:
            with self.loaded(unit), torch.inference_mode(False), torch.no_grad():
                values = [[v.to(b.view_dtype, copy=True) for v in b.views_of(b.read_master())] for b in unit.buffers]
            for buffer, tensors in zip(unit.buffers, values, strict=True):
                buffer.let_go(tensors)
        self.context.close()

    def unit_of(self, param: nn.Parameter) -> tuple[Unit, FlatBuffer, int] | None:
        """Return where a parameter lives, or None if this engine does not manage it."""
        entry = owner_of(param)
        if entry is None or id(entry[0]) not in self._unit_of:
            return None
        return self._unit_of[id(entry[0])], entry[0], entry[1]
