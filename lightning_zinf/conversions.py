"""Refusing ``module.double()``, ``.half()`` and ``.to(dtype)`` where parameters are not theirs to convert.

Note [Conversions]
~~~~~~~~~~~~~~~~~~
The engine keeps a weight in the dtype that it had when training was set up. A conversion of the module would convert
its buffers for good, and of its parameters only what happens to be in memory, for a while; the next use would then fail
in some operator, or have lost bits. All of torch's conversions go through ``Module._apply``, so each module has one of
its own that looks at its parameters before anything is changed. So does every other strategy of Lightning's that takes
the module over, since it moves it to its device first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_zinf.parameters import owner_of


class Conversion:
    """``_apply`` of a module whose parameters the strategy may have.

    Args:
        module: The module.
        before: Called before anything else, to refuse what it has to.
    """

    def __init__(self, module: nn.Module, before: Callable[[], None] | None = None) -> None:
        self._module = module
        self._before = before
        self._dtype = module.__dict__.get("_dtype")  # what Lightning's modules say of theirs, before they convert

    def __call__(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Do what the module's class does.

        Raises:
            ValueError: If it would give parameters of the strategy another dtype.
        """
        if self._before is not None:
            self._before()
        self._refuse(fn)
        return type(self._module)._apply(self._module, fn, *args, **kwargs)

    def _refuse(self, fn: Any) -> None:
        becomes: dict[torch.dtype, torch.dtype] = {}
        for name, param in self._module.named_parameters():
            entry = owner_of(param)
            if entry is None or getattr(entry[0], "unseen", False):  # what is in place is a plain parameter
                continue
            dtype = entry[0].view_dtype
            if dtype not in becomes:
                becomes[dtype] = _converted(fn, dtype)
            if becomes[dtype] != dtype:
                if self._dtype is not None:
                    self._module.__dict__["_dtype"] = self._dtype
                raise ValueError(
                    f"parameter {name!r} cannot become {becomes[dtype]}: the zinf strategy keeps its {dtype} master, "
                    "which comes and goes. Convert a copy, copy.deepcopy(module), or a new module that has loaded "
                    "lightning_zinf.full_state_dict(module). To train in 16 bits there is Trainer(precision=...)"
                )

    def __reduce__(self) -> Any:
        """A copy has the copied module's own; so what is pickled needs nothing of this package."""
        return partial, (type(self._module)._apply, self._module)


def guard_conversions(root: nn.Module, before: Callable[[], None]) -> None:
    """Have a module, and all below it, refuse conversions of parameters that the strategy has.

    Args:
        root: The module.
        before: Called before the whole module is converted or moved.
    """
    for module in root.modules():
        module.__dict__["_apply"] = Conversion(module, before if module is root else None)


def _converted(fn: Any, dtype: torch.dtype) -> torch.dtype:
    """Return what ``fn`` makes of a tensor of this dtype, as far as an empty one can tell."""
    try:
        result = fn(torch.empty(0, dtype=dtype))
    except Exception:  # it is called for the parameters too, and then says so itself
        return dtype
    return result.dtype if isinstance(result, torch.Tensor) else dtype
