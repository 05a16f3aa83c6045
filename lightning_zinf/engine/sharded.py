"""Gradients of a buffer on one of several ranks: its own until they go out, then a shard of everybody's mean."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_zinf.comm.group import Collectives, Reduction
from lightning_zinf.engine.gradients import Piece, refuse_sparse
from lightning_zinf.engine.guard import KeptGradient, dropped, guard, lift, plainly
from lightning_zinf.engine.spent import SpentGradients
from lightning_zinf.engine.squares import Squares

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer
    from lightning_zinf.engine.context import EventTicket


class ShardedGradients:
    """Gradients of one buffer on one of several ranks.

    Args:
        buffer: Whose gradients.
    """

    def __init__(self, buffer: FlatBuffer) -> None:
        self._buffer = buffer
        self.squares = Squares(buffer.name, buffer.context.counters)
        self.spent = SpentGradients(buffer.params)
        self._sums: dict[int, Tensor] = {}
        self._shard: Tensor | None = None
        self._have: set[int] = set()
        self._hidden: dict[int, Tensor] = {}
        self._guarded: set[int] = set()
        self._under_way: list[tuple[Reduction, set[int]]] = []
        self._taken: set[int] = set()  # by an update, since gradients last went out
        self._tickets: list[EventTicket] = []

    # ------------------------------------------------------------------ this rank's own

    def take(self, index: int) -> None:
        """Leave the gradient of parameter ``index`` where it is, until the whole buffer goes out."""

    @plainly
    def hide(self) -> None:
        """Put a guard in the place of every gradient that there is, until the next backward."""
        for index, param in enumerate(self._buffer.params):
            grad = param.grad
            if isinstance(grad, KeptGradient):
                continue
            if grad is not None:
                self._hidden[index] = grad
            if grad is not None or index in self._have or index in self._sums:
                param.grad = guard(param)
                self._guarded.add(index)
        self.spent.put()

    @plainly
    def show(self) -> None:
        """Take the guards away again."""
        self.spent.lift()
        self._drop(lift(self._buffer.params, self._guarded))
        for index, grad in self._hidden.items():
            self._buffer.params[index].grad = grad
        self._hidden.clear()

    def _drop(self, indices: Collection[int]) -> None:
        """A guard that is gone means that ``module.zero_grad()`` or ``p.grad = None`` was meant for the gradient."""
        for index in indices:
            self._sums.pop(index, None)
            self._hidden.pop(index, None)
        if indices:
            self._forget(indices, zero=True)

    @plainly
    def before_backward(self) -> None:
        """Stage 1: move what the last backward left to float32 sums."""
        self.squares.forget()
        self.show()
        if self._buffer.context.stage > 1 or self._buffer.compute_dtype == torch.float32:
            return
        for index, param in enumerate(self._buffer.params):
            if (grad := param.grad) is not None:
                if index in self._sums:
                    self._sums[index] += grad
                else:
                    self._sums[index] = grad.to(torch.float32, copy=True)
                param.grad = None

    @plainly
    def own(self) -> list[int]:
        """Return the parameters that have a gradient of this rank that has not gone out."""
        found = {i for i, p in enumerate(self._buffer.params) if p.grad is not None}
        return sorted(found | set(self._sums))

    @property
    def summed(self) -> bool:
        """Whether gradients of this rank have been added up in float32."""
        return bool(self._sums)

    # ------------------------------------------------------------------ everybody's

    def launch(self, comm: Collectives, have: Collection[int], wide: bool) -> int:
        """Send this rank's gradients out; return the bytes under way.

        Args:
            comm: The collectives.
            have: The parameters that have a gradient on any rank, as far as that is known.
            wide: Send float32, whatever the gradients are.
        """
        buffer = self._buffer
        dtype = torch.float32 if wide else buffer.compute_dtype
        whole = torch.zeros(buffer.layout.padded_numel, dtype=dtype, device=buffer.device)
        views = buffer.views_of(whole)
        for index in self.own():
            param = buffer.params[index]
            if (grad := param.grad) is not None:
                refuse_sparse(grad, buffer.names[index])
                views[index].copy_(grad)
                if index in self._sums:
                    views[index].add_(self._sums.pop(index))
                param.grad = None
            else:
                views[index].copy_(self._sums.pop(index))
        self._taken.clear()
        self._under_way.append((comm.reduce_scatter(whole, buffer.name), set(have)))
        return 2 * whole.nbytes

    def abandon(self) -> None:
        """Forget what is under way, which some ranks may never join."""
        self._under_way.clear()

    def arrived(self) -> bool:
        """Whether what went out first would be absorbed without waiting."""
        return self._under_way[0][0].arrived()

    def absorb(self) -> None:
        """Wait for what went out first, and add it to the shard."""
        reduction, known = self._under_way.pop(0)
        mean = self._keep(reduction.mean())
        if self._shard is None:
            self._shard = mean
        else:
            self._wait()
            self._shard += mean
        self._have |= known

    def know(self, have: Collection[int]) -> None:
        """Note parameters that are known by now to have a gradient on some rank; nothing may be under way."""
        self._have |= set(have) - self._taken

    def _keep(self, mean: Tensor) -> Tensor:
        """Move a shard to where updates run."""
        buffer = self._buffer
        if buffer.context.aliased or buffer.on_device:
            return mean
        host = buffer.context.lend_host(mean.nbytes).view(torch.float32)
        ticket = buffer.context.download(mean, host, f"{buffer.name}/gradient")
        if ticket is not None:
            self._tickets.append(ticket)
        return host

    def _wait(self) -> None:
        """Wait until what has been reduced is where updates run: backward goes on while it is copied there."""
        while self._tickets:
            self._tickets.pop().wait()

    def collect(self, indices: Collection[int], *, keep: bool) -> list[Piece]:
        """Return this rank's part of the gradients that are reduced.

        Parameters that lie in other ranks' shards come with an empty piece.
        """
        gone = dropped(self._buffer.params, self._guarded)
        self._guarded.difference_update(gone)
        self._drop(gone)
        pieces = self._pieces(indices)
        if not keep and self._shard is not None:
            self.squares.forget()
            self._taken |= set(indices)
            for index in indices:
                self._buffer.params[index].grad = None
            self._guarded.difference_update(indices)
            self._forget(indices, zero=False)
        return pieces

    def sum_squares(self) -> bool:
        """See :meth:`Gradients.sum_squares`; what has been reduced is complete once it has been copied."""
        if not all(ticket.done() for ticket in self._tickets):
            return False
        self.squares.note({p.index: p.grad for p in self._pieces(range(len(self._buffer.params))) if p.grad.is_cpu})
        return True

    def rest(self) -> None:
        """They go out as they are complete, unit by unit."""

    def squares_of(self, pieces: Sequence[Piece]) -> list[float | None]:
        """See :meth:`Gradients.squares_of`."""
        return [self.squares.of(p.index, p.grad) for p in pieces]

    def _pieces(self, indices: Collection[int]) -> list[Piece]:
        self._wait()
        if self._shard is None:
            return []
        wanted = [i for i in indices if i in self._have]
        parts = {
            index: (low, numel) for index, _, low, numel in self._buffer.layout.overlaps(*self._buffer.shard_range)
        }
        first = self._buffer.shard_range[0]
        pieces = []
        for index in wanted:
            low, numel = parts.get(index, (first, 0))
            pieces.append(Piece(index, low - first, self._shard[low - first : low - first + numel]))
        return pieces

    @plainly
    def clear(self, indices: Collection[int]) -> None:
        """Forget the gradients of these parameters."""
        self.squares.forget()
        self.spent.forget(indices)
        for index in indices:
            self._sums.pop(index, None)
            self._hidden.pop(index, None)
            self._buffer.params[index].grad = None
        self._guarded.difference_update(indices)
        self._forget(indices, zero=True)

    def _forget(self, indices: Collection[int], *, zero: bool) -> None:
        self._wait()
        self._have -= set(indices)
        if not self._have:
            self._shard = None
        elif zero and self._shard is not None:
            first = self._buffer.shard_range[0]
            for index, _, low, numel in self._buffer.layout.overlaps(*self._buffer.shard_range):
                if index in set(indices):
                    self._shard[low - first : low - first + numel] = 0
        elif self._shard is not None:  # somebody else's gradients stay behind: the caller's are his alone
            self._shard = self._shard.clone()
            self._forget(indices, zero=True)
