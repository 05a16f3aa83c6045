"""Any optimizer that works element by element, by its own code on pieces of parameters.

Note [Pieces]
~~~~~~~~~~~~~
A shard or a tile has parts of parameters, in no shape. An optimizer whose every output element depends on the same
element of its inputs alone (SGD, Adagrad, RMSprop, NAdam...) computes the same on a part as on the whole. Whether a
class is of that kind is found out by trying: a small matrix is updated whole and in pieces, and every bit of weights
and state must agree. Optimizers that look at whole matrices (Muon, Adafactor, Shampoo) or at the loss (LBFGS) do not
pass and are refused.

The class runs as it is, on a copy of the optimizer object that has the pieces for parameters. Its state is tensors of
the parameter's shape, which are planes of the buffer's state, and the rest (step counts), which every rank keeps.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_zinf.engine.gradients import Piece
from lightning_zinf.memory.state import Record
from lightning_zinf.optim.update import Group, Rule, Update, master_of, set_master

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer

_CHUNK = 1 << 20
"""Elements that are updated at a time: bounds the memory for float32 copies of weights and gradients."""
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@dataclass(frozen=True)
class ParamState:
    """State of one parameter.

    Attributes:
        planes: The tensors of its shape that there are.
        rest: Everything else.
    """

    planes: tuple[str, ...]
    rest: dict[str, Any]


@dataclass
class _Target:
    """A piece of a parameter that is to be updated."""

    piece: Piece
    group: Group


class ElementwiseRule(Rule):
    """Steps of an optimizer that works element by element.

    Args:
        optimizer: The user's.

    Raises:
        ValueError: If it does not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        kind: Any = type(optimizer)
        self.kind: Any = getattr(kind, "_zinf_base", kind)
        self.name = str(self.kind.__name__)
        self._optimizer = weakref.ref(optimizer)
        self._planes: dict[str, tuple[str, ...]] = {}
        for group in optimizer.param_groups:
            self.planes(group)

    def planes(self, group: Group) -> tuple[str, ...]:
        """Return what an update of a small matrix leaves in the state; hyper-parameters may decide on that."""
        key = repr(
            sorted((k, bool(v) if isinstance(v, (int, float)) else v) for k, v in group.items() if k != "params")
        )
        if key not in self._planes:
            self._planes[key] = _probe(self, group)
        return self._planes[key]

    def capture(
        self,
        buffer: FlatBuffer,
        pieces: Sequence[Piece],
        groups: Mapping[int, Group],
        grad_scale: float,
        clip_value: float | None,
    ) -> Update:
        """Note the gradients, and copy the groups."""
        copies: dict[int, Group] = {}
        targets = []
        for piece in pieces:
            group = groups[piece.index]
            if id(group) not in copies:
                copies[id(group)] = _copied({k: v for k, v in group.items() if k != "params"})
                buffer.need_planes(self.planes(group))
            buffer.steps[piece.index] += 1
            targets.append(_Target(piece, copies[id(group)]))
        return ElementwiseUpdate(self, buffer.param_states, targets, grad_scale, clip_value)

    def entry(self, buffer: FlatBuffer, index: int) -> tuple[dict[str, Any], tuple[str, ...]] | None:
        """Everything of the state that is not a plane."""
        kept = buffer.param_states[index]
        return None if kept is None else (_copied(kept.rest), kept.planes)

    def restore(self, buffer: FlatBuffer, index: int, entry: Mapping[str, Any], group: Group) -> None:
        """Take in everything of the state that is not a plane.

        Raises:
            ValueError: If it is the state of another kind of optimizer.
        """
        if not entry:
            buffer.param_states[index] = None
            buffer.steps[index] = 0
            return
        planes = self.planes(group)
        self.refuse_another(entry, group)
        rest = _copied({k: v for k, v in entry.items() if k not in planes})
        buffer.param_states[index] = ParamState(tuple(p for p in planes if entry[p] is not None), rest)
        buffer.steps[index] = int(entry.get("step", 1))

    def run(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]], groups: Sequence[Group]) -> None:
        """Have the class take a step.

        Args:
            params: Tensors with a ``grad``, updated in place.
            states: The state of each, updated in place.
            groups: The param group of each.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        shadow = self.kind.__new__(self.kind)
        shadow.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "step"})
        shadow.__dict__.update({name: OrderedDict() for name in _HOOKS})
        shadow.state = defaultdict(dict, zip(params, states, strict=True))
        shadow.param_groups = []
        for group in {id(g): g for g in groups}.values():
            members = [p for p, g in zip(params, groups, strict=True) if g is group]
            shadow.param_groups.append({**group, "params": members})
        self.kind.step(shadow)


@dataclass
class ElementwiseUpdate(Update):
    """A step of this rank's shard of one buffer, by the user's class.

    Attributes:
        rule: Runs the class.
        states: State of each parameter of the buffer, replaced at the end.
        targets: What to update.
        grad_scale: Factor on every gradient.
        clip_value: Largest absolute value of a gradient after scaling, or None.
    """

    changes_rest = True
    rule: ElementwiseRule
    states: list[ParamState | None]
    targets: list[_Target]
    grad_scale: float
    clip_value: float | None
    _after: dict[int, ParamState] = field(default_factory=dict)

    def update_record(self, weight: Tensor, record: Record) -> None:
        """Update a range of elements, some at a time."""
        for low in range(record.start, record.stop, _CHUNK):
            high = min(low + _CHUNK, record.stop)
            cuts = [
                (target, max(low, start), min(high, start + target.piece.grad.numel()))
                for target in self.targets
                if (start := target.piece.start) < high and low < start + target.piece.grad.numel()
            ]
            if cuts:
                planes = {n: p[low - record.start : high - record.start] for n, p in record.planes.items()}
                self._update(weight[low - record.start : high - record.start], planes, low, cuts)

    def _update(
        self, weight: Tensor, planes: dict[str, Tensor], first: int, cuts: Sequence[tuple[_Target, int, int]]
    ) -> None:
        master = master_of(weight, planes)
        params, states, homes = [], [], []
        for target, low, high in cuts:
            kept = self.states[target.piece.index]
            param = master[low - first : high - first].detach()
            param.grad = self._gradient(target.piece, low, high)
            home = {name: plane[low - first : high - first] for name, plane in planes.items()}
            if kept is None:
                state = fresh_state(self.rule, target.group, param)
            else:
                state = {**_copied(kept.rest), **{p: home[p] for p in kept.planes}}
            params.append(param)
            states.append(state)
            homes.append((home, param.data_ptr(), master[low - first : high - first]))
        self.rule.run(params, states, [target.group for target, _, _ in cuts])
        for (target, _, _), param, state, (home, address, place) in zip(cuts, params, states, homes, strict=True):
            if param.data_ptr() != address:  # the class has put other data into the parameter
                place.copy_(param)
            self._after[target.piece.index] = self._put(state, home, target)
        set_master(weight, planes, master)

    def _gradient(self, piece: Piece, low: int, high: int) -> Tensor:
        grad = piece.grad.view(-1)[low - piece.start : high - piece.start].float()
        if self.grad_scale != 1.0:
            grad = grad * self.grad_scale
        return grad if self.clip_value is None else grad.clamp(-self.clip_value, self.clip_value)

    def _put(self, state: dict[str, Any], home: dict[str, Tensor], target: _Target) -> ParamState:
        """Move new tensors of state to their planes; return what the parameter has then."""
        names = [n for n in self.rule.planes(target.group) if state.get(n) is not None]
        for name in names:
            if state[name].data_ptr() != home[name].data_ptr() or not home[name].numel():
                home[name].copy_(state[name])
        return ParamState(tuple(names), {k: v for k, v in state.items() if k not in names})

    def finish(self) -> None:
        """Let the next step begin from this one's step counts; other ranks' parts are counted here too."""
        elsewhere = [t for t in self.targets if t.piece.index not in self._after]
        for target in elsewhere:
            kept = self.states[target.piece.index]
            param = torch.empty(0)
            param.grad = torch.empty(0)
            if kept is None:
                state = fresh_state(self.rule, target.group, param)
            else:
                state = {**_copied(kept.rest), **{p: torch.empty(0) for p in kept.planes}}
            self.rule.run([param], [state], [target.group])
            empty = {n: torch.empty(0) for n in self.rule.planes(target.group)}
            self._after[target.piece.index] = self._put(state, empty, target)
        for index, kept_now in self._after.items():
            self.states[index] = kept_now


def fresh_state(rule: ElementwiseRule, options: Group, param: Tensor) -> dict[str, Any]:
    """Return the state that an optimizer has before its first step: some (Adagrad) make it when they are built."""
    accepted = inspect.signature(rule.kind.__init__).parameters
    param = param.clone().requires_grad_()
    fresh = rule.kind([param], **{k: v for k, v in options.items() if k in accepted})
    return dict(fresh.state.get(param, {}))


def _copied(value: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in value.items()}


# ---------------------------------------------------------------------- finding out

_ROWS, _COLUMNS, _CUT, _STEPS = 6, 8, 13, 3


def _probe(rule: ElementwiseRule, group: Group) -> tuple[str, ...]:
    """Return the names of the planes that the class keeps.

    Raises:
        ValueError: If updating a matrix whole and in pieces gives different bits.
    """
    options = {k: v for k, v in group.items() if k != "params"}
    kind = rule.kind
    name = f"{kind.__module__}.{kind.__qualname__}"
    if options.get("differentiable"):
        raise ValueError(f"{name}(..., differentiable=True) is not supported by the zinf strategy: set it to False")
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(_ROWS, _COLUMNS, generator=generator) for _ in range(_STEPS + 1)]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            whole, whole_state = _run_whole(rule, options, values)
            parts, part_states = _run_parts(rule, options, values)
    except Exception as error:
        raise ValueError(_refusal(name, f"it fails there with {type(error).__name__}: {error}")) from error
    planes = tuple(k for k, v in whole_state.items() if isinstance(v, Tensor) and v.shape == (_ROWS, _COLUMNS))
    if not torch.equal(whole.view(-1).view(torch.int32), parts.view(torch.int32)):
        raise ValueError(_refusal(name, "the weights come out different there"))
    for key, value in whole_state.items():
        found = [state.get(key) for state in part_states]
        if key in planes:
            same = torch.equal(value.reshape(-1), torch.cat([f.reshape(-1) for f in found if f is not None]))
        elif isinstance(value, Tensor):
            same = all(isinstance(f, Tensor) and f.shape == value.shape and torch.equal(f, value) for f in found)
        else:
            same = all(bool(f == value) for f in found)
        if not same:
            raise ValueError(_refusal(name, f"its state {key!r} comes out different there"))
    return planes


def _refusal(name: str, why: str) -> str:
    return (
        f"configure_optimizers returned {name}, which does not work on parts of parameters: {why}. The zinf strategy "
        "updates shards, so it takes optimizers that work element by element: torch.optim.AdamW and Adam (with a "
        "kernel of its own), SGD, Adagrad, RMSprop, NAdam, RAdam, Adamax, Adadelta, Rprop, ASGD and others of that "
        "kind; not those that need whole matrices or closures (LBFGS, Muon, Adafactor, Shampoo)"
    )


def _run_whole(rule: ElementwiseRule, options: Group, values: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
    param, state = values[0].clone(), fresh_state(rule, options, values[0])
    for grad in values[1:]:
        param.grad = grad.clone()
        rule.run([param], [state], [options])
    return param, state


def _run_parts(rule: ElementwiseRule, options: Group, values: list[Tensor]) -> tuple[Tensor, list[dict[str, Any]]]:
    bounds = [(0, _CUT), (_CUT, _ROWS * _COLUMNS), (0, 0)]  # the last as on a rank that has nothing of the parameter
    params = [values[0].view(-1)[low:high].clone() for low, high in bounds]
    states = [fresh_state(rule, options, p) for p in params]
    for grad in values[1:]:
        for param, (low, high) in zip(params, bounds, strict=True):
            param.grad = grad.view(-1)[low:high].clone()
        rule.run(params, states, [options] * len(params))
    return torch.cat(params), states
