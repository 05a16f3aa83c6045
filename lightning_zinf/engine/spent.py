"""Gradients that an optimizer step has used up, where plain torch would still have them.

Note [Spent gradients]
~~~~~~~~~~~~~~~~~~~~~~
In plain torch a gradient outlives ``optimizer.step()``: without ``zero_grad()`` the next backward adds to it, and a
second step takes it again. A step of offloaded state owns its gradients, which are gone after it. So a loop that does
not zero them would train otherwise here than elsewhere, and otherwise with another placement. To keep them would take
the memory of all gradients through the next forward, for loops that have forgotten to zero them as a rule. So where the
loop is the user's own we note what steps have used, until it is zeroed, and a step that would use it again is refused.

Zeroing is seen by what is in ``p.grad``: a guard after such a step, whichever way it is taken from there. When a step
is refused, and not when a backward begins: gradients of a discriminator that the generator's backward leaves behind are
dropped before they are used.

``zero_grad(set_to_none=False)`` leaves zeros in plain torch, so a parameter that gets no gradient after it still takes
a step, with a gradient of zeros. Such parameters have a guard too.

Automatic optimization zeroes between a step and the next backward, so nothing is noted there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_zinf.engine.guard import KeptGradient, SpentGradient, guard_of, plainly


class SpentGradients:
    """Which gradients of a buffer's parameters have been used by a step, and not been zeroed since.

    Args:
        params: The parameters.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self._params = params
        self._guards: dict[int, SpentGradient] = {}
        self._hooks: dict[int, Any] = {}  # of those that have their guard
        self._spent: set[int] = set()
        self._zeros: set[int] = set()
        self._lifted: set[int] = set()

    # ------------------------------------------------------------------ what becomes of a gradient

    @plainly
    def mark(self, indices: Collection[int]) -> None:
        """A step has used these, and they are gone."""
        for index in indices:
            self._spent.add(index)
            self._zeros.discard(index)
            self._put(index)

    @plainly
    def present(self, indices: Collection[int]) -> list[int]:
        """Return those that plain torch would have a gradient of."""
        return [i for i in indices if self._params[i].grad is not None]

    @plainly
    def zero(self, indices: Collection[int]) -> None:
        """The gradients of these have been set to zero."""
        for index in indices:
            self._spent.discard(index)
            self._zeros.add(index)
            self._put(index)

    @plainly
    def forget(self, indices: Collection[int]) -> None:
        """The gradients of these have been set to None."""
        if self._spent or self._zeros:
            for index in indices:
                self._forget(index)

    def clear(self) -> None:
        """Forget all, and take the guards away."""
        self.forget(range(len(self._params)))
        self._guards.clear()

    # ------------------------------------------------------------------ around a backward

    @plainly
    def lift(self) -> None:
        """Take the guards away, and forget what the user has zeroed; call it before other guards are lifted."""
        for index in self._spent | self._zeros:
            if self._look(index) and self._guarded(index):
                self._unguard(index)
                self._params[index].grad = None
                self._lifted.add(index)

    @plainly
    def put(self) -> None:
        """Put guards in the place of what a backward has brought nothing for."""
        for index in self._lifted & (self._spent | self._zeros):
            if self._params[index].grad is None:
                self._put(index)
        self._lifted.clear()

    # ------------------------------------------------------------------ at a step

    @plainly
    def left(self, indices: Collection[int]) -> list[int]:
        """Return those of ``indices`` that a step has used and nobody has zeroed."""
        return sorted(i for i in self._spent.intersection(indices) if self._look(i) and i in self._spent)

    @plainly
    def zeros(self, indices: Collection[int]) -> set[int]:
        """Return those of ``indices`` that were set to zero; gradients may have come since."""
        return {i for i in self._zeros.intersection(indices) if self._look(i)}

    # ------------------------------------------------------------------ one gradient

    def _look(self, index: int) -> bool:
        """Whether the user has left the gradient of a parameter as it was; if not, take note of it."""
        grad = self._params[index].grad
        if grad is None and index in self._lifted:
            return True
        if self._guarded(index):
            if grad.zeroed:  # type: ignore[union-attr]
                self._spent.discard(index)
                self._zeros.add(index)
            return True
        fresh = grad is not None and not isinstance(grad, KeptGradient)
        in_place = fresh and index in self._spent and not (grad.is_sparse or bool(grad.any()))  # type: ignore[union-attr]
        if grad is None or in_place:
            self._forget(index)
            return False
        return True

    def _guarded(self, index: int) -> bool:
        """Whether there is our guard in the place of a gradient."""
        own = self._guards.get(index)
        return own is not None and self._params[index].grad is own

    def _put(self, index: int) -> None:
        param = self._params[index]
        value = self._guards.get(index)
        if value is None or Tensor.dtype.__get__(value) != param.dtype:  # type: ignore[attr-defined]
            value = self._guards[index] = guard_of(SpentGradient, param)
        value.zeroed = False
        param.grad = value
        if index not in self._hooks:
            required = param.requires_grad
            param.requires_grad_(True)  # torch takes hooks for such parameters only
            self._hooks[index] = param.register_hook(functools.partial(_make_room, weakref.ref(param)))
            param.requires_grad_(required)

    def _unguard(self, index: int) -> None:
        if index in self._hooks:
            self._hooks.pop(index).remove()

    def _forget(self, index: int) -> None:
        self._spent.discard(index)
        self._zeros.discard(index)
        if self._guarded(index):
            self._params[index].grad = None
        self._unguard(index)


@plainly
def _make_room(param: weakref.ref[nn.Parameter], _grad: Tensor) -> None:
    """A backward that nobody has told us of brings a gradient, which has to find its place empty."""
    found = param()  # hooks hide from the garbage collector what they hold
    if found is not None and isinstance(found.grad, SpentGradient):
        found.grad = None


def refuse_spent(names: Sequence[str]) -> None:
    """Raise if a step would use gradients that an earlier one has used up.

    Args:
        names: Names of their parameters.

    Raises:
        ValueError: If there are any.
    """
    if names:
        more = f" and {len(names) - 3} others" if len(names) > 3 else ""
        raise ValueError(
            f"optimizer.step(): an earlier step has used the gradients of {', '.join(map(repr, names[:3]))}{more}, and "
            "they were not zeroed since. Plain torch would still have them, and use them again in the sum with newer "
            "ones; here a step uses them up, since its state is offloaded or it clips them. Call "
            "optimizer.zero_grad() after each step and before the next backward. To add up the gradients of several "
            "backwards, take one step after all of them"
        )
