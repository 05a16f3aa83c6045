"""Units: which modules are gathered and released together.

Note [How units are found]
~~~~~~~~~~~~~~~~~~~~~~~~~~
From the top down, without help from the user:

1. Modules of classes that the user named are units.
2. The children of a ModuleList, ModuleDict or Sequential that has several parameterised children of one class are
   units: these are the repeated blocks of a network.
3. A subtree without such blocks inside is one unit if it is not larger than ``unit_bytes``; else its children are
   looked at one by one, and a module that has no children is a unit whatever its size.
4. What is smaller than ``SMALL`` bytes joins the nearest module above; what is left belongs to the root unit.

A parameter belongs to the first unit that reaches it, so tied weights have one owner. A wrong guess costs speed, never
correctness: a released parameter that is used outside of its unit's forward comes all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from torch import nn

from lightning_zinf.engine.buffer import FlatBuffer

SMALL = 64 * 1024
"""Bytes: a subtree with fewer is not worth a gather of its own."""
_NAMED = 12
"""Classes that an error message names."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class UnitState(Enum):
    """Where a unit is between released and resident."""

    RELEASED = auto()
    """No weights gathered; any use of a parameter faults."""
    LOADING = auto()
    """A slot is taken and reads are under way."""
    RESIDENT = auto()
    """Parameters view the gathered weights, in the compute dtype."""
    HOST = auto()
    """Parameters view the master, for code outside of a training step."""


@dataclass(eq=False)
class Unit:
    """A module subtree whose parameters are gathered and released together.

    Attributes:
        index: Number of the unit in the engine.
        name: Fully qualified name of the module; "" is the root.
        module: The module whose forward the unit serves.
        buffers: Its flat buffers, one for each dtype and trainability.
        state: Where it is between released and resident.
        fired: Parameters whose gradient is complete in the backward under way, as ``(buffer, index)``.
    """

    index: int
    name: str
    module: nn.Module
    buffers: list[FlatBuffer]
    state: UnitState = UnitState.RELEASED
    fired: set[tuple[int, int]] = field(default_factory=set)

    def __repr__(self) -> str:
        return f"Unit({self.label!r}, {self.state.name})"

    @property
    def label(self) -> str:
        """The unit's name for messages and traces."""
        return self.name or "<root>"

    @property
    def weight_bytes(self) -> int:
        """Bytes of gathered weights, padding included."""
        return sum(b.weight_bytes for b in self.buffers)

    @property
    def persistent(self) -> bool:
        """Whether its weights stay where compute reads them."""
        return all(b.persistent for b in self.buffers)

    @property
    def moves(self) -> bool:
        """Whether anything has to happen before it computes."""
        return any(not b.persistent or b.deferred for b in self.buffers)

    @property
    def flips(self) -> bool:
        """Whether the user's changes outside of a step have to be taken over, since compute sees other memory."""
        return any(b.flips for b in self.buffers)

    @property
    def has_trainable(self) -> bool:
        """Whether a gradient can arrive for any of its parameters."""
        return any(p.requires_grad for b in self.buffers for p in b.params)

    @property
    def collected(self) -> bool:
        """Whether its weights are here, or will be without another collective."""
        return all(b.collected for b in self.buffers)

    def prefetch_state(self, *, before_step: bool = False) -> None:
        """Start to fetch the state that updates need, as far as staging has room.

        Args:
            before_step: Not only for updates that are pending or that this backward will make, but also for those
                that the coming optimizer step is expected to leave.
        """
        for buffer in self.buffers:
            buffer.prefetch_state(before_step=before_step)

    def expected(self) -> set[tuple[int, int]]:
        """Return the parameters whose gradients complete the unit's backward."""
        return {(i, j) for i, b in enumerate(self.buffers) for j, p in enumerate(b.params) if p.requires_grad}


@dataclass
class UnitPlan:
    """A unit before its buffers are built.

    Attributes:
        name: Fully qualified name of the module.
        module: The module whose forward the unit serves.
        params: ``(fully qualified name, parameter)``, each parameter of the model in one plan only.
    """

    name: str
    module: nn.Module
    params: list[tuple[str, nn.Parameter]]


