"""Gradients of a buffer between backward and the optimizer step.

Note [Gradients]
~~~~~~~~~~~~~~~~
On a CPU accelerator gradients stay where autograd put them, in ``p.grad``: they are in host memory already, and code
that reads or scales ``p.grad`` before the step keeps working. On an accelerator with memory of its own each gradient
goes to host memory as soon as it is complete, once, in the dtype that it has, and ``p.grad`` is None after.

Several backwards before a step accumulate in float32, also where gradients are bfloat16: what an earlier backward left
is moved to a float32 sum before the next one starts. In 32-bit training on a CPU autograd's own sum is just that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lightning_zinf.engine.guard import KeptGradient, guard, lift, plainly
from lightning_zinf.engine.spent import SpentGradients
from lightning_zinf.engine.squares import Squares

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer
    from lightning_zinf.engine.context import EventTicket


class Source(Protocol):
    """Gives gradients their values, which are elsewhere."""

    def loaded(self) -> AbstractContextManager[None]:
        """While this is open, they are there."""

    def done(self) -> None:
        """The update that they were collected for has been applied."""


@dataclass(frozen=True)
class Piece:
    """The gradient of a parameter, or of the part of it that this rank's shard has.

    Attributes:
        index: Number of the parameter in the buffer.
        start: Its first element in the shard.
        grad: The gradient, contiguous.
        source: What gives ``grad`` its values, which has to be loaded first; None if it has them.
    """

    index: int
    start: int
    grad: Tensor
    source: Source | None = None


class Gradients(Protocol):
    """Gradients of one buffer.

    Attributes:
        squares: What is known of their norm.
        spent: What steps have used up.
    """

    squares: Squares
    spent: SpentGradients

    def take(self, index: int) -> None:
        """Parameter ``index`` has a gradient: move it to where it is kept."""

    def before_backward(self) -> None:
        """Make room for the gradients of another backward."""

    def hide(self) -> None:
        """A backward has ended: let code that uses ``p.grad`` raise where that is not the gradient."""

    def rest(self) -> None:
        """The gradients of the unit are complete: bring them where they rest."""

    def sum_squares(self) -> bool:
        """Sum the squares of gradients that are complete; return False if they are still on their way."""

    def squares_of(self, pieces: Sequence[Piece]) -> list[float | None]:
        """Return the sum of squares of each of these collected gradients, None where it is not known."""

    def collect(self, indices: Collection[int], *, keep: bool) -> list[Piece]:
        """Return the gradient of every parameter among ``indices`` that has one.

        Args:
            indices: Which parameters.
            keep: Leave the gradients in place. If False, they are the caller's alone.

        Raises:
            ValueError: If a gradient is sparse.
        """

    def clear(self, indices: Collection[int]) -> None:
        """Forget the gradients of these parameters."""


class WholeGradients:
    """Gradients of one buffer where there is one rank.

    Args:
        buffer: Whose gradients.
    """

    def __init__(self, buffer: FlatBuffer) -> None:
        self._buffer = buffer
        self.squares = Squares(buffer.name, buffer.context.counters)
        self.spent = SpentGradients(buffer.params)
        self._sums: dict[int, Tensor] = {}
        self._arrived: dict[int, Tensor] = {}
        self._tickets: list[EventTicket] = []
        self._plane: Tensor | None = None
        self._guarded: set[int] = set()

    def rest(self) -> None:
        """They are where they rest already."""

    def squares_of(self, pieces: Sequence[Piece]) -> list[float | None]:
        """See :meth:`Gradients.squares_of`."""
        return [self.squares.of(p.index, p.grad) for p in pieces]

    @property
    def _stays(self) -> bool:
        """Whether gradients stay where autograd puts them."""
        return self._buffer.context.aliased or self._buffer.on_device

    def take(self, index: int) -> None:
        """Move the gradient of parameter ``index`` off the device, or leave it if host and device are one."""
        buffer = self._buffer
        if self._stays:
            return
        grad = buffer.params[index].grad
        if grad is None or isinstance(grad, KeptGradient):
            return
        if index in self._arrived:
            self._fold(index)
        if self._plane is None:
            nbytes = buffer.layout.padded_numel * grad.dtype.itemsize
            self._plane = buffer.context.lend_host(nbytes).view(grad.dtype)
        start, numel = buffer.layout.offsets[index], buffer.layout.numels[index]
        host = self._plane[start : start + numel].view(buffer.layout.shapes[index])
        ticket = buffer.context.download(grad.detach(), host, f"{buffer.name}/gradient")
        if ticket is not None:
            self._tickets.append(ticket)
        self._arrived[index] = host
        buffer.params[index].grad = None

    @plainly
    def sum_squares(self) -> bool:
        """See :meth:`Gradients.sum_squares`. Those that are added to sums are complete only when a backward ends."""
        if not all(ticket.done() for ticket in self._tickets):
            return False
        grads = {}
        for index, param in enumerate(self._buffer.params):
            grad = self._arrived.get(index, param.grad)
            hooks = getattr(param, "_post_accumulate_grad_hooks", None) or ()
            if grad is not None and index not in self._sums and len(hooks) < 2 and _can_be_summed(grad):
                grads[index] = grad
        self.squares.note(grads)
        return True

    def _complete_sums(self) -> None:
        """Add the last micro-batch's gradients to the sums, and sum the squares of those."""
        self._wait()
        open_ = [i for i in self._sums if not isinstance(self._buffer.params[i].grad, KeptGradient)]
        totals = {index: self._of(index) for index in open_}
        self.squares.note({i: t for i, t in totals.items() if t is not None and _can_be_summed(t)})

    @plainly
    def hide(self) -> None:
        """Put guards where a gradient is elsewhere, or part of it."""
        if self._buffer.context.norms_ahead:
            self._complete_sums()
        for index in set(self._sums) | set(self._arrived):
            param = self._buffer.params[index]
            if isinstance(param.grad, KeptGradient):
                continue
            if param.grad is not None:  # the last micro-batch's, whose sum with the others is the gradient
                self._arrived[index] = param.grad.detach()
                self._fold(index)
            param.grad = guard(param)
            self._guarded.add(index)
        self.spent.put()

    @plainly
    def _show(self) -> None:
        """Take the guards away; one that the user has taken away means that the gradient was to go."""
        self.spent.lift()
        for index in lift(self._buffer.params, self._guarded):
            self._sums.pop(index, None)
            self._arrived.pop(index, None)

    def before_backward(self) -> None:
        """Make room for the gradients of another backward."""
        self.squares.forget()
        self._wait()
        self._show()
        if not self._stays or self._buffer.compute_dtype == torch.float32:
            return
        for index, param in enumerate(self._buffer.params):
            if param.grad is not None:
                self._arrived[index] = param.grad.detach()
                self._fold(index)
                param.grad = None

    def collect(self, indices: Collection[int], *, keep: bool) -> list[Piece]:
        """See :meth:`Gradients.collect`."""
        self._wait()
        self._show()
        for index in indices:
            self.take(index)
        self._wait()
        found: list[Piece] = []
        for index in indices:
            grad = self._of(index)
            if grad is not None:
                refuse_sparse(grad, self._buffer.names[index])
                found.append(Piece(index, self._buffer.layout.offsets[index], grad.contiguous()))
        if not keep:
            self._plane = None  # the caller owns it now
            self.clear(indices)
        self.hide()
        return found

    def clear(self, indices: Collection[int]) -> None:
        """Forget the gradients of these parameters."""
        self.squares.forget()
        self.spent.forget(indices)
        self._wait()
        for index in indices:
            self._sums.pop(index, None)
            self._arrived.pop(index, None)
            self._guarded.discard(index)
            self._buffer.params[index].grad = None

    def _of(self, index: int) -> Tensor | None:
        """Return the whole gradient of a parameter, summed over backwards."""
        param = self._buffer.params[index]
        grad = self._arrived.get(index, param.grad)
        total = self._sums.get(index)
        if total is None:
            return None if grad is None else grad.detach()
        if grad is not None:
            total += grad.detach()
            self._arrived.pop(index, None)
            param.grad = None
        return total

    def _fold(self, index: int) -> None:
        self._wait()
        grad = self._arrived.pop(index)
        if index in self._sums:
            self._sums[index] += grad
        else:
            self._sums[index] = grad.to(torch.float32, copy=True)

    def _wait(self) -> None:
        while self._tickets:
            self._tickets.pop().wait()


def _can_be_summed(grad: Tensor) -> bool:
    return not isinstance(grad, KeptGradient) and grad.is_cpu and not grad.is_sparse and grad.is_contiguous()


def refuse_sparse(grad: Tensor, name: str) -> None:
    """Raise ValueError if a gradient is sparse."""
    if grad.is_sparse:
        raise ValueError(
            f"parameter {name!r} has a sparse gradient, which the zinf strategy cannot use: build the embedding with "
            "sparse=False"
        )
