"""Activation checkpointing: units that keep their inputs in forward, and compute the rest again in backward.

Note [Recomputation]
~~~~~~~~~~~~~~~~~~~~
While an engine lives, the ``forward`` of each chosen module is a callable that runs the module's own one under
``torch.utils.checkpoint`` (``use_reentrant=False``), in training steps only. It sits in the module's ``__dict__``, as
``torch.compile(module.forward)`` would: class, signature, state dict and hooks of the module stay what they are, and a
copy or a pickle of the module has its own forward back. A module that was compiled with ``module.compile()`` has its
compiled call wrapped instead, so that forward and recomputation run the same graph.

torch restores the random state and autocast. What else a forward depends on is kept here, so that the recomputation has
the bits of the first time:

- buffers that the forward changes (the statistics of a BatchNorm, the vectors of a spectral norm): the recomputation
  works on copies of what they were before, so they are changed once;
- which submodules were in training mode.

A unit through which no gradient can flow runs as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from lightning_zinf.engine.units import check_classes


class Steps(Protocol):
    """What recomputation needs of the engine."""

    def in_step(self) -> bool:
        """Whether a step or a backward is running."""

    def saving_inputs(self) -> AbstractContextManager[None]:
        """While this is open, autograd saves inputs of a unit that will be recomputed from them."""

    def recomputing(self, module: nn.Module) -> AbstractContextManager[None]:
        """While this is open, ``module`` is computed again: it needs its weights."""


def modules_to_recompute(root: nn.Module, units: Sequence[nn.Module], asked: bool | Sequence[str]) -> list[nn.Module]:
    """Return the modules that keep only their inputs; none of them is inside of another.

    Args:
        root: The model.
        units: The modules that are its units.
        asked: True for every unit that is made of several modules (a lone layer saves little more than its input), or
            names of classes.

    Raises:
        ValueError: If there is no such module.
    """
    if asked is False:
        return []
    if asked is True:
        found = [m for m in units if m is not root and any(True for _ in m.children())]
        if not found:
            raise ValueError(
                "activation_checkpointing=True recomputes units that are made of several modules, and this model has "
                "none: name classes of modules to recompute, as in activation_checkpointing=['Block']"
            )
    else:
        if not asked:
            raise ValueError("activation_checkpointing=[] names no class: give names, True, or False")
        inner = [m for m in root.modules() if m is not root]
        check_classes("activation_checkpointing", asked, inner)
        found = [m for m in inner if type(m).__name__ in asked]
    inside = {inner for module in found for inner in module.modules() if inner is not module}
    return [m for m in dict.fromkeys(found) if m not in inside]


class _Plain:
    """The forward of a copied or unpickled module, which nobody recomputes."""

    def __init__(self, module: nn.Module, own: Callable[..., Any] | None) -> None:
        self._module, self._own = module, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._own is not None:
            return self._own(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)


class _Moment:
    """What a module's forward depends on beside its inputs and weights, as it was when the forward began."""

    def __init__(self, inside: list[nn.Module]) -> None:
        self._inside = inside
        self._training = [m.training for m in inside]
        self._before = [
            (m, name, buffer, buffer._version, buffer.detach().clone())
            for m in inside
            for name, buffer in m._buffers.items()
            if buffer is not None
        ]

    def forget_unchanged(self) -> None:
        """The forward is over: keep copies of the buffers that it changed."""
        self._before = [
            entry
            for entry in self._before
            # The statistics of norms change without a new version.
            if entry[2]._version != entry[3] or (isinstance(entry[0], _NormBase) and entry[0].training)
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Put the module back to that moment for a while."""
        modes = [(m, m.training) for m, then in zip(self._inside, self._training, strict=True) if m.training != then]
        copies = {id(buffer): then.clone() for _, _, buffer, _, then in self._before}  # one for all of its names
        now = [(m, name, m._buffers[name]) for m, name, *_ in self._before]
        try:
            for m, mode in modes:
                m.training = not mode
            for m, name, buffer, *_ in self._before:
                m._buffers[name] = copies[id(buffer)]
            yield
        finally:
            for m, mode in modes:
                m.training = mode
            for m, name, current in now:
                m._buffers[name] = current


class _Computation:
    """One call of a module, which can be done again; holds no tensor of its arguments."""

    def __init__(self, unit: RecomputedForward, leaves: list[Any], spec: TreeSpec) -> None:
        self._unit = unit
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._spec = spec
        self._moment = _Moment(unit.inside)
        self._done = False
        self.saving: AbstractContextManager[None] | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        if self._done:
            with self._unit.steps.recomputing(self._unit.module), self._moment.again():
                return self._unit.original(*args, **kwargs)
        self._done = True
        self.inputs_are_saved()
        result = self._unit.original(*args, **kwargs)
        self._moment.forget_unchanged()
        return result

    def inputs_are_saved(self) -> None:
        """Whatever autograd saves from here on is no input."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.__exit__(None, None, None)


class RecomputedForward:
    """A module's forward that is computed again in backward.

    Args:
        module: The module.
        steps: The engine.
    """

    def __init__(self, module: nn.Module, steps: Steps) -> None:
        self.module = module
        self.steps = steps
        self.inside = list(module.modules())
        compiled = module._compiled_call_impl
        self._name = "forward" if compiled is None else "_compiled_call_impl"
        self._own = module.__dict__.get(self._name)
        self.original: Callable[..., Any] = getattr(module, self._name)
        self.active = True
        functools.update_wrapper(self, self.original, updated=())
        setattr(module, self._name, self)

    def remove(self) -> None:
        """Give the module its forward back."""
        self.active = False  # somebody may have wrapped it meanwhile
        if self.module.__dict__.get(self._name) is self:
            if self._own is None:
                del self.module.__dict__[self._name]
            else:
                setattr(self.module, self._name, self._own)

    def __reduce__(self) -> Any:
        """Leave the module's own forward in copies and pickles."""
        return _Plain, (self.module, self._own)

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, in training so that backward can do it again."""
        if not (self.active and self.module.training and torch.is_grad_enabled() and self.steps.in_step()):
            return self.original(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(t.requires_grad for t in tensors) and not any(p.requires_grad for p in self.module.parameters()):
            return self.original(*args, **kwargs)
        computation = _Computation(self, leaves, spec)
        del leaves
        computation.saving = self.steps.saving_inputs()
        computation.saving.__enter__()
        try:
            return checkpoint(computation, *tensors, use_reentrant=False)
        finally:
            computation.inputs_are_saved()