def check_classes(option: str, classes: Sequence[str], modules: Iterable[nn.Module]) -> None:
    """Raise ValueError, with the names that there are, if a name is not the class of any of the modules."""
    present = dict.fromkeys(type(m).__name__ for m in modules)
    unknown = [name for name in classes if name not in present]
    if unknown:
        more = f" and {len(present) - _NAMED} others" if len(present) > _NAMED else ""
        raise ValueError(
            f"{option}={list(classes)!r}: the model has no module of class {', '.join(map(repr, unknown))}, but of "
            f"{', '.join(list(present)[:_NAMED])}{more}"
        )


def find_units(
    root: nn.Module, unit_bytes: int, classes: Sequence[str] = (), apart: Collection[int] = ()
) -> list[UnitPlan]:
    """Cut a model into units, in the order of ``root.named_modules()``, the root last.

    Args:
        root: The model.
        unit_bytes: Largest subtree without repeated blocks that becomes one unit.
        classes: Class names of modules that are units in any case.
        apart: ``id`` of each parameter that is left out: its tiles are units of their own.

    Raises:
        ValueError: If a name in ``classes`` is not the class of any module.
    """
    check_classes("units", classes, root.modules())
    heads = list(_Heads(unit_bytes, frozenset(classes), apart).of(root, "", top=True))
    seen: set[int] = set(apart)
    plans: list[UnitPlan] = []
    for name, module in [*heads, ("", root)]:
        # An inner unit takes its parameters first, so that an outer one has what is left.
        plans.append(UnitPlan(name, module, []))
    for plan in sorted(plans, key=lambda p: -p.name.count(".") - bool(p.name)):
        prefix = plan.name + "." if plan.name else ""
        for param_name, param in plan.module.named_parameters():
            if id(param) not in seen:
                seen.add(id(param))
                plan.params.append((prefix + param_name, param))
    return [p for p in plans if p.params or p.module is root]


class _Heads:
    """Finds the modules that become units.

    Args:
        unit_bytes: Largest subtree without repeated blocks that becomes one unit.
        classes: Class names of modules that are units in any case.
        apart: ``id`` of each parameter that does not count.
    """

    def __init__(self, unit_bytes: int, classes: frozenset[str], apart: Collection[int]) -> None:
        self._unit_bytes, self._classes, self._apart = unit_bytes, classes, apart

    def of(self, module: nn.Module, name: str, *, top: bool = False) -> Iterator[tuple[str, nn.Module]]:
        """Yield those at and below ``module`` with their names."""
        size = self._nbytes(module)
        if size == 0:
            return
        leaf = not any(True for _ in module.children())
        whole = not isinstance(module, _CONTAINERS) and size >= SMALL and not self._has_blocks(module)
        named = type(module).__name__ in self._classes
        if not top and (named or (whole and (leaf or size <= self._unit_bytes))):
            yield name, module
            yield from self._named(module, name)
            return
        blocks = self._blocks(module)
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if child in blocks and not isinstance(child, _CONTAINERS):
                yield full, child
                yield from self._named(child, full)
            else:
                yield from self.of(child, full)

    def _named(self, module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules of named classes inside of a unit: units inside of it."""
        for inner_name, inner in module.named_modules():
            if inner is not module and type(inner).__name__ in self._classes and self._nbytes(inner):
                yield f"{name}.{inner_name}", inner

    def _blocks(self, module: nn.Module) -> list[nn.Module]:
        """Return the repeated blocks among the children of a container."""
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            return []
        children = [c for c in module.children() if self._nbytes(c)]
        kinds = [type(c) for c in children]
        return [c for c in children if kinds.count(type(c)) > 1]

    def _has_blocks(self, module: nn.Module) -> bool:
        return any(self._blocks(m) for m in module.modules())

    def _nbytes(self, module: nn.Module) -> int:
        return sum(p.numel() * p.dtype.itemsize for p in module.parameters() if id(p) not in self._apart)
