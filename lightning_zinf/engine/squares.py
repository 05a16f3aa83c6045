"""Sums of squares of gradients, from when they are complete on.

Note [Norms ahead]
~~~~~~~~~~~~~~~~~~
Clipping by norm has to know the sum of squares of all gradients. A pass over all of them when the norm is asked for
reads them from memory once more than needed. So where a norm will be asked for, each gradient is summed when it is
complete: on a CPU while it is still in cache, on an accelerator behind its transfer to the host, with several ranks
when the shard is reduced. The norm adds up what is known and what is not (that is summed then) in the order of the
parameters, so its bits do not depend on which is which: the kernel's sum of a tensor depends on that tensor alone.

What is known holds for one state of one gradient: the memory and its version counter. So accumulation, another value
of ``p.grad`` or a change in place leave it behind. Only a change that goes around autograd (``p.grad.data``) would not
be seen; so nothing is summed ahead where code of the user's comes between backward and the norm
(``_compat.sees_gradients``), nor gradients of parameters with hooks of his.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_zinf.monitor.counters import Counters
from lightning_zinf.monitor.trace import span
from lightning_zinf.ops import squared_norms

_SLICE = 1 << 22
"""Elements whose float64 copies are on an accelerator at a time."""


class Squares:
    """Sums of squares of the gradients of one buffer that are known already.

    Args:
        name: The buffer's, for traces.
        counters: Where bytes are counted.
    """

    def __init__(self, name: str, counters: Counters) -> None:
        self._name = name
        self._counters = counters
        self._known: dict[int, tuple[Tensor, int, float]] = {}

    def note(self, grads: Mapping[int, Tensor]) -> None:
        """Sum gradients that are complete, less those whose sum is known.

        Args:
            grads: In host memory, contiguous, by number of the parameter.
        """
        new = {i: g.detach() for i, g in grads.items() if self.of(i, g) is None}
        if not new:
            return
        nbytes = sum(g.nbytes for g in new.values())
        self._counters.norm_ahead_bytes += nbytes
        with span(self._counters, "norm", self._name, nbytes):
            for (index, grad), total in zip(new.items(), sums_of_squares(list(new.values())), strict=True):
                self._known[index] = (grad, grad._version, total)

    def of(self, index: int, grad: Tensor) -> float | None:
        """Return the sum for parameter ``index`` if it is known for ``grad`` as it is now, else None."""
        found = self._known.get(index)
        if found is None:
            return None
        summed, version, total = found  # it keeps its memory, so that no other gradient has the same address
        same = summed.data_ptr() == grad.data_ptr() and summed.shape == grad.shape and summed.dtype == grad.dtype
        return total if same and summed._version == version == grad._version else None

    def forget(self) -> None:
        """Let go of all gradients."""
        self._known.clear()


def sums_of_squares(grads: list[Tensor]) -> list[float]:
    """Return the sum of squares of each gradient: contiguous, float32, bfloat16 or float16.

    Those on an accelerator are summed there, in float64 as the kernel does, but in another order. So the norm may
    differ in the last of its 53 bits from what it would be had they gone to host memory; the clip factor has 24.
    """
    on_host = [g for g in grads if g.is_cpu]
    found = iter(squared_norms([g.float() if g.dtype == torch.float16 else g for g in on_host]))
    away = iter(_sums_on_device([g for g in grads if not g.is_cpu]))
    return [next(found) if g.is_cpu else next(away) for g in grads]


def _sums_on_device(grads: list[Tensor]) -> list[float]:
    """Return the sum of squares of each tensor on an accelerator, for which the host waits once."""
    if not grads:
        return []
    parts = [[part.double().square_().sum() for part in g.reshape(-1).split(_SLICE)] for g in grads]
    values = iter(torch.stack([part for own in parts for part in own]).tolist())
    return [sum((next(values) for _ in own), 0.0) for own in parts]
