"""The user's optimizer object, with a step of ours.

Note [Binding]
~~~~~~~~~~~~~~
The object stays: schedulers hold it, and its ``param_groups`` are the only source of hyper-parameters. Its class
becomes a subclass of its own class whose ``step``, ``zero_grad``, ``state_dict`` and ``load_state_dict`` go to the
engine. (A method put on the instance would not be seen by Lightning, which makes another subclass of the object's
class; and a scheduler has put a wrapper of the old ``step`` on the instance, which has to go.)

What the engine does for it is an attribute of the object, so that the two can go together. A table of ours, also one
with weak keys, would keep what it leads to: the engine, its module, the Trainer, and by way of that the optimizer
itself. Copies and pickles of an optimizer do not have the attribute.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_zinf.engine.spent import refuse_spent
from lightning_zinf.engine.squares import sums_of_squares
from lightning_zinf.monitor.trace import span
from lightning_zinf.optim.adam import AdamRule, is_fused_adam
from lightning_zinf.optim.elementwise import ElementwiseRule
from lightning_zinf.optim.state_dict import load_optimizer_state_dict, optimizer_state_dict
from lightning_zinf.optim.update import Rule, Update, clip_coefficient

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer
    from lightning_zinf.engine.engine import Engine
    from lightning_zinf.engine.units import Unit

_BINDING = "_zinf_binding"


class OptimizerBinding:
    """What the engine does for one optimizer.

    Args:
        optimizer: One over parameters of the engine's model.
        engine: The engine.
        rule: What its steps do; found out if it is not given.

    Raises:
        ValueError: If it cannot work on shards, or has parameters that are not the model's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, engine: Engine, rule: Rule | None = None) -> None:
        self.rule = rule_of(optimizer) if rule is None else rule
        self.engine = engine
        self.unscale = 1.0  # undoes the scaling of the loss
        self.grad_scale = 1.0
        self.clip_value: float | None = None
        self.early = False  # whether the coming step may be taken in backward
        self.wants_norm = False  # whether the coming backward may sum the squares of gradients as they are complete
        self.average: float | None = None  # weight of the old running average in the coming step
        self.averaged = 0  # updates that it has had
        self.watches = False  # whether gradients may not be zeroed between steps, as the loop is the user's own
        self._taken_early: list[tuple[FlatBuffer, Collection[int]]] = []  # gradients that the coming step has used
        self._optimizer = weakref.ref(optimizer)
        for group in optimizer.param_groups:
            self.adopt_group(group)
        _swap_class(optimizer)
        optimizer.__dict__[_BINDING] = self

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The user's optimizer."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    def adopt_group(self, group: dict[str, Any]) -> None:
        """Make sure that every parameter of a param group has its planes of state.

        Raises:
            ValueError: If a parameter is not the model's, or of a dtype that cannot be trained.
        """
        for param in group["params"]:
            found = self.engine.places_of(param)
            if not found:
                raise ValueError(
                    f"the optimizer has a parameter of shape {tuple(param.shape)} and dtype {param.dtype} that the "
                    "strategy does not manage: it takes float32 and bfloat16 parameters that the LightningModule had "
                    "when fit began, and no copies of them"
                )
            for _, buffer, _ in found:
                buffer.need_planes(self.rule.planes(group))

    def buffers(self) -> list[FlatBuffer]:
        """Return the buffers that have parameters of this optimizer."""
        return [buffer for buffer, _ in self._by_buffer()]

    def _by_buffer(self) -> Iterator[tuple[FlatBuffer, dict[int, dict[str, Any]]]]:
        """Yield each buffer with the param group of each of its parameters that this optimizer has."""
        buffers: dict[int, tuple[FlatBuffer, dict[int, dict[str, Any]]]] = {}
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                found = self.engine.places_of(param)
                assert found, "an unmanaged parameter passed adopt_group"
                for _, buffer, index in found:
                    buffers.setdefault(id(buffer), (buffer, {}))[1][index] = group
        yield from buffers.values()

    # ------------------------------------------------------------------ clipping

    @contextmanager
    def norm_ahead(self) -> Iterator[None]:
        """Sum the squares of gradients as they are complete in a backward that runs inside, if that may be."""
        ahead, self.wants_norm = self.wants_norm, False
        with self.engine.summing_squares() if ahead else nullcontext():
            yield

    def _squares(self) -> tuple[list[float], list[float]]:
        """Return the sum of squares of each gradient, in the order of the parameters, those of float16 apart."""
        self.engine.reduce_gradients()
        sums: list[float | None] = []
        left: list[Tensor] = []
        low: list[bool] = []
        for buffer, groups in self._by_buffer():
            pieces = buffer.gradients.collect(groups, keep=True)
            for piece, known in zip(pieces, buffer.gradients.squares_of(pieces), strict=True):
                sums.append(known)
                low.append(piece.grad.dtype == torch.float16)
                if sums[-1] is None:
                    left.append(piece.grad)
        nbytes = sum(grad.nbytes for grad in left)
        self.engine.counters.norm_bytes += nbytes
        with span(self.engine.counters, "norm", "the rest", nbytes):
            rest = iter(sums_of_squares(left))
        found = [next(rest) if total is None else total for total in sums]
        return [s for s, of in zip(found, low, strict=True) if not of], [
            s for s, of in zip(found, low, strict=True) if of
        ]

    def grad_norm(self) -> float:
        """Return the 2-norm of all gradients as one vector; the squares are summed in float64.

        It is not finite, on every rank, if a gradient is not finite on any.
        """
        high, low = self._squares()
        total = sum(high, 0.0)
        for square in low:
            total += square
        return float(self.engine.sum_over_shards(total, "the norm of the gradients") ** 0.5) * self.unscale

    def clip_by_norm(self, max_norm: float) -> float:
        """Scale the gradients of the coming step so that their norm is at most ``max_norm``; return the norm before.

        Raises:
            ValueError: If the gradients of this step have been clipped by value already: the update scales first, and
                clamps then.
        """
        if self.clip_value is not None:
            raise ValueError(
                "gradients of one step were clipped by value and then by norm, which the zinf strategy cannot do in "
                "that order: clip by norm first, or by one of them"
            )
        norm = self.grad_norm()
        self.grad_scale = clip_coefficient(max_norm, norm)
        return norm

    def clip_by_value(self, value: float) -> None:
        """Clamp the gradients of the coming step to ``[-value, value]``."""
        self.clip_value = float(value)

    # ------------------------------------------------------------------ the step

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Where ``early`` is set, take the coming step unit by unit in a backward that runs inside."""
        early, self.early = self.early, False
        if not early:
            with self.norm_ahead():
                yield
            return
        groups = {id(buffer): (buffer, own) for buffer, own in self._by_buffer()}
        self._taken_early.clear()

        def apply(unit: Unit) -> None:
            updates: list[tuple[FlatBuffer, Update]] = []
            for buffer in unit.buffers:
                if id(buffer) not in groups or not buffer.deferred:
                    continue
                own = groups[id(buffer)][1]
                try:
                    self._refuse_spent(((buffer, own),))
                except ValueError:
                    self.engine.early.updated.discard(unit.index)
                    raise
                if pieces := buffer.gradients.collect(own, keep=False):
                    update = self.rule.capture(buffer, pieces, own, 1.0, None)  # the gradients have their values
                    update.touches = [piece.index for piece in pieces]
                    updates.append((buffer, update))
                    self._taken_early.append((buffer, update.touches))
            self.engine.pager.update_now(unit, updates)

        try:
            with self.engine.updating_early(apply):
                yield
        except BaseException:
            if count := len(self.engine.early.updated):
                warnings.warn(
                    f"backward failed when {count} of {len(self.engine.units)} units had taken its optimizer step "
                    "already: they are one step ahead of the others. Go on from a checkpoint, or set "
                    "overlap.update='forward', where a step that fails in backward changes nothing",
                    stacklevel=2,
                )
            raise

    def step(self) -> None:
        """Take one optimizer step, now or just in time."""
        self._refuse_spent(self._by_buffer())
        scale, clip_value, average = self.grad_scale * self.unscale, self.clip_value, self.average
        self.forget_scaling()
        self.averaged += average is not None
        changed = self.watches and (scale != 1.0 or clip_value is not None)  # plain torch clips what p.grad has
        self.engine.reduce_gradients()
        self.engine.begin_updates("an optimizer step")
        for buffer, groups in self._by_buffer():
            spent, keep = buffer.gradients.spent, not buffer.deferred and not changed
            zeros = spent.zeros(groups)
            pieces = buffer.gradients.collect(groups, keep=keep)
            source = pieces[0].source if pieces else None
            if zeros := zeros.difference(piece.index for piece in pieces):
                pieces = sorted([*pieces, *buffer.zero_pieces(zeros)], key=lambda piece: piece.index)
            if not pieces and average is None:
                continue
            update = self.rule.capture(buffer, pieces, groups, scale, clip_value)
            update.average, update.source = average, source
            update.touches = [piece.index for piece in pieces]
            self.engine.update(buffer, update)
            buffer.gradients.squares.forget()
            if not keep:
                self._mark_spent(buffer, update.touches)
        while self._taken_early:
            self._mark_spent(*self._taken_early.pop())
        self.engine.between_steps = True
        self.engine.stepped()

    def _refuse_spent(self, buffers: Iterable[tuple[FlatBuffer, Collection[int]]]) -> None:
        """Refuse gradients that an earlier step has used up.

        Raises:
            ValueError: If there are any.
        """
        if self.watches:
            left = [(buffer, buffer.gradients.spent.left(indices)) for buffer, indices in buffers]
            refuse_spent([buffer.names[index] for buffer, indices in left for index in indices])

    def _mark_spent(self, buffer: FlatBuffer, indices: Collection[int]) -> None:
        if self.watches:
            buffer.gradients.spent.mark(indices)

    def forget_scaling(self) -> None:
        """Forget what the gradients of the coming step were to be scaled and clipped by, and averaging."""
        self.unscale, self.grad_scale, self.clip_value, self.average = 1.0, 1.0, None, None

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients of this optimizer's parameters.

        Args:
            set_to_none: If False, and where the loop is the user's own, a parameter that has had one takes the coming
                step with a gradient of zeros, if it gets no other.
        """
        for buffer, groups in self._by_buffer():
            spent = buffer.gradients.spent
            zeros = [] if set_to_none or not self.watches else spent.present(groups)
            buffer.gradients.clear(groups)
            spent.zero(zeros)


def rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    """Return what the steps of an optimizer do.

    Raises:
        ValueError: If it cannot work on shards.
    """
    return AdamRule(type(optimizer)) if is_fused_adam(optimizer) else ElementwiseRule(optimizer)


def binding_of(optimizer: torch.optim.Optimizer) -> OptimizerBinding:
    """Return the binding of an optimizer (or of Lightning's wrapper of it).

    Raises:
        ValueError: If it was never bound.
    """
    inner = getattr(optimizer, "_optimizer", optimizer)
    try:
        binding: OptimizerBinding = inner.__dict__[_BINDING]
        return binding
    except KeyError:
        raise ValueError(
            f"{type(inner).__name__} is not bound to the zinf strategy: return it from configure_optimizers"
        ) from None


def _step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad(), binding_of(self).in_backward():
            loss = closure()
    self._opt_called = True  # type: ignore[attr-defined]  # what a scheduler looks for
    binding_of(self).step()
    return loss


def _zero_grad(self: torch.optim.Optimizer, set_to_none: bool = True) -> None:
    binding_of(self).zero_grad(set_to_none=set_to_none)


def _add_param_group(self: Any, param_group: dict[str, Any]) -> None:
    self._zinf_base.add_param_group(self, param_group)
    binding = self.__dict__.get(_BINDING)
    if binding is not None:
        binding.adopt_group(self.param_groups[-1])


def _state_dict(self: torch.optim.Optimizer) -> dict[str, Any]:
    return optimizer_state_dict(binding_of(self))


def _load_state_dict(self: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    load_optimizer_state_dict(binding_of(self), state_dict)


@functools.cache
def _bound_class(cls: Any) -> type[torch.optim.Optimizer]:
    step: Any = torch.optim.Optimizer.profile_hook_step(_step)  # the user's step hooks keep running
    step.hooked = True
    step._wrapped_by_lr_sched = True
    body = {
        "step": step,
        "zero_grad": _zero_grad,
        "add_param_group": _add_param_group,
        "state_dict": _state_dict,
        "load_state_dict": _load_state_dict,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_zinf_base": cls,
    }
    return type(cls.__name__, (cls,), body)


def _swap_class(optimizer: torch.optim.Optimizer) -> None:
    optimizer.__dict__.pop("step", None)
    cls = type(optimizer)
    if not hasattr(cls, "_zinf_base"):
        optimizer.__class__ = _bound_class(cls)  # type: ignore[arg-type,unused-ignore]


def unbind(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer its own methods back."""
    optimizer.__dict__.pop(_BINDING, None)
    base = getattr(type(optimizer), "_zinf_base", None)
    if base is not None:
        optimizer.__class__ = base
